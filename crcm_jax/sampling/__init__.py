"""Samplers: streaming, few-step and multi-step; and whole clips of bidirectional networks."""

from crcm_jax.sampling.bidirectional import Whole, denoise_whole, generate_whole, teacher_times
from crcm_jax.sampling.stream import Few, Noise, Ode, draw_noise, generate, stream

__all__ = [
    "Few", "Noise", "Ode", "Whole", "denoise_whole", "draw_noise", "generate", "generate_whole", "stream",
    "teacher_times",
]  # fmt: skip
