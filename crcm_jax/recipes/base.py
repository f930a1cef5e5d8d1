"""What a recipe is: the networks that it needs, who learns from which loss and when, and how the result samples.

A declaration says all that the rest of the house asks of a training type; nothing else knows recipes by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from crcm_jax.models.base import Condition, Network, Params
from crcm_jax.models.bound import Bound
from crcm_jax.parallel.rules import Table, union
from crcm_jax.recipes.turns import Turns
from crcm_jax.sampling import Solver, Whole

Batch = dict[str, Any]
"""`latents` `[batch, frame, height, width, channel]` and `prompt`, a tree `[batch, …]`, float32; where the data have
them, `frames`, a dict of `[batch, frame, …]`, and `given`, `[batch, frame]` booleans, as in `models.base.Condition`."""

Losses = tuple[jax.Array, dict[str, jax.Array]]
"""(one loss a sample `[batch]`, metrics: each a scalar, or one number a sample `[batch]`)."""


class Progress(NamedTuple):
    """How far a run is: int32 scalars, traced, so that no step count recompiles a step. updates: of each player."""

    iteration: jax.Array
    updates: dict[str, jax.Array]


class Nets(flax.struct.PyTreeNode):
    """The networks that a loss reads, by role; a player's average as `player.average`. uncond: the negative prompt, of
    one row, or None where no loss of the recipe looks at one."""

    bound: dict[str, Bound]
    uncond: Condition | None = None

    def __getitem__(self, role: str) -> Bound:
        return self.bound[role]

    def with_params(self, role: str, params: Params) -> Nets:
        """The same with other parameters of one role."""
        return self.replace(bound={**self.bound, role: self.bound[role].replace(params=params)})


LossFn = Callable[[Nets, Batch, jax.Array, Progress], Losses]
"""`(nets, batch, key, progress) -> losses`; pure."""

GradFn = Callable[[Nets, Batch, jax.Array, Progress, jax.Array], tuple[Losses, Params]]
"""`(nets, batch, key, progress, weights) -> (losses, Σ_b weights_b·∇losses_b)` in the player's parameters."""


def gradient_of(loss: LossFn, player: str = "student") -> GradFn:
    """The plain way from a loss to its gradient: one reverse pass over the weighted sum of the samples' losses."""

    def grad_fn(nets, batch, key, progress, weights):
        def total(params):
            losses, metrics = loss(nets.with_params(player, params), batch, key, progress)
            # A weight of zero removes a sample even where its loss is not finite.
            return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0)), (losses, metrics)

        grads, aux = jax.grad(total, has_aux=True)(nets[player].params)
        return aux, grads

    return grad_fn


class Average(Protocol):
    """A law by which parameters are averaged over a player's updates. Hashable."""

    def update(self, average: Params, params: Params, index: jax.Array) -> Params:
        """The float32 average after the player's update number `index` (from 0) has made `params`."""


@dataclasses.dataclass(frozen=True)
class Role:
    """A network of a recipe.

    causal: over the run's chunks; otherwise bidirectional. starts_from: the recipes whose weights can play the role.
    random: it may also begin with random weights. like: the role whose weights it takes where it is given none.
    """

    causal: bool
    starts_from: tuple[str, ...]
    random: bool = False
    like: str | None = None


@dataclasses.dataclass(frozen=True)
class Player:
    """A role that learns. optim: the section of the configuration that holds its optimiser. averages: by name; losses
    read one as `player.name`."""

    gradient: GradFn
    optim: str = "optim"
    averages: Mapping[str, Average] = dataclasses.field(default_factory=dict)


PlayersFn = Callable[[Any, Mapping[str, Network]], dict[str, Player]]
"""`(config, networks by role) -> players by role`."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training type, declared.

    roles: by name; "student" is what the recipe makes, and what is sampled and handed on.
    players: who learns, and from what. turns: whose turn an iteration is.
    sampler: how its result makes clips, `(config) -> (sampler, guidance)`.
    guided: whether a loss looks at the negative prompt, as the configuration has it.
    distills: whether its result makes clips in few steps, with guidance within.
    needs: what the data must hold. summary: one line for people, on model cards.
    """

    name: str
    summary: str
    roles: Mapping[str, Role]
    players: PlayersFn
    turns: Callable[[Any], Turns]
    sampler: Callable[[Any], tuple[Solver | Whole, float]]
    guided: Callable[[Any], bool]
    distills: bool = True
    needs: frozenset[str] = frozenset({"latents"})

    @property
    def causal(self) -> bool:
        """Whether its result streams."""
        return self.roles["student"].causal

    def mismatch(self, sampler: Solver | Whole) -> str | None:
        """One sentence where its result is not made for `sampler`: a student along an ODE, a diffusion model in few
        steps; None where the two belong together."""
        if sampler.distilled == self.distills:
            return None
        made = f"this model was trained as {self.name}"
        if self.distills:
            return f"{made}, to jump in few steps, and is no diffusion model: along an ODE it is off; use --steps"
        return f"{made}, a diffusion model, of which few steps make a blur: use --ode"


@dataclasses.dataclass(frozen=True)
class Training:
    """A recipe with a configuration: what a run does."""

    recipe: Recipe
    networks: Mapping[str, Network]
    players: Mapping[str, Player]
    turns: Turns

    @property
    def reads(self) -> tuple[str, ...]:
        """The roles that are read and not trained."""
        return tuple(role for role in self.recipe.roles if role not in self.players)

    @property
    def rules(self) -> Table:
        """How a mesh cuts every network of the run."""
        return union(network.rules for network in self.networks.values())
