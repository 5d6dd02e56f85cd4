"""What to run: an analytical model of a network on hardware, after Pope et al. 2022 (arXiv 2211.05102). No jax."""
