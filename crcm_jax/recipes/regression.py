"""What the recipes of stage 1 share: a student that regresses velocities, and prompts dropped now and then."""

from __future__ import annotations

from collections.abc import Callable

import jax

from crcm_jax import flow
from crcm_jax.objectives import common
from crcm_jax.recipes.base import Player, PlayersFn, gradient_of
from crcm_jax.recipes.options import averages


def players(objective: Callable, options: Callable = lambda config: {}) -> PlayersFn:
    """A student that learns by `objective`. options: of the configuration, what the objective takes of its own."""

    def make(config, networks):
        o = config.objective
        constants = {"times": flow.time_distribution(**o.times), "weighting": o.weighting, "scale": o.scale}
        constants |= options(config)

        def loss(nets, batch, key, progress):
            drop_key, key = jax.random.split(key)
            cond = common.drop_prompts(drop_key, batch, nets.uncond, o.prompt_dropout)
            return objective(nets["student"], batch, cond, key, **constants)

        return {"student": Player(gradient_of(loss), averages=averages(config))}

    return make


def prompts_are_dropped(config) -> bool:
    """Whether the loss looks at the negative prompt."""
    return bool(config.objective.prompt_dropout)
