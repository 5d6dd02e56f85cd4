"""Plain Python nouns that everything else shares. Imports nothing of ours and never jax."""
