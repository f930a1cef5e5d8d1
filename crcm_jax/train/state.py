"""Everything of a run that changes from step to step and lives on the devices."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from crcm_jax.models.base import Params
from crcm_jax.objectives.algorithm import Progress
from crcm_jax.train.optimizer import Optimizer, OptimizerState


@flax.struct.dataclass
class TrainState:
    """One pytree, donated to each step and saved whole.

    progress: iteration, and how many of the iterations before it were the student's and the critic's.
    params, ema, opt: the student's weights, their float32 average, its optimiser.
    critic, critic_opt: the second player's, or None.
    bad_samples, skipped_updates: totals since the run began.
    bad_streak: iterations in a row, up to now, that taught nothing.
    """

    progress: Progress
    params: Params
    ema: Params
    opt: OptimizerState
    critic: Params | None
    critic_opt: OptimizerState | None
    bad_samples: jax.Array
    skipped_updates: jax.Array
    bad_streak: jax.Array


def create(
    params: Params,
    optimizer: Optimizer,
    critic: Params | None = None,
    critic_optimizer: Optimizer | None = None,
) -> TrainState:
    """The state before iteration 0. Copies what it is given: steps donate the state, and the trees of a run may start
    from the same arrays (the critic from the real score)."""

    def copy(tree, dtype=None):
        return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), tree)

    def zero():
        return jnp.zeros((), jnp.int32)

    params = copy(params)
    critic = None if critic is None else copy(critic)
    return TrainState(
        progress=Progress(zero(), zero(), zero()),
        params=params,
        ema=copy(params, jnp.float32),
        opt=optimizer.init(params),
        critic=critic,
        critic_opt=None if critic is None else critic_optimizer.init(critic),
        bad_samples=zero(),
        skipped_updates=zero(),
        bad_streak=zero(),
    )
