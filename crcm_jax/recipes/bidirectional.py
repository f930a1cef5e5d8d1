"""`bidirectional`: the diffusion model that everything starts from; every frame sees every frame."""

from __future__ import annotations

from crcm_jax.objectives import diffusion
from crcm_jax.recipes.base import Recipe, Role
from crcm_jax.recipes.regression import players, prompts_are_dropped
from crcm_jax.recipes.samplers import at_once
from crcm_jax.recipes.turns import Always

RECIPE = Recipe(
    name="bidirectional",
    summary="a bidirectional diffusion model",
    roles={"student": Role(causal=False, starts_from=("bidirectional",), random=True)},
    players=players(diffusion.bidirectional),
    turns=lambda config: Always(),
    sampler=at_once,
    guided=prompts_are_dropped,
    distills=False,
)
