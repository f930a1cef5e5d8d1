"""Samplers: streaming, few-step and multi-step."""

from crcm_jax.sampling.stream import Few, Noise, Ode, draw_noise, generate, stream

__all__ = ["Few", "Noise", "Ode", "draw_noise", "generate", "stream"]
