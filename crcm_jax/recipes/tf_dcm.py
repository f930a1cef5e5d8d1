"""`tf_dcm`: a consistency model of the causal teacher, at neighbouring times of a grid."""

from __future__ import annotations

from crcm_jax.objectives.tf_dcm import tf_dcm
from crcm_jax.recipes.base import LossFn, Player, Recipe, Role, gradient_of
from crcm_jax.recipes.options import CAUSAL_DIFFUSION, CONSISTENCY, averages, conditions, discrete_time
from crcm_jax.recipes.samplers import in_few_steps
from crcm_jax.recipes.turns import Always

ROLES = {
    "student": Role(causal=True, starts_from=(*CAUSAL_DIFFUSION, *CONSISTENCY), random=True),
    "teacher": Role(causal=True, starts_from=CAUSAL_DIFFUSION),
}


def loss(config) -> LossFn:
    """The student's loss."""
    constants = discrete_time(config)

    def tf_dcm_loss(nets, batch, key, progress):
        cond, uncond = conditions(nets, batch)
        return tf_dcm(nets["student"], batch, cond, key, teacher=nets["teacher"], uncond=uncond, constants=constants)

    return tf_dcm_loss


RECIPE = Recipe(
    name="tf_dcm",
    summary="a few-step student by discrete-time consistency under teacher forcing",
    roles=ROLES,
    players=lambda config, networks: {"student": Player(gradient_of(loss(config)), averages=averages(config))},
    turns=lambda config: Always(),
    sampler=in_few_steps,
    guided=lambda config: True,
)
