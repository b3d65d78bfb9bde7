"""Denoising diffusion probabilistic models (Ho et al. 2020): the mathematics, the network, its training."""

__version__ = "0.1.0"
