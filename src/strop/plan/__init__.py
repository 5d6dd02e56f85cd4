"""What to run: an analytical model of a network on hardware, after Pope et al. 2022 (arXiv 2211.05102), without jax.

And this machine, measured (calibrate, overhead) and predicted (predict) by the code that an engine runs.
"""
