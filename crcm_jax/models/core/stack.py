"""A stack of equal layers: scanned or written out, and what its backward pass computes again.

Whatever belongs to the layers, parameters, caches, prompts, comes either stacked, with the layer as its arrays' first
axis, or as a list with an entry a layer. Both are the same thing, and a stack takes either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from crcm_jax.models.core.remat import remat


def is_list(x: Any) -> bool:
    """Whether a part of a tree is a list with an entry a layer."""
    return isinstance(x, list)


def listed(stacked: Any) -> list[Any]:
    """A tree of stacked arrays → a list of one tree a layer."""
    leaves, structure = jax.tree.flatten(stacked)
    return [jax.tree.unflatten(structure, layer) for layer in zip(*map(jnp.unstack, leaves))]


def stacked(xs: Any) -> Any:
    """A tree with lists of layers in it → the same of stacked arrays."""
    return jax.tree.map(
        lambda x: jax.tree.map(lambda *layers: jnp.stack(layers), *x) if is_list(x) else x, xs, is_leaf=is_list
    )


def entry(xs: Any, layer: int) -> Any:
    """What belongs to one layer of a tree of lists and stacked arrays."""
    return jax.tree.map(lambda x: x[layer], xs, is_leaf=is_list)


@dataclasses.dataclass(frozen=True)
class Stack:
    """layers: how many. unrolled: written out in the program, instead of a scan: longer to compile, and no pass cuts
    each layer's weights out of a stack (docs/wan_speed.md). remat: a name of `remat`. gathers: whether layers gather
    weights that lie cut over devices.
    """

    layers: int
    unrolled: bool
    remat: str
    gathers: bool

    def run(self, layer: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
        """`carry, y = layer(carry, x)` through the stack. Returns (carry, ys), the latter as the stack itself is:
        stacked, or a list if it is unrolled."""
        layer = remat(layer, self.remat, gathers=self.gathers)
        if not self.unrolled:
            return jax.lax.scan(layer, carry, stacked(xs))
        # Traced and lowered once: kernels' lowering is what takes long.
        ys, layer = [], jax.jit(layer)
        for i in range(self.layers):
            carry, y = layer(carry, entry(xs, i))
            ys.append(y)
        return carry, ys
