"""Stage 1: diffusion. Teacher forcing (`tf`), diffusion forcing (`df`) and the bidirectional model they start from.

All three regress the velocity v* = ε − x0 (spec causal_rcm 4.1, 4.2).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition, Network
from crcm_jax.objectives import common

WEIGHTINGS: dict[str, Callable] = {"none": jnp.ones_like, "gaussian_bell": flow.gaussian_bell}
STRATEGIES = ("random", "same", "fopp")


def velocity_loss(v, x0, noise, t, weighting: str, scale: float):
    """scale · Σ_frames w(t)·mean_{height, width, channel}(v − (ε − x0))², one value a sample."""
    error = common.frame_mean(jnp.square(v - (noise - x0)))
    return scale * jnp.sum(WEIGHTINGS[weighting](t) * error, 1)


def teacher_forcing(
    network: Network, params, batch, cond: Condition, key, *,
    times: flow.TimeDistribution, chunks: ChunkPattern, context_noise=common.ContextNoise(),
    weighting: str = "gaussian_bell", scale: float = 100.0,
):  # fmt: skip
    """`tf`: one time a sample, clean context (spec causal_rcm 4.1). Returns (losses `[batch]`, metrics)."""
    x0 = batch["latents"]
    time_key, noise_key, context_key = jax.random.split(key, 3)
    t = flow.sample_times(time_key, times, (x0.shape[0], 1))
    noise = jax.random.normal(noise_key, x0.shape)
    context = common.context(context_key, x0, chunks, context_noise)
    v = network.velocity(params, flow.interpolate(x0, noise, t), t, cond, context=context)
    return velocity_loss(v, x0, noise, t, weighting, scale), {}


def diffusion_forcing(
    network: Network, params, batch, cond: Condition, key, *,
    times: flow.TimeDistribution, chunks: ChunkPattern, strategy: str = "random",
    weighting: str = "none", scale: float = 100.0,
):  # fmt: skip
    """`df`: a noisy clip sees its own noisy past, each chunk at its own time (spec causal_rcm 4.2).

    strategy: "random", chunks independent; "same", one time a sample; "fopp", monotone times (spec causal_rcm 2).
    """
    x0 = batch["latents"]
    size, index = x0.shape[0], chunks.index(x0.shape[1])
    count = chunks.count(x0.shape[1])
    time_key, noise_key = jax.random.split(key)
    if strategy == "fopp":
        t = flow.fopp_times(time_key, times, size, count)
    else:
        t = flow.sample_times(time_key, times, (size, 1 if strategy == "same" else count))
    t = jnp.broadcast_to(t, (size, count))[:, index]
    noise = jax.random.normal(noise_key, x0.shape)
    v = network.velocity(params, flow.interpolate(x0, noise, t), t, cond)
    return velocity_loss(v, x0, noise, t, weighting, scale), {}


def bidirectional(
    network: Network, params, batch, cond: Condition, key, *,
    times: flow.TimeDistribution, weighting: str = "none", scale: float = 100.0,
):  # fmt: skip
    """The bidirectional diffusion model itself: one time a sample, every frame sees every frame."""
    x0 = batch["latents"]
    time_key, noise_key = jax.random.split(key)
    t = flow.sample_times(time_key, times, (x0.shape[0], 1))
    noise = jax.random.normal(noise_key, x0.shape)
    v = network.velocity(params, flow.interpolate(x0, noise, t), t, cond)
    return velocity_loss(v, x0, noise, t, weighting, scale), {}
