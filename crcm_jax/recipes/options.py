"""Sections of the configuration that several recipes read, as the objects that losses and samplers take."""

from __future__ import annotations

from crcm_jax import flow, parts
from crcm_jax.models.base import Condition
from crcm_jax.objectives import common
from crcm_jax.objectives.sf_dmd import Matching
from crcm_jax.objectives.tf_dcm import DiscreteTime, Levels
from crcm_jax.objectives.tf_scm import ContinuousTime
from crcm_jax.recipes.averages import Power
from crcm_jax.recipes.base import Average, Batch, Nets
from crcm_jax.sampling.schedule import ContextRule, RolloutPlan, Schedule

CAUSAL_DIFFUSION = ("tf", "df")
CONSISTENCY = ("tf_dcm", "tf_scm", "tf_dscm")
MATCHING = ("sf_dmd", "tf_scm_sf_dmd")
"""Recipes by what their results are, for roles that take any of a kind."""


def averages(config) -> dict[str, Average]:
    """The student's: `ema`, which is what is sampled and handed on."""
    return {"ema": Power(config.ema.rate)}


def conditions(nets: Nets, batch: Batch) -> tuple[Condition, Condition]:
    """A batch's condition, and the same with the negative prompt."""
    return common.condition(batch), common.unconditioned(batch, nets.uncond)


def rollout_plan(config) -> RolloutPlan:
    """Steps and times of each chunk in self-forcing, checked."""
    r = config.rollout
    schedule = Schedule(tuple(r.steps), tuple(tuple(row) for row in r.times))
    return RolloutPlan(schedule, ContextRule(r.noisy_context, r.context_start))


def context_noise(config, *, by_chunk: bool = False) -> common.ContextNoise:
    """How the student's context is noised in teacher forcing (spec causal_rcm 3.4).

    by_chunk: each chunk as its own last step is, which a student that also learns from rollouts sees; otherwise all as
    chunk 0's.
    """
    plan = rollout_plan(config)
    if not plan.context.noisy:
        return common.CLEAN
    count = parts.chunk_pattern(config).count(parts.latent_shape(config)[0]) if by_chunk else 1
    return common.ContextNoise(plan.context.times(plan.schedule, count), plan.context.start)


def discrete_time(config) -> DiscreteTime:
    """The constants of TF-dCM."""
    o = config.objective
    return DiscreteTime(Levels(o.levels, o.skip, o.time_shift), o.guidance, context_noise(config), o.scale)


def continuous_time(config, *, by_chunk: bool = False) -> ContinuousTime:
    """The constants of TF-sCM. by_chunk: as in `context_noise`."""
    o = config.objective
    times, noise = flow.time_distribution(**o.times), context_noise(config, by_chunk=by_chunk)
    return ContinuousTime(times, o.guidance, noise, o.one_pass, o.scale)


def matching(config) -> Matching:
    """The constants of SF-DMD."""
    d = config.dmd
    times = flow.time_distribution(**d.times)
    return Matching(rollout_plan(config), times, d.guidance, d.scale, d.at_once, d.gather_once)
