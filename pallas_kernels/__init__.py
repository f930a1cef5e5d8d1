"""Kernels that stand alone: they depend on jax and numpy, and on nothing else in this repository."""
