"""Samplers: sessions and streams of causal networks, whole clips of bidirectional ones, rollouts of training."""

from crcm_jax.sampling.schedule import ContextRule, Cycle, Exit, RolloutPlan, Schedule
from crcm_jax.sampling.session import ChunkNoise, Session, State, fork
from crcm_jax.sampling.solvers import Few, Ode, Solver
from crcm_jax.sampling.stream import Noise, draw_noise, generate, stream
from crcm_jax.sampling.whole import Whole, denoise_whole, generate_whole, teacher_times

__all__ = [
    "ChunkNoise", "ContextRule", "Cycle", "Exit", "Few", "Noise", "Ode", "RolloutPlan", "Schedule", "Session", "Solver",
    "State", "Whole", "denoise_whole", "draw_noise", "fork", "generate", "generate_whole", "stream", "teacher_times",
]  # fmt: skip
