"""Masks as descriptions: which keys a query row may see, as at most two key intervals per row and segment.

A mask never becomes an array of pairs. Every description normalises, by arithmetic on row numbers, to the intervals of
`rows`: one int32 array `[4, N]` a segment, `[B, 4, N]` where batch entries see different keys, or `None`, which says
that every query sees every key.

Descriptions made of Python integers normalise to NumPy arrays, so that schedules can be planned while tracing; with
traced fields the same arithmetic runs in JAX.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.rows import check_batch, of_batch, pack


class Mask:
    """Base class of mask descriptions."""

    entry_rank: ClassVar[int] = 1
    """A field's value with so many axes has one part for each batch entry, along its first."""

    def visible(self, queries: int, own: int, context: int | None) -> Visible:
        """Key intervals for `queries` rows, `own` own keys and `context` context keys (None without context).

        Raises:
          ValueError: where the description does not fit the lengths.
        """
        raise NotImplementedError


class Visible(NamedTuple):
    """`rows` of the own and of the context segment; None where everything is visible."""

    own: Any
    context: Any = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key of both segments."""

    def visible(self, queries, own, context):
        return Visible(None)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("stop", "start", "sink"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Cached(Mask):
    """A chunk against a cache of fixed size: all own keys, and context keys [0, sink) ∪ [start, stop).

    Keys at `stop` and beyond have not been written yet and are never seen, not even by a longer `sink`.

    stop, start, sink: tokens. Ints or traced int32 scalars; or one a batch entry, as int32 arrays `[B]`, concrete or
      traced, or as tuples of ints, which keep a mask static. A caption at the front of the cache whose length differs
      by entry is `sink=lengths`, with `start` where the history begins.
    """

    stop: Any
    start: Any = 0
    sink: Any = 0

    def visible(self, queries, own, context):
        if context is None:
            raise ValueError("mask: Cached describes a cache: pass it as context=(k, v)")
        xp, stop, start, sink = per_entry(self, "stop", "start", "sink")
        if xp is np and not np.all((start >= 0) & (sink >= 0) & (stop >= 0) & (stop <= context)):
            raise ValueError(f"mask: {self} does not lie in a context of {context} tokens")
        return Visible(None, pack(xp, queries, context, (0, xp.minimum(sink, stop)), (start, stop)))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("own", "context"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Intervals(Mask):
    """Any union of up to two key intervals per query row and segment.

    own, context: None (every key), or a tuple of up to two pairs (lo, hi): query n sees the keys lo[n] ≤ j < hi[n]. lo
    and hi are int32 arrays or scalars, concrete or traced: `[N]`, one a query; `[B, N]`, one a batch entry and query;
    `[B, 1]`, one a batch entry. `()` sees nothing.
    """

    entry_rank = 2

    own: Any = None
    context: Any = None

    def visible(self, queries, own, context):
        if context is None and self.context is not None:
            raise ValueError("mask: Intervals.context is set and there is no context: pass context=(k, v)")
        return Visible(
            _rows_from_pairs(self.own, queries, own, "own"),
            None if context is None else _rows_from_pairs(self.context, queries, context, "context"),
        )


def visible_in(arrays, mask: Mask) -> Visible:
    """What a mask lets see in arrays `(q, (k, v), (k, v) of the context or None)`, each `[B, tokens, heads, D]`.

    Raises:
      ValueError: where the mask does not fit their lengths or their batch.
    """
    q, (k, _), context = arrays
    visible = mask.visible(q.shape[1], k.shape[1], None if context is None else context[0].shape[1])
    return Visible(*(of_batch(rows, q.shape[0]) for rows in visible))


def is_static(mask: Mask) -> bool:
    """Whether a mask is made of Python integers, so that it hashes and its rows are known while tracing."""
    return all(isinstance(leaf, (int, np.integer)) for leaf in jax.tree_util.tree_leaves(mask))


def entries(mask: Mask, batch: int):
    """The values that a mask holds, for whoever cuts a batch up.

    Returns (values, structure, by_entry): `structure.unflatten(values)` is the mask, and by_entry[i] tells whether
    values[i] is an array or tuple with one part for each batch entry, along its first axis.

    Raises:
      ValueError: where such an array is for another batch.
    """

    def tuple_of_entries(x):
        return mask.entry_rank == 1 and isinstance(x, tuple)

    values, structure = jax.tree.flatten(mask, is_leaf=tuple_of_entries)
    by_entry = [isinstance(x, tuple) or np.ndim(x) >= mask.entry_rank for x in values]
    for value in (x for x, each in zip(values, by_entry) if each):
        check_batch(len(value), batch)
    return values, structure, by_entry


def namespace(*values):
    """NumPy and int32 values where all are concrete integers, arrays or tuples of such, else jax.numpy."""
    if all(isinstance(leaf, (int, np.integer, np.ndarray)) for leaf in jax.tree.leaves(values)):
        return np, *(np.int32(value) for value in values)
    return jnp, *(jnp.asarray(value, jnp.int32) for value in values)


def per_entry(mask, *names):
    """The namespace of a mask's fields, and each: a scalar, or `[B, 1]` where it has one value a batch entry."""
    kind = type(mask).__name__
    xp, *values = namespace(*(getattr(mask, name) for name in names))
    for name, value in zip(names, values):
        if value.ndim > 1 or value.size == 0:
            raise ValueError(f"mask: {kind}.{name} has shape {value.shape}: use a scalar, or [B], one a batch entry")
    batches = {len(value) for value in values if value.ndim}
    if len(batches) > 1:
        raise ValueError(f"mask: {kind} has values for {' and for '.join(map(str, sorted(batches)))} batch entries")
    return xp, *(value[:, None] if value.ndim else value for value in values)


def _rows_from_pairs(pairs, queries, keys, name):
    if pairs is None:
        return None
    if len(pairs) > 2 or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"mask: Intervals.{name} takes at most two pairs (lo, hi), each [N], [B, N], [B, 1] or a scalar"
        )
    shapes = [np.shape(x) for pair in pairs for x in pair]
    batches = {shape[0] for shape in shapes if len(shape) == 2}
    for shape in shapes:
        if shape not in ((), (queries,)) and (len(shape) != 2 or shape[1] not in (1, queries)):
            raise ValueError(
                f"mask: Intervals.{name} has ends of shape {shape}: use [{queries}], one a query, or [B, {queries}] or "
                "[B, 1], one a batch entry"
            )
    if len(batches) > 1:
        raise ValueError(
            f"mask: Intervals.{name} has ends for {' and for '.join(map(str, sorted(batches)))} batch entries"
        )
    pairs = tuple(pairs) + ((0, 0),) * (2 - len(pairs))
    concrete = all(isinstance(x, (int, np.integer, np.ndarray)) for pair in pairs for x in pair)
    return pack(np if concrete else jnp, queries, keys, *pairs)
