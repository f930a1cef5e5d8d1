"""Which axis of the mesh cuts which axis of an array: one short table for the Wan family, for every tree of a run.

Parameters, gradients, averages, both optimisers' moments and master weights, teachers and critic have the same leaf
names, so that the same rules place them all.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

if TYPE_CHECKING:
    from crcm_jax.objectives.algorithm import Algorithm, GradFn

_ATTENTION = r"blocks/(self|cross)_attn/"

RULES: tuple[tuple[str, P], ...] = (
    # Stacked layers: the first axis is the scan's and stays whole, so that a step of the scan gathers one layer.
    (_ATTENTION + r"(q|k|v|k_img|v_img)/kernel", P(None, "fsdp", "tensor")),
    (_ATTENTION + r"o/kernel", P(None, "tensor", "fsdp")),
    (r"blocks/ffn/up/kernel", P(None, "fsdp", "tensor")),
    (r"blocks/ffn/down/kernel", P(None, "tensor", "fsdp")),
    # What meets a tensor-parallel activation is cut as that is: heads, or feed-forward width.
    (_ATTENTION + r"(q|k|v|k_img|v_img)/bias", P(None, "tensor")),
    (_ATTENTION + r"norm_\w+/scale", P(None, "tensor")),
    (r"blocks/ffn/up/bias", P(None, "tensor")),
    (r"outside/.*kernel", P("fsdp", None)),
)
"""(regular expression, how that leaf is cut); the first that matches the end of a leaf's name, others stay whole."""


_PIECES = re.compile(r"(ema|opt|critic_opt)/")
"""What of a train state only an update reads."""

_ROWS = 16
"""Of how many rows or columns a piece is a multiple, as TPUs' tiles of bfloat16 are: sums are scattered into such
pieces, but made whole on every device to be cut into others."""


def spec(name: str, shape: tuple[int, ...], mesh: Mesh, *, pieces: bool = False) -> tuple[P, str | None]:
    """(how the leaf called `name` is cut, why an axis that `RULES` would cut is whole instead, or None).

    A leaf of one layer, `…/blocks/0/self_attn/q/kernel`, is cut as its layer is within the stack.
    pieces: cut it over context too where fsdp cuts it and `_ROWS` allows, as gradients are, averages and optimisers.
    Weights are not: each device multiplies its tokens with all of them.
    """
    stacked = re.sub(r"(^|/)blocks/\d+/", r"\1blocks/", name)
    rule = next((rule for pattern, rule in RULES if re.search(rf"(^|/){pattern}$", stacked)), P())
    rule = rule if stacked == name else rule[1:]
    further = mesh.shape["context"] if pieces or _PIECES.match(name) else 1
    axes, reason = [], None
    for length, axis in zip(shape, rule):
        parts = 1 if axis is None else mesh.shape[axis]
        if length % parts:
            reason, axis = f"{name} {list(shape)}: {length} does not divide over {axis} = {parts}", None
        elif axis == "fsdp" and further > 1 and length % (parts * further * _ROWS) == 0:
            axis, parts = ("fsdp", "context") if parts > 1 else "context", parts * further
        axes.append(axis if parts > 1 else None)
    return P(*axes), reason


def shardings(tree: Any, mesh: Mesh, say: Callable[[str], None] | None = None, *, pieces: bool = False) -> Any:
    """A `NamedSharding` for every leaf of `tree` (arrays, or anything with a shape), in its structure.

    say: is told, in one line, of every leaf that stays whole because it does not divide. pieces: as `spec` has it.
    """

    def place(path, leaf):
        where, reason = spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh, pieces=pieces)
        if reason and say:
            say(f"replicated: {reason}")
        return NamedSharding(mesh, where)

    return jax.tree_util.tree_map_with_path(place, tree)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Shapes, types and shardings of `tree`: what to load into, or to compile for."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh))


def device_bytes(tree: Any) -> int:
    """Bytes that a tree of arrays, or of shapes with shardings, takes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def in_pieces(tree: Any, mesh: Mesh) -> Any:
    """Parameters, or what is shaped like them, within a program, cut as an update reads them."""
    return tree if mesh.size == 1 else jax.lax.with_sharding_constraint(tree, shardings(tree, mesh, pieces=True))


def cut_gradients(algorithm: Algorithm, mesh: Mesh) -> Algorithm:
    """`algorithm` with its gradients in pieces: summed by reduce-scatter, never held whole."""

    def cut(grad_fn: GradFn) -> GradFn:
        def placed(params, *args):
            result, grads = grad_fn(params, *args)
            return result, in_pieces(grads, mesh)

        return placed

    critic = algorithm.critic
    return dataclasses.replace(algorithm, student=cut(algorithm.student), critic=critic and cut(critic))
