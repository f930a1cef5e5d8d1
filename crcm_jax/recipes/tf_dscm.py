"""`tf_dscm`: both consistency losses, discrete and continuous, added up."""

from __future__ import annotations

from crcm_jax.recipes import tf_dcm, tf_scm
from crcm_jax.recipes.base import Player, Recipe, gradient_of
from crcm_jax.recipes.combine import summed
from crcm_jax.recipes.options import averages
from crcm_jax.recipes.samplers import in_few_steps
from crcm_jax.recipes.turns import Always


def _players(config, networks):
    gradient = summed([gradient_of(tf_dcm.loss(config)), gradient_of(tf_scm.loss(config))])
    return {"student": Player(gradient, averages=averages(config))}


RECIPE = Recipe(
    name="tf_dscm",
    summary="a few-step student by discrete- and continuous-time consistency under teacher forcing",
    roles=tf_dcm.ROLES,
    players=_players,
    turns=lambda config: Always(),
    sampler=in_few_steps,
    guided=lambda config: True,
)
