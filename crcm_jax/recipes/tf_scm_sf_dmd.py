"""`tf_scm_sf_dmd`: continuous-time consistency and, once its tangent is warm, distribution matching beside it."""

from __future__ import annotations

from crcm_jax.recipes import sf_dmd, tf_scm
from crcm_jax.recipes.base import Player, Recipe, gradient_of
from crcm_jax.recipes.combine import after
from crcm_jax.recipes.options import averages
from crcm_jax.recipes.samplers import in_few_steps
from crcm_jax.recipes.tf_dcm import ROLES as FORWARD
from crcm_jax.recipes.turns import Alternate


def _players(config, networks):
    forward = gradient_of(tf_scm.loss(config, by_chunk=True))
    student = after(config.objective.warmup, forward, sf_dmd.student(config))
    return {
        "student": Player(student, averages=averages(config)),
        "critic": Player(sf_dmd.critic(config), optim="critic_optim"),
    }


RECIPE = Recipe(
    name="tf_scm_sf_dmd",
    summary="a streaming student by continuous-time consistency and distribution matching together",
    roles={"student": sf_dmd.ROLES["student"], "teacher": FORWARD["teacher"], **sf_dmd.ROLES},
    players=_players,
    turns=lambda config: Alternate(config.dmd.student_update_freq, alone=config.objective.warmup),
    sampler=in_few_steps,
    guided=lambda config: True,
)
