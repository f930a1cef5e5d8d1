"""SF-DMD: distribution matching on the student's own rollouts (spec causal_rcm 4.5)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax import flow
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.objectives import common
from crcm_jax.sampling.rollout import frozen_rollout, replay, rollout
from crcm_jax.sampling.schedule import RolloutPlan

NORMALISER_FLOOR = 1e-5

_PLAN = RolloutPlan()


class Scores(NamedTuple):
    """The two bidirectional models that DMD compares, of real clips and of the student's own (the critic), and the
    negative prompt of the former's guidance."""

    real: Bound
    fake: Bound
    uncond: Condition | None


@dataclasses.dataclass(frozen=True)
class Matching:
    """The constants of SF-DMD. plan: of rollouts. times: of the noise at which scores are compared, and at which the
    critic learns. guidance: of the real score. at_once: all chunks are replayed in one pass. gather_once: as
    `Network.for_inference` has it."""

    plan: RolloutPlan = _PLAN
    times: flow.TimeDistribution = flow.UniformShift(5.0)
    guidance: float = 5.0
    scale: float = 1.0
    at_once: bool = False
    gather_once: bool = True

    def steps(self, updates, key):
        """How many steps a rollout simulates, by a key of its own: an exit that draws leaves other draws alone."""
        return self.plan.exit.steps(self.plan.schedule, updates, jax.random.fold_in(key, 0))


def dmd_target(x, key, scores: Scores, cond: Condition, matching: Matching, held=None):
    """x − G with G = (x_fake − x_real)/W, W = mean|x − x_real| of the sample; nothing here is differentiated.

    Squared distance to it has gradient 2G in x. Returns (target like x, ‖G‖ per sample).
    """
    x = jax.lax.stop_gradient(x)
    time_key, noise_key = jax.random.split(key)
    t = flow.sample_times(time_key, matching.times, (x.shape[0], 1))
    y, t = common.noised(x, jax.random.normal(noise_key, x.shape), t, held)
    x_fake = flow.to_clean(y, scores.fake.velocity(y, t, cond), t)
    x_real = flow.to_clean(y, scores.real.guided(y, t, cond, scores.uncond, matching.guidance), t)
    w = jnp.maximum(common.sample_mean(jnp.abs(x - x_real), held), NORMALISER_FLOOR)
    g = common.generated((x_fake - x_real) / flow.expand(w, x), held)
    return jax.lax.stop_gradient(x - g), jnp.sqrt(common.sample_sum(jnp.square(g)))


def sf_dmd(student: Bound, batch, cond: Condition, key, *, scores: Scores, updates, matching: Matching = Matching()):
    """The student's loss, differentiated through the last step of every chunk. Returns (losses `[batch]`, metrics).

    `updates` student updates so far choose how many steps are simulated, as the plan's exit says (spec causal_rcm 4.5).
    """
    rollout_key, score_key = jax.random.split(key)
    x0, held, steps = batch["latents"], common.given(batch), matching.steps(updates, key)
    x = rollout(student, cond, rollout_key, matching.plan, steps, x0.shape, x0).samples
    target, norm = dmd_target(x, score_key, scores, cond, matching, held)
    error = common.sample_sum(common.generated(jnp.square(x - target), held))
    return matching.scale * error, {"dmd_norm": norm, "steps": jnp.mean(steps)}


def sf_dmd_replayed(
    student: Bound, batch, cond: Condition, key, weights, *, scores: Scores, updates, matching: Matching = Matching()
):
    """The same losses with their gradient, from a rollout without gradients and a replay of its last steps.

    Returns ((losses `[batch]`, metrics), gradient of Σ_b weights_b·losses_b).
    """
    rollout_key, score_key = jax.random.split(key)
    x0, held, steps, m = batch["latents"], common.given(batch), matching.steps(updates, key), matching
    done = frozen_rollout(student, cond, rollout_key, m.plan, steps, x0.shape, x0, gather_once=m.gather_once)
    target, norm = dmd_target(done.samples, score_key, scores, cond, m, held)
    error, grads = replay(student, cond, done, target, m.scale * weights, at_once=m.at_once, clean=x0)
    return (m.scale * error, {"dmd_norm": norm, "steps": jnp.mean(steps)}), grads


def critic(fake: Bound, batch, cond: Condition, key, *, student: Bound, updates, matching: Matching = Matching()):
    """The fake score's loss: velocity regression, a mean, on fresh rollouts of the student (spec causal_rcm 4.5).

    `updates` critic updates so far choose the number of simulated steps. Returns (losses `[batch]`, metrics).
    """
    rollout_key, time_key, noise_key = jax.random.split(key, 3)
    x0, held, steps, m = batch["latents"], common.given(batch), matching.steps(updates, key), matching
    x = frozen_rollout(student, cond, rollout_key, m.plan, steps, x0.shape, x0, gather_once=m.gather_once).samples
    t = flow.sample_times(time_key, m.times, (x0.shape[0], 1))
    noise = jax.random.normal(noise_key, x0.shape)
    y, t = common.noised(x, noise, t, held)
    v = fake.velocity(y, t, cond)
    return common.sample_mean(jnp.square(v - (noise - x)), held), {"steps": jnp.mean(steps)}
