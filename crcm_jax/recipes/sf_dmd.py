"""`sf_dmd`: distribution matching on the student's own rollouts, with a critic that follows the student."""

from __future__ import annotations

from crcm_jax.objectives import sf_dmd
from crcm_jax.objectives.sf_dmd import Scores
from crcm_jax.recipes.base import GradFn, Player, Recipe, Role, gradient_of
from crcm_jax.recipes.options import CAUSAL_DIFFUSION, CONSISTENCY, MATCHING, averages, conditions, matching
from crcm_jax.recipes.samplers import in_few_steps
from crcm_jax.recipes.turns import Alternate

ROLES = {
    "student": Role(causal=True, starts_from=(*CAUSAL_DIFFUSION, *CONSISTENCY, *MATCHING), random=True),
    "real": Role(causal=False, starts_from=("bidirectional",)),
    "critic": Role(causal=False, starts_from=("bidirectional", *MATCHING), like="real"),
}


def student(config) -> GradFn:
    """The student's gradient: through its rollouts, or replayed with the memory of one chunk or clip."""
    constants = matching(config)

    def arguments(nets, batch, progress):
        cond, uncond = conditions(nets, batch)
        scores = Scores(nets["real"], nets["critic"], uncond)
        return cond, {"scores": scores, "updates": progress.updates["student"], "matching": constants}

    def direct(nets, batch, key, progress):
        cond, options = arguments(nets, batch, progress)
        return sf_dmd.sf_dmd(nets["student"], batch, cond, key, **options)

    def replayed(nets, batch, key, progress, weights):
        cond, options = arguments(nets, batch, progress)
        return sf_dmd.sf_dmd_replayed(nets["student"], batch, cond, key, weights, **options)

    return replayed if config.dmd.replayed else gradient_of(direct)


def critic(config) -> GradFn:
    """The fake score's gradient."""
    constants = matching(config)

    def loss(nets, batch, key, progress):
        cond, updates = conditions(nets, batch)[0], progress.updates["critic"]
        options = {"student": nets["student"], "updates": updates, "matching": constants}
        return sf_dmd.critic(nets["critic"], batch, cond, key, **options)

    return gradient_of(loss, "critic")


RECIPE = Recipe(
    name="sf_dmd",
    summary="a streaming student by distribution matching on its own rollouts",
    roles=ROLES,
    players=lambda config, networks: {
        "student": Player(student(config), averages=averages(config)),
        "critic": Player(critic(config), optim="critic_optim"),
    },
    turns=lambda config: Alternate(config.dmd.student_update_freq),
    sampler=in_few_steps,
    guided=lambda config: True,
)
