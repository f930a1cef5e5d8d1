"""How the results of recipes are meant to make clips: the right sampler of each kind of model, as configured."""

from __future__ import annotations

from crcm_jax.recipes.options import rollout_plan
from crcm_jax.sampling import Few, Ode, Whole


def at_once(config) -> tuple[Whole, float]:
    """Of a bidirectional diffusion model."""
    return Whole("euler", config.sample.ode_steps, shift=3.0, sigma_max=1600.0), config.sample.guidance


def along_the_ode(config) -> tuple[Ode, float]:
    """Of a causal diffusion model."""
    return Ode(config.sample.ode_steps), config.sample.guidance


def in_few_steps(config) -> tuple[Few, float]:
    """Of a distilled student, which carries its guidance within."""
    plan = rollout_plan(config)
    return Few(plan.schedule, plan.context), 1.0
