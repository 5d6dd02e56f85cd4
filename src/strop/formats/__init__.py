"""Model files: bounded parsers that trust no length, the portable artifact, and the disposable pack cache. No jax."""
