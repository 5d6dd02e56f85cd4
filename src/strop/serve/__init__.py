"""The OpenAI-compatible server: an API process (this package) in front of an engine process."""
