"""Load on any OpenAI-compatible server, and what it makes of it: `strop bench serve`."""
