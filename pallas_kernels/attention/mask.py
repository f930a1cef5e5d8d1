"""Masks as descriptions: which keys a query row may see, as at most two key intervals per row and segment.

A mask never becomes an array of pairs. Every description normalises, by arithmetic on row numbers, to `rows`: an int32
array `[4, N]` whose rows are (lo₁, hi₁, lo₂, hi₂). Query n sees the keys [lo₁, hi₁) ∪ [lo₂, hi₂) of that segment; the
two are ordered and disjoint, and an empty interval is any lo = hi. `None` instead of an array says that every query
sees every key. Kernels consume this one form, mostly through `tile_ranges`.

Descriptions made of Python integers normalise to NumPy arrays, so that schedules can be planned while tracing; with
traced fields the same arithmetic runs in JAX.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mask:
    """Base class of mask descriptions."""

    def visible(self, queries: int, own: int, context: int | None) -> Visible:
        """Key intervals for `queries` rows, `own` own keys and `context` context keys (None without context).

        Raises:
          ValueError: where the description does not fit the lengths.
        """
        raise NotImplementedError


class Visible(NamedTuple):
    """Rows `[4, N]` of the own and of the context segment; None where everything is visible."""

    own: Any
    context: Any = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key of both segments."""

    def visible(self, queries, own, context):
        return Visible(None)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("offset",), meta_fields=("first", "chunk", "window", "sink")
)
@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
    """Chunks of tokens; a query sees its own chunk and earlier ones (spec: Causal-rCM section 3.2, block_causal).

    Chunk 0 has `first` tokens, every other one `chunk` tokens. Keys start at chunk 0, queries at chunk `offset`. With
    `window` K > 0 a query of chunk c sees chunks c−K+1 … c, and with `sink` S > 0 also chunks 0 … S−1 up to its own.

    first, chunk: tokens. window, sink: chunks, 0 is off. offset: chunks, an int or a traced int32 scalar; a traced one
    leaves the check that there are enough keys to the caller.
    """

    first: int
    chunk: int
    window: int = 0
    sink: int = 0
    offset: Any = 0

    def visible(self, queries, own, context):
        _check_chunks(self)
        if context is not None:
            raise ValueError("mask: BlockCausal describes the own segment alone: drop context, or use Intervals")
        xp, offset = _namespace(self.offset)
        row = np.arange(queries, dtype=np.int32)
        if xp is np and offset < 0:
            raise ValueError(f"mask: BlockCausal.offset is {offset}: it counts the chunks before the queries")
        if xp is np and offset == 0:
            _check_whole_chunks(self, queries, "queries")
        elif xp is np and queries % self.chunk:
            raise ValueError(
                f"mask: {queries} queries from chunk {offset} on are no whole number of chunks of {self.chunk} tokens: "
                "give whole chunks, or change BlockCausal.chunk"
            )
        chunk = xp.where(offset > 0, offset + row // self.chunk, _chunk_of(self, row))
        end = _start(self, chunk + 1, xp)
        if xp is np and int(end[-1]) > own:
            raise ValueError(
                f"mask: the last query's chunk ends at token {int(end[-1])}, and there are {own} own keys: "
                "give keys up to the end of the queries' last chunk, or lower BlockCausal.offset"
            )
        near = _start(self, xp.maximum(chunk - (self.window - 1), 0), xp) if self.window else xp.zeros_like(end)
        far = xp.minimum(_start(self, np.int32(self.sink), np), end) if self.window and self.sink else 0
        return Visible(_pack(xp, queries, own, (0, far), (near, end)))


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("first", "chunk", "window", "sink"))
@dataclasses.dataclass(frozen=True)
class TeacherForcing(Mask):
    """Noisy target over `[earlier chunks of the clean context ; own chunk]` (spec: Causal-rCM section 3.2).

    Own is the noisy stream itself; a query of chunk c sees own chunk c and the context's chunks 0 … c−1, with `window`
    K only c−K+1 … c−1, and with `sink` S also 0 … S−1. Queries and own keys have equal length; the context has at least
    all chunks but the last.

    first, chunk: tokens. window, sink: chunks, 0 is off.
    """

    first: int
    chunk: int
    window: int = 0
    sink: int = 0

    def visible(self, queries, own, context):
        _check_chunks(self)
        _check_whole_chunks(self, queries, "queries")
        if own != queries:
            raise ValueError(f"mask: TeacherForcing has {queries} queries and {own} own keys: k and v must match q")
        if context is None:
            raise ValueError("mask: TeacherForcing needs the clean stream: pass context=(k, v)")
        chunk = _chunk_of(self, np.arange(queries, dtype=np.int32))
        start, end = _start(self, chunk, np), _start(self, chunk + 1, np)
        if int(start[-1]) > context:
            raise ValueError(
                f"mask: the last chunk sees context up to token {int(start[-1])}, and the context has {context}: "
                "pass the clean stream of the same clip"
            )
        near = _start(self, np.maximum(chunk - (self.window - 1), 0), np) if self.window else np.zeros_like(start)
        far = np.minimum(_start(self, np.int32(self.sink), np), start) if self.window and self.sink else 0
        return Visible(
            _pack(np, queries, own, (start, end), (0, 0)),
            _pack(np, queries, context, (0, far), (np.minimum(near, start), start)),
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=("stop", "start", "sink"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Cached(Mask):
    """A chunk against a cache of fixed size: all own keys, and context keys [0, sink) ∪ [start, stop).

    Keys at `stop` and beyond have not been written yet and are never seen, not even by a longer `sink`.

    stop, start, sink: tokens, ints or traced int32 scalars.
    """

    stop: Any
    start: Any = 0
    sink: Any = 0

    def visible(self, queries, own, context):
        if context is None:
            raise ValueError("mask: Cached describes a cache: pass it as context=(k, v)")
        xp, stop, start, sink = _namespace(self.stop, self.start, self.sink)
        if xp is np and not (start >= 0 and sink >= 0 and 0 <= stop <= context):
            raise ValueError(
                f"mask: Cached(stop={stop}, start={start}, sink={sink}) does not lie in a context of {context} tokens"
            )
        return Visible(None, _pack(xp, queries, context, (0, xp.minimum(sink, stop)), (start, stop)))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("own", "context"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Intervals(Mask):
    """Any union of up to two key intervals per query row and segment.

    own, context: None (every key), or a tuple of up to two pairs (lo, hi): query n sees the keys lo[n] ≤ j < hi[n]. lo
    and hi are int32 arrays `[N]` or scalars, concrete or traced; `()` sees nothing.
    """

    own: Any = None
    context: Any = None

    def visible(self, queries, own, context):
        if context is None and self.context is not None:
            raise ValueError("mask: Intervals.context is set and there is no context: pass context=(k, v)")
        return Visible(
            _rows_from_pairs(self.own, queries, own, "own"),
            None if context is None else _rows_from_pairs(self.context, queries, context, "context"),
        )


def is_static(mask: Mask) -> bool:
    """Whether a mask is made of Python integers, so that it hashes and its rows are known while tracing."""
    return all(isinstance(leaf, (int, np.integer)) for leaf in jax.tree_util.tree_leaves(mask))


def membership(rows, keys):
    """Boolean `[N, M]`: may row n of `rows` `[4, N]` see key number `keys[m]`? For tiles, not for whole sequences."""
    lo1, hi1, lo2, hi2 = (r[:, None] for r in rows)
    return ((keys >= lo1) & (keys < hi1)) | ((keys >= lo2) & (keys < hi2))


def tile_ranges(rows, block_q: int, block_k: int):
    """Key tiles that some row of a query block may see, and those that every row sees wholly.

    rows: int32 `[4, N]`, N a multiple of `block_q` (pad with empty rows).
    Returns two int32 arrays `[4, N / block_q]`: `some` holds (first₁, end₁, first₂, end₂) in tiles of `block_k` keys,
    ordered and disjoint; `every` holds within each of the two the part (first, end) that needs no masking, empty as
    first = end.
    """
    xp = np if isinstance(rows, np.ndarray) else jnp
    rows = rows.reshape(4, -1, block_q)
    big = np.iinfo(np.int32).max
    some: list[Any] = []
    every: list[Any] = []
    for lo, hi in ((rows[0], rows[1]), (rows[2], rows[3])):
        empty = lo >= hi
        first = xp.where(empty, big, lo).min(axis=1) // block_k
        end = -(-xp.where(empty, 0, hi).max(axis=1) // block_k)
        first = xp.minimum(first, end)
        if some:
            first = xp.maximum(first, xp.minimum(some[1], end))
        inner_first = xp.clip(-(-lo.max(axis=1) // block_k), first, end)
        inner_end = xp.clip(hi.min(axis=1) // block_k, inner_first, end)
        inner_end = xp.where(empty.any(axis=1), inner_first, inner_end)
        some += [first, end]
        every += [inner_first, inner_end]
    return xp.stack(some).astype(np.int32), xp.stack(every).astype(np.int32)


def _namespace(*values):
    """NumPy and int32 scalars where all values are concrete Python integers, else jax.numpy."""
    if all(isinstance(value, (int, np.integer)) for value in values):
        return np, *(np.int32(value) for value in values)
    return jnp, *(jnp.asarray(value, jnp.int32) for value in values)


def _check_chunks(mask):
    if mask.first < 1 or mask.chunk < 1:
        raise ValueError(f"mask: {mask}: first and chunk are lengths in tokens: use at least 1")
    if mask.window < 0 or mask.sink < 0:
        raise ValueError(f"mask: {mask}: window and sink count chunks: use 0 to switch one off")


def _check_whole_chunks(mask, tokens, name):
    rest = tokens - mask.first
    if rest < 0 or rest % mask.chunk:
        raise ValueError(
            f"mask: {tokens} {name} are not a first chunk of {mask.first} and whole chunks of {mask.chunk} tokens: "
            "change the length, or the mask's first / chunk"
        )


def _chunk_of(mask, token):
    return np.where(token < mask.first, 0, 1 + (token - mask.first) // mask.chunk).astype(np.int32)


def _start(mask, chunk, xp):
    return xp.where(chunk > 0, mask.first + (chunk - 1) * mask.chunk, 0)


def _pack(xp, queries, keys, first, second):
    """Rows `[4, queries]` from two intervals, made ordered, disjoint and inside [0, keys)."""
    lo1, hi1, lo2, hi2 = (
        xp.broadcast_to(xp.clip(xp.asarray(x, np.int32), 0, keys), (queries,)) for x in (*first, *second)
    )
    swap = (lo2 < lo1) & (lo2 < hi2) | (lo1 >= hi1)
    lo1, hi1, lo2, hi2 = (xp.where(swap, a, b) for a, b in ((lo2, lo1), (hi2, hi1), (lo1, lo2), (hi1, hi2)))
    hi1 = xp.maximum(lo1, hi1)
    lo2 = xp.maximum(lo2, hi1)
    hi2 = xp.maximum(lo2, hi2)
    return xp.stack([lo1, hi1, lo2, hi2]).astype(np.int32)


def _rows_from_pairs(pairs, queries, keys, name):
    if pairs is None:
        return None
    if len(pairs) > 2 or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"mask: Intervals.{name} takes at most two pairs (lo, hi), each [N] or a scalar")
    for end in (x for pair in pairs for x in pair):
        if np.shape(end) not in ((), (queries,)):
            raise ValueError(f"mask: Intervals.{name} has ends of shape {np.shape(end)}: use [{queries}], one a query")
    pairs = tuple(pairs) + ((0, 0),) * (2 - len(pairs))
    concrete = all(isinstance(x, (int, np.integer, np.ndarray)) for pair in pairs for x in pair)
    return _pack(np if concrete else jnp, queries, keys, *pairs)
