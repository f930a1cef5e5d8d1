"""Which keys a query row may see, as arrays: the one form that every mask normalises to and every kernel consumes.

`rows` is an int32 array `[4, N]` whose rows are (lo₁, hi₁, lo₂, hi₂). Query n sees the keys [lo₁, hi₁) ∪ [lo₂, hi₂) of
a segment; the two are ordered and disjoint, and an empty interval is any lo = hi. Where batch entries see different
keys, it is `[B, 4, N]`: entry b has `rows[b]`. Rows that a whole batch shares have two axes, and plans one fewer. NumPy
arrays are known while tracing, so that schedules can be planned with them; others are planned at run time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def everything(queries: int, keys: int):
    """Rows of queries that see every key."""
    return np.broadcast_to(np.array([[0], [keys], [keys], [keys]], np.int32), (4, queries))


def pack(xp, queries: int, keys: int, first, second):
    """Rows from two intervals, made ordered, disjoint and inside [0, keys).

    first, second: pairs (lo, hi) of scalars or arrays `[N]`, `[B, N]` or `[B, 1]`; rows are `[B, 4, N]` where one has
    two axes.
    """
    entries = {np.shape(x)[0] for x in (*first, *second) if np.ndim(x) == 2}
    shape = (*entries, queries)
    lo1, hi1, lo2, hi2 = (xp.broadcast_to(xp.clip(xp.asarray(x, np.int32), 0, keys), shape) for x in (*first, *second))
    swap = (lo2 < lo1) & (lo2 < hi2) | (lo1 >= hi1)
    lo1, hi1, lo2, hi2 = (xp.where(swap, a, b) for a, b in ((lo2, lo1), (hi2, hi1), (lo1, lo2), (hi1, hi2)))
    hi1 = xp.maximum(lo1, hi1)
    lo2 = xp.maximum(lo2, hi1)
    hi2 = xp.maximum(lo2, hi2)
    return xp.stack([lo1, hi1, lo2, hi2], axis=-2).astype(np.int32)


def of_batch(rows, batch: int):
    """Rows for a batch of so many entries; those of a single entry are shared. ValueError as `check_batch`."""
    if rows is None or rows.ndim == 2:
        return rows
    check_batch(len(rows), batch)
    return rows[0] if batch == 1 else rows


def check_batch(entries: int, batch: int):
    """ValueError unless a mask with values for so many entries fits a batch."""
    if entries != batch:
        raise ValueError(
            f"mask: has values for {entries} batch entries and q has {batch}: give each entry one, or one for all"
        )


def together(parts) -> list:
    """Rows of several segments, all `[4, N]`, or all `[B, 4, N]` where one of them differs by batch entry."""
    entries = {r.shape[0] for r in parts if r.ndim == 3}
    if not entries:
        return list(parts)
    (batch,) = entries
    return [r if r.ndim == 3 else _namespace_of(r).broadcast_to(r, (batch, *r.shape)) for r in parts]


def by_entry(function, rows):
    """`function` of rows `[4, N]` that the batch shares, or of those of each batch entry, results stacked."""
    if rows.ndim == 2:
        return function(rows)
    if isinstance(rows, np.ndarray):
        return jax.tree.map(lambda *xs: np.stack(xs), *map(function, rows))
    return jax.vmap(function)(rows)


def membership(rows, keys):
    """May row n see key number `keys[m]`? For tiles, not for whole sequences.

    Returns booleans `[N, M]`, or `[B, 1, 1, N, M]` of rows `[B, 4, N]`: either meets scores `[B, Hkv, H/Hkv, N, M]`.
    """
    if rows.ndim == 3:
        rows = rows.swapaxes(0, 1)[:, :, None, None]
    lo1, hi1, lo2, hi2 = (r[..., None] for r in rows)
    return ((keys >= lo1) & (keys < hi1)) | ((keys >= lo2) & (keys < hi2))


def tile_ranges(rows, block_q: int, block_k: int):
    """Key tiles that some row of a query block may see, and those that every row sees wholly.

    rows: int32 `[4, N]`, N a multiple of `block_q` (pad with empty rows).
    Returns two int32 arrays `[4, N / block_q]`: `some` holds (first₁, end₁, first₂, end₂) in tiles of `block_k` keys,
    ordered and disjoint; `every` holds within each of the two the part (first, end) that needs no masking, empty as
    first = end.
    """
    xp = _namespace_of(rows)
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


def _namespace_of(rows):
    return np if isinstance(rows, np.ndarray) else jnp
