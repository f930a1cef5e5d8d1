"""Samplers: sessions and streams of causal networks, whole clips of bidirectional ones, rollouts of training."""

import jax

from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.sampling.schedule import ContextRule, Cycle, Exit, RolloutPlan, Schedule
from crcm_jax.sampling.session import ChunkNoise, Session, State, fork
from crcm_jax.sampling.solvers import Few, Ode, Solver
from crcm_jax.sampling.stream import Noise, draw_noise, generate, stream
from crcm_jax.sampling.whole import Whole, denoise_whole, generate_whole, teacher_times


def generate_with(sampler: Solver | Whole, model: Bound, cond: Condition, noise: Noise, **options) -> jax.Array:
    """The clips that a sampler of either kind makes of `noise`: at once of a bidirectional model, or streamed.

    options: `uncond` and `guidance`. ValueError for a sampler of the other kind.
    """
    at_once = model.network.chunks is None
    if at_once != (type(sampler) is Whole):
        raise ValueError(f"a {'bidirectional' if at_once else 'causal'} model cannot be sampled {sampler.describe()}")
    if type(sampler) is Whole:
        return generate_whole(model, cond, noise.initial, times=sampler.times, solver=sampler.solver, **options)
    return generate(model, cond, shape=noise.initial.shape, solver=sampler, noise=noise, **options)


__all__ = [
    "ChunkNoise", "ContextRule", "Cycle", "Exit", "Few", "Noise", "Ode", "RolloutPlan", "Schedule", "Session", "Solver",
    "State", "Whole", "denoise_whole", "draw_noise", "fork", "generate", "generate_whole", "generate_with",
    "stream", "teacher_times",
]  # fmt: skip
