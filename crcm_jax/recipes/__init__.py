"""Training types, one file each; this table is the only registry (docs/add_a_recipe.md)."""

from __future__ import annotations

from crcm_jax import parts
from crcm_jax.errors import UserError
from crcm_jax.models.base import Network
from crcm_jax.recipes import bidirectional, df, sf_dmd, tf, tf_dcm, tf_dscm, tf_scm, tf_scm_sf_dmd
from crcm_jax.recipes.base import Average, Nets, Player, Progress, Recipe, Role, Training
from crcm_jax.sampling import Solver, Whole

RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE
    for module in (bidirectional, tf, df, tf_dcm, tf_scm, tf_dscm, sf_dmd, tf_scm_sf_dmd)
}


def named(name: str) -> Recipe:
    """UserError, one sentence, for a name that is no recipe's."""
    if name not in RECIPES:
        raise UserError(f"training type {name!r} is not one of {', '.join(RECIPES)}")
    return RECIPES[name]


def of(config) -> Recipe:
    """The recipe of a configuration."""
    return named(config.training)


def make(config, mesh=None) -> Training:
    """What a run of `config` does, on `mesh` if given; networks are described, no weights are read."""
    recipe = of(config)
    networks = {role: parts.network(config, role, r.causal, mesh) for role, r in recipe.roles.items()}
    return Training(recipe, networks, recipe.players(config, networks), recipe.turns(config))


def student(config, mesh=None) -> Network:
    """The network that a run of `config` makes."""
    return parts.network(config, "student", of(config).causal, mesh)


def own_sampler(config) -> tuple[Solver | Whole, float]:
    """(sampler, guidance) that the result of a run of `config` is meant for."""
    return of(config).sampler(config)


__all__ = [
    "RECIPES", "Average", "Nets", "Player", "Progress", "Recipe", "Role", "Training", "make", "named", "of",
    "own_sampler", "student",
]  # fmt: skip
