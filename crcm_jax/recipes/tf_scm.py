"""`tf_scm`: a consistency model of the causal teacher in continuous time; the tangent is one `jax.jvp`."""

from __future__ import annotations

from crcm_jax.objectives.tf_scm import ramp, tf_scm
from crcm_jax.recipes.base import LossFn, Player, Recipe, gradient_of
from crcm_jax.recipes.options import averages, conditions, continuous_time
from crcm_jax.recipes.samplers import in_few_steps
from crcm_jax.recipes.tf_dcm import ROLES
from crcm_jax.recipes.turns import Always


def loss(config, *, by_chunk: bool = False) -> LossFn:
    """The student's loss. by_chunk: as in `options.context_noise`."""
    constants, warmup = continuous_time(config, by_chunk=by_chunk), config.objective.warmup

    def tf_scm_loss(nets, batch, key, progress):
        cond, uncond = conditions(nets, batch)
        r, teacher = ramp(progress.iteration, warmup), nets["teacher"]
        return tf_scm(nets["student"], batch, cond, key, teacher=teacher, uncond=uncond, r=r, constants=constants)

    return tf_scm_loss


RECIPE = Recipe(
    name="tf_scm",
    summary="a few-step student by continuous-time consistency under teacher forcing",
    roles=ROLES,
    players=lambda config, networks: {"student": Player(gradient_of(loss(config)), averages=averages(config))},
    turns=lambda config: Always(),
    sampler=in_few_steps,
    guided=lambda config: True,
)
