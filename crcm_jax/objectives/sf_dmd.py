"""SF-DMD: distribution matching on the student's own rollouts (spec causal_rcm 4.5)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition, Network
from crcm_jax.models.guidance import guided_velocity
from crcm_jax.objectives import common
from crcm_jax.sampling.rollout import frozen_rollout, replay, rollout
from crcm_jax.sampling.schedule import StepPlan

NORMALISER_FLOOR = 1e-5


class Scores(NamedTuple):
    """The two bidirectional networks that DMD compares, with their parameters."""

    network: Network
    real: object
    critic_network: Network
    critic: object


def dmd_target(x, key, scores: Scores, cond: Condition, uncond, *, times: flow.TimeDistribution, guidance: float):
    """x − G with G = (x_fake − x_real)/W, W = mean|x − x_real| of the sample; nothing here is differentiated.

    Squared distance to it has gradient 2G in x. Returns (target like x, ‖G‖ per sample).
    """
    x = jax.lax.stop_gradient(x)
    time_key, noise_key = jax.random.split(key)
    t = flow.sample_times(time_key, times, (x.shape[0], 1))
    y = flow.interpolate(x, jax.random.normal(noise_key, x.shape), t)
    x_fake = flow.to_clean(y, scores.critic_network.velocity(scores.critic, y, t, cond), t)
    x_real = flow.to_clean(y, guided_velocity(scores.network, scores.real, y, t, cond, uncond, guidance), t)
    w = jnp.maximum(common.sample_mean(jnp.abs(x - x_real)), NORMALISER_FLOOR)
    g = (x_fake - x_real) / flow.expand(w, x)
    return jax.lax.stop_gradient(x - g), jnp.sqrt(common.sample_sum(jnp.square(g)))


def sf_dmd(
    network: Network, params, batch, cond: Condition, key, *,
    scores: Scores, uncond, updates, plan: StepPlan, chunks: ChunkPattern,
    times: flow.TimeDistribution = flow.UniformShift(5.0), guidance: float = 5.0, scale: float = 1.0,
):  # fmt: skip
    """The student's loss, differentiated through the last step of every chunk. Returns (losses `[batch]`, metrics).

    `updates` student updates so far choose the number of simulated steps, cycling 1, 2, … (spec causal_rcm 4.5).
    """
    rollout_key, score_key = jax.random.split(key)
    steps = plan.simulated_steps(updates)
    x = rollout(network, params, cond, rollout_key, plan, steps, batch["latents"].shape, chunks).samples
    target, norm = dmd_target(x, score_key, scores, cond, uncond, times=times, guidance=guidance)
    return scale * common.sample_sum(jnp.square(x - target)), {"dmd_norm": norm, "steps": steps}


def sf_dmd_replayed(
    network: Network, params, batch, cond: Condition, key, weights, *,
    scores: Scores, uncond, updates, plan: StepPlan, chunks: ChunkPattern,
    times: flow.TimeDistribution = flow.UniformShift(5.0), guidance: float = 5.0, scale: float = 1.0,
    at_once: bool = False, gather_once: bool = True,
):  # fmt: skip
    """The same losses with their gradient, from a rollout without gradients and a replay of its last steps, chunk by
    chunk or all `at_once`. gather_once: as `WanTransformer.for_many_passes` has it.

    Returns ((losses `[batch]`, metrics), gradient of Σ_b weights_b·losses_b).
    """
    rollout_key, score_key = jax.random.split(key)
    steps = plan.simulated_steps(updates)
    done = frozen_rollout(
        network, params, cond, rollout_key, plan, steps, batch["latents"].shape, chunks, gather_once=gather_once
    )
    target, norm = dmd_target(done.samples, score_key, scores, cond, uncond, times=times, guidance=guidance)
    error, grads = replay(network, params, cond, done, target, scale * weights, chunks, at_once=at_once)
    return (scale * error, {"dmd_norm": norm, "steps": steps}), grads


def critic(
    network: Network, params, batch, cond: Condition, key, *,
    student_network: Network, student, updates, plan: StepPlan, chunks: ChunkPattern,
    times: flow.TimeDistribution = flow.UniformShift(5.0), gather_once: bool = True,
):  # fmt: skip
    """The fake score's loss: velocity regression, a mean, on fresh rollouts of the student (spec causal_rcm 4.5).

    `updates` critic updates so far choose the number of simulated steps. Returns (losses `[batch]`, metrics).
    """
    rollout_key, time_key, noise_key = jax.random.split(key, 3)
    steps = plan.simulated_steps(updates)
    shape = batch["latents"].shape
    done = frozen_rollout(
        student_network, student, cond, rollout_key, plan, steps, shape, chunks, gather_once=gather_once
    )
    x = done.samples
    t = flow.sample_times(time_key, times, (shape[0], 1))
    noise = jax.random.normal(noise_key, shape)
    v = network.velocity(params, flow.interpolate(x, noise, t), t, cond)
    return common.sample_mean(jnp.square(v - (noise - x))), {"steps": steps}
