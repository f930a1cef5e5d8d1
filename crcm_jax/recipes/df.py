"""`df`: diffusion forcing, a causal diffusion model that sees noisy earlier chunks."""

from __future__ import annotations

from crcm_jax.objectives import diffusion
from crcm_jax.recipes.base import Recipe, Role
from crcm_jax.recipes.options import CAUSAL_DIFFUSION
from crcm_jax.recipes.regression import players, prompts_are_dropped
from crcm_jax.recipes.samplers import along_the_ode
from crcm_jax.recipes.turns import Always

RECIPE = Recipe(
    name="df",
    summary="a causal diffusion model by diffusion forcing",
    roles={"student": Role(causal=True, starts_from=("bidirectional", *CAUSAL_DIFFUSION), random=True)},
    players=players(diffusion.diffusion_forcing, lambda config: {"strategy": config.objective.strategy}),
    turns=lambda config: Always(),
    sampler=along_the_ode,
    guided=prompts_are_dropped,
    distills=False,
)
