"""Which key tiles each query block visits, as a few integers per block that the kernels read.

For one segment the plan is an int32 array `[blocks, 8]`: (first₁, end₁, first₂, end₂) of the tiles that some row may
see, then (inner₁, inner_end₁, inner₂, inner_end₂) of those among them that need no masking. It grows with N, never with
N·M. Rows that differ by batch entry give `[B, blocks, 8]`, and a program reads its own entry's.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention import rows as visibility


def rows_of(segment, queries: int, block: int):
    """`rows` of a segment, padded to whole blocks by repeating the last row, whose copies are never stored."""
    rows = visibility.everything(queries, segment.k.shape[1]) if segment.rows is None else segment.rows
    return padded(rows, -queries % block)


def padded(rows, more: int):
    """Rows for so many more queries, which see what the last one sees."""
    xp = np if isinstance(rows, np.ndarray) else jnp
    return xp.pad(rows, ((0, 0),) * (rows.ndim - 1) + ((0, more),), mode="edge")


def plan_of(rows, block_q: int, block_k: int):
    """The plan of padded rows."""

    def of_entry(rows):
        some, every = visibility.tile_ranges(rows, block_q, block_k)
        xp = np if isinstance(some, np.ndarray) else jnp
        return xp.concatenate([some, every]).T

    return visibility.by_entry(of_entry, rows)


def entry(ref, batch) -> tuple:
    """Where in rows or a plan a program's batch entry lies: an index of their first axis, if they have three."""
    return (batch,) if len(ref.shape) == 3 else ()


class Steps:
    """The tiles of one plan row as steps 0 … count−1, read inside a kernel."""

    def __init__(self, plan_ref, batch, block):
        read = [plan_ref[(*entry(plan_ref, batch), block, i)] for i in range(8)]
        self.first1, end1, self.first2, end2, *self.inner = read
        self.count1 = end1 - self.first1
        self.count = self.count1 + end2 - self.first2

    def tile(self, step):
        """Key tile of a step."""
        return lax.select(step < self.count1, self.first1 + step, self.first2 + step - self.count1)

    def needs_mask(self, tile):
        """Whether some row may not see all of a tile that is visited."""
        inner1, inner_end1, inner2, inner_end2 = self.inner
        whole = ((tile >= inner1) & (tile < inner_end1)) | ((tile >= inner2) & (tile < inner_end2))
        return jnp.logical_not(whole)


def transposed_plan_of(rows, block_q: int, block_k: int, keys: int):
    """For every key block, the query tiles that some key of it may be seen from: `[key blocks, 8]`, in the same form.

    One range per key block, the hull of what may be seen; within it the first run of tiles that need no masking.
    """
    of_entry = functools.partial(_transposed, block_q=block_q, block_k=block_k, keys=keys)
    return visibility.by_entry(of_entry, rows)


def _transposed(rows, block_q: int, block_k: int, keys: int):
    some, every = visibility.tile_ranges(rows, block_q, block_k)
    xp = np if isinstance(some, np.ndarray) else jnp
    blocks, tiles = -(-keys // block_k), some.shape[1]
    block, tile = xp.arange(blocks, dtype=np.int32)[:, None], xp.arange(tiles, dtype=np.int32)

    def holds(ranges):
        return ((block >= ranges[0]) & (block < ranges[1])) | ((block >= ranges[2]) & (block < ranges[3]))

    def first(where, otherwise):
        return xp.where(where, tile, otherwise).min(axis=1)

    seen, whole = holds(some), holds(every)
    end = xp.where(seen, tile + 1, 0).max(axis=1)
    start = xp.minimum(first(seen, tiles), end)
    inner = xp.minimum(first(whole, tiles), end)
    inner_end = first(~whole & (tile > inner[:, None]), tiles)
    inner_end = xp.clip(inner_end, inner, end)
    return xp.stack([start, end, end, end, inner, inner_end, end, end], axis=1).astype(np.int32)
