"""OpenAI's API as pure functions: bytes of JSON to requests, deltas to bytes. No asyncio, engine, jax or HTTP."""
