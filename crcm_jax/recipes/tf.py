"""`tf`: teacher forcing, a causal diffusion model that sees clean earlier chunks."""

from __future__ import annotations

from crcm_jax.objectives import diffusion
from crcm_jax.recipes.base import Recipe, Role
from crcm_jax.recipes.options import CAUSAL_DIFFUSION, context_noise
from crcm_jax.recipes.regression import players, prompts_are_dropped
from crcm_jax.recipes.samplers import along_the_ode
from crcm_jax.recipes.turns import Always

RECIPE = Recipe(
    name="tf",
    summary="a causal diffusion model by teacher forcing",
    roles={"student": Role(causal=True, starts_from=("bidirectional", *CAUSAL_DIFFUSION), random=True)},
    players=players(diffusion.teacher_forcing, lambda config: {"context_noise": context_noise(config)}),
    turns=lambda config: Always(),
    sampler=along_the_ode,
    guided=prompts_are_dropped,
    distills=False,
)
