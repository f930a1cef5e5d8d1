"""AdamW of spec causal_rcm 7.1: float32 moments, float32 master weights, warm-up over the network's own updates."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crcm_jax.models.base import Params

WARMUP_START = 1e-6
"""Learning rate of the very first update, as a fraction of the final one."""


class OptimizerState(NamedTuple):
    """`count` own updates so far; `adam` optax's state, float32; `master` float32 weights, None where they would only
    repeat float32 parameters."""

    count: jax.Array  # type: ignore[assignment]  # it hides tuple's own `count`, which nothing calls
    adam: Any
    master: Params | None


def _float32(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with decoupled weight decay on *every* parameter, and a learning rate that warms up and then stays.

    lr: final learning rate; update k (from 0) uses lr·(1e-6 + (1 − 1e-6)·min(1, k / warmup)).
    grad_clip: largest global norm of the gradient; 0 switches clipping off.
    """

    lr: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: int = 100
    grad_clip: float = 0.0

    @classmethod
    def from_config(cls, config) -> Optimizer:
        """From `config.optim` or `config.critic_optim`; keys that are not the optimiser's own are left alone."""
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: config[name] for name in fields if config.get(name) is not None})

    def _transform(self) -> optax.GradientTransformation:
        parts = [optax.clip_by_global_norm(self.grad_clip)] if self.grad_clip else []
        parts += [optax.scale_by_adam(self.b1, self.b2, self.eps), optax.add_decayed_weights(self.weight_decay)]
        return optax.chain(*parts)

    def learning_rate(self, count: jax.Array) -> jax.Array:
        """The learning rate of the update that `count` others precede."""
        if not self.warmup:
            return jnp.float32(self.lr)
        # Not optax.linear_schedule: it subtracts from the final rate, and float32 leaves the first one 1 % off.
        done = jnp.minimum(count.astype(jnp.float32) / self.warmup, 1.0)
        return self.lr * (WARMUP_START + (1.0 - WARMUP_START) * done)

    def init(self, params: Params) -> OptimizerState:
        """State before the first update. Bytes per parameter: 8, and 4 more if any are narrower than float32."""
        narrow = any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params))
        master = _float32(params) if narrow else None
        return OptimizerState(jnp.zeros((), jnp.int32), self._transform().init(_float32(params)), master)

    def update(self, grads: Params, state: OptimizerState, params: Params) -> tuple[Params, OptimizerState]:
        """One update: (parameters in their own type, rounded from the float32 master; new state)."""
        weights = params if state.master is None else state.master
        steps, adam = self._transform().update(_float32(grads), state.adam, weights)
        lr = self.learning_rate(state.count)
        weights = jax.tree.map(lambda weight, step: weight - lr * step, weights, steps)
        rounded = jax.tree.map(lambda weight, param: weight.astype(param.dtype), weights, params)
        return rounded, OptimizerState(state.count + 1, adam, None if state.master is None else weights)
