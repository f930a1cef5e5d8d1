"""Everything of a run that changes from step to step and lives on the devices."""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from crcm_jax.models.base import Params
from crcm_jax.recipes.base import Player, Progress
from crcm_jax.train.optimizer import Optimizer, OptimizerState


class PlayerState(flax.struct.PyTreeNode):
    """One player: its weights, its optimiser, how many of the iterations so far were its own, and float32 averages of
    its weights, by name."""

    params: Params
    opt: OptimizerState
    updates: jax.Array
    averages: dict[str, Params]


class TrainState(flax.struct.PyTreeNode):
    """One pytree, donated to each step and saved whole.

    bad_samples, skipped_updates: totals since the run began.
    bad_streak: iterations in a row, up to now, that taught nothing.
    """

    iteration: jax.Array
    players: dict[str, PlayerState]
    bad_samples: jax.Array
    skipped_updates: jax.Array
    bad_streak: jax.Array

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return Progress(self.iteration, {name: player.updates for name, player in self.players.items()})


def create(
    params: Mapping[str, Params], players: Mapping[str, Player], optimizers: Mapping[str, Optimizer]
) -> TrainState:
    """The state before iteration 0; everything by player. Copies what it is given: steps donate the state, and the
    trees of a run may start from the same arrays (the critic from the real score)."""

    def copy(tree, dtype=None):
        return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), tree)

    def zero():
        return jnp.zeros((), jnp.int32)

    def player(name):
        own = copy(params[name])
        averages = {average: copy(own, jnp.float32) for average in players[name].averages}
        return PlayerState(own, optimizers[name].init(own), zero(), averages)

    return TrainState(zero(), {name: player(name) for name in players}, zero(), zero(), zero())
