"""Stage 1: diffusion. Teacher forcing (`tf`), diffusion forcing (`df`) and the bidirectional model they start from.

All three regress the velocity v* = ε − x0 (spec causal_rcm 4.1, 4.2).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from crcm_jax import flow
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.objectives import common

WEIGHTINGS: dict[str, Callable] = {"none": jnp.ones_like, "gaussian_bell": flow.gaussian_bell}
STRATEGIES = ("random", "same", "fopp")


def velocity_loss(v, x0, noise, t, weighting: str, scale: float, held=None):
    """scale · Σ_frames w(t)·mean_{height, width, channel}(v − (ε − x0))², one value a sample."""
    error = common.frame_mean(jnp.square(v - (noise - x0)))
    return scale * jnp.sum(common.generated(WEIGHTINGS[weighting](t) * error, held), 1)


def teacher_forcing(
    student: Bound, batch, cond: Condition, key, *, times: flow.TimeDistribution,
    context_noise=common.CLEAN, weighting: str = "gaussian_bell", scale: float = 100.0,
):  # fmt: skip
    """`tf`: one time a sample, clean context (spec causal_rcm 4.1). Returns (losses `[batch]`, metrics)."""
    x0, held = batch["latents"], common.given(batch)
    time_key, noise_key, context_key = jax.random.split(key, 3)
    t = flow.sample_times(time_key, times, (x0.shape[0], 1))
    noise = jax.random.normal(noise_key, x0.shape)
    view = common.context(context_key, x0, student.chunks, context_noise)
    x, t_x = common.noised(x0, noise, t, held)
    v = student.velocity(x, t_x, cond, view)
    return velocity_loss(v, x0, noise, t, weighting, scale, held), {}


def diffusion_forcing(
    student: Bound, batch, cond: Condition, key, *, times: flow.TimeDistribution, strategy: str = "random",
    weighting: str = "none", scale: float = 100.0,
):  # fmt: skip
    """`df`: a noisy clip sees its own noisy past, each chunk at its own time (spec causal_rcm 4.2).

    strategy: "random", chunks independent; "same", one time a sample; "fopp", monotone times (spec causal_rcm 2).
    """
    x0, held, chunks = batch["latents"], common.given(batch), student.chunks
    size, index = x0.shape[0], chunks.index(x0.shape[1])
    count = chunks.count(x0.shape[1])
    time_key, noise_key = jax.random.split(key)
    if strategy == "fopp":
        t = flow.fopp_times(time_key, times, size, count)
    else:
        t = flow.sample_times(time_key, times, (size, 1 if strategy == "same" else count))
    t = jnp.broadcast_to(t, (size, count))[:, index]
    noise = jax.random.normal(noise_key, x0.shape)
    x, t_x = common.noised(x0, noise, t, held)
    v = student.velocity(x, t_x, cond)
    return velocity_loss(v, x0, noise, t, weighting, scale, held), {}


def bidirectional(
    student: Bound, batch, cond: Condition, key, *, times: flow.TimeDistribution, weighting: str = "none",
    scale: float = 100.0,
):  # fmt: skip
    """The bidirectional diffusion model itself: one time a sample, every frame sees every frame."""
    x0, held = batch["latents"], common.given(batch)
    time_key, noise_key = jax.random.split(key)
    t = flow.sample_times(time_key, times, (x0.shape[0], 1))
    noise = jax.random.normal(noise_key, x0.shape)
    x, t_x = common.noised(x0, noise, t, held)
    v = student.velocity(x, t_x, cond)
    return velocity_loss(v, x0, noise, t, weighting, scale, held), {}
