"""Which axis of the mesh cuts which axis of an array, for every tree of a run, by a table of leaf names.

Each model family has a table of its own (`Network.rules`). Parameters, gradients, averages, every player's moments and
master weights, and frozen networks have the same leaf names, so that the same rules place them all.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Table = tuple[tuple[str, P], ...]
"""(regular expression, how that leaf is cut); the first that matches the end of a leaf's name, others stay whole."""

_PIECES = re.compile(r"players/[^/]+/(averages|opt)/")
"""What of a train state only an update reads."""

_ROWS = 16
"""Of how many rows or columns a piece is a multiple, as TPUs' tiles of bfloat16 are: sums are scattered into such
pieces, but made whole on every device to be cut into others."""


def union(tables: Iterable[Table]) -> Table:
    """The rules of several networks in one table."""
    return tuple(dict.fromkeys(rule for table in tables for rule in table))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How trees of arrays lie on a mesh.

    A leaf of one layer, `…/blocks/0/self_attn/q/kernel`, is cut as its layer is within the stack. What would be cut in
    pieces is cut over context too where fsdp cuts it and `_ROWS` allows, as gradients are, averages and optimisers.
    Weights are not: each device multiplies its tokens with all of them.
    """

    mesh: Mesh
    table: Table

    def spec(self, name: str, shape: tuple[int, ...], *, pieces: bool = False) -> tuple[P, str | None]:
        """(how the leaf called `name` is cut, why an axis that a rule would cut is whole instead, or None)."""
        stacked = re.sub(r"(^|/)blocks/\d+/", r"\1blocks/", name)
        rule = next((rule for pattern, rule in self.table if re.search(rf"(^|/){pattern}$", stacked)), P())
        rule = rule if stacked == name else rule[1:]
        further = self.mesh.shape["context"] if pieces or _PIECES.match(name) else 1
        axes, reason = [], None
        for length, axis in zip(shape, rule):
            parts = 1 if axis is None else self.mesh.shape[axis]
            if length % parts:
                reason, axis = f"{name} {list(shape)}: {length} does not divide over {axis} = {parts}", None
            elif axis == "fsdp" and further > 1 and length % (parts * further * _ROWS) == 0:
                axis, parts = ("fsdp", "context") if parts > 1 else "context", parts * further
            axes.append(axis if parts > 1 else None)
        return P(*axes), reason

    def shardings(self, tree: Any, say: Callable[[str], None] | None = None, *, pieces: bool = False) -> Any:
        """A `NamedSharding` for every leaf of `tree` (arrays, or anything with a shape), in its structure.

        say: is told, in one line, of every leaf that stays whole because it does not divide.
        """

        def place(path, leaf):
            where, reason = self.spec(leaf_name(path), leaf.shape, pieces=pieces)
            if reason and say:
                say(f"replicated: {reason}")
            return NamedSharding(self.mesh, where)

        return jax.tree_util.tree_map_with_path(place, tree)

    def abstract(self, tree: Any) -> Any:
        """Shapes, types and shardings of `tree`: what to load into, or to compile for."""
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, self.shardings(tree))

    def in_pieces(self, tree: Any) -> Any:
        """Parameters, or what is shaped like them, within a program, cut as an update reads them."""
        if self.mesh.size == 1:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree, pieces=True))


def leaf_name(path) -> str:
    """A leaf's name as rules see it, `blocks/self_attn/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def device_bytes(tree: Any) -> int:
    """Bytes that a tree of arrays, or of shapes with shardings, takes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
