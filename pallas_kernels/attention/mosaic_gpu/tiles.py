"""What the Hopper kernels share: shared-memory rings, register tiles, masking, grids."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.mosaic_gpu.plan import entry

WARPGROUP_ROWS = 64  # rows of one wgmma
COMPUTE_WARPGROUPS = 2
LOG2_E = math.log2(math.e)
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value for every row of a register tile
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one value for every column
# jax 0.10 wants an index beside the reference, 0.11 warns about one, 0.12 refuses it.
_BESIDE = inspect.signature(plgpu.load).parameters.get("idx")
_INDEX = ((),) if _BESIDE is not None and _BESIDE.default is inspect.Parameter.empty else ()


@dataclasses.dataclass(frozen=True)
class Ring:
    """Shared-memory buffers that a feeding warpgroup fills and computing warpgroups release, in turn.

    Items are numbered from 0 in the order in which they pass; both sides count the same way.
    """

    stages: int
    buffers: Any
    arrived: Any
    consumed: Any

    def slot(self, item):
        return lax.rem(item, jnp.int32(self.stages))

    def fill(self, source, item):
        """Starts the copy of `source` once the buffer that item `item` falls on is free."""
        slot = self.slot(item)

        @pl.when(item >= self.stages)
        def _wait():
            plgpu.barrier_wait(self.consumed.at[slot])

        plgpu.copy_gmem_to_smem(source, self.buffers.at[slot], self.arrived.at[slot])

    def wait(self, item):
        plgpu.barrier_wait(self.arrived.at[self.slot(item)])

    def release(self, item):
        plgpu.barrier_arrive(self.consumed.at[self.slot(item)])

    def __getitem__(self, item):
        return self.buffers.at[self.slot(item)]


def ring_scratch(stages, shape, dtype, tiled=True):
    """Scratch for a `Ring`: buffers and the two barriers."""
    return (
        tile_scratch((stages, *shape), dtype) if tiled else plgpu.SMEM((stages, *shape), dtype),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
    )


def tile_scratch(shape, dtype):
    """Shared memory in the layout that wgmma and the copy engine like."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def grid_of(heads, blocks, batch, heads_first):
    """Grid and its axis names; the first axis varies fastest."""
    if heads_first:
        return {"grid": (heads, blocks, batch), "grid_names": ("head", "block", "batch")}
    return {"grid": (blocks, heads, batch), "grid_names": ("block", "head", "batch")}


def load(ref, layout, anywhere=False):
    """A reference's content in registers; `anywhere` also from device memory, element by element."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=not anywhere)


def zeros(shape):
    """A float32 register tile of zeros."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def row_vector(value, rows=WARPGROUP_ROWS):
    """One float32 a row, in registers."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), ROW)


def by_row(vector, shape):
    """A row vector spread over a tile."""
    return lax.broadcast_in_dim(vector, shape, [0])


def by_column(vector, shape):
    """A column vector spread over a tile."""
    return lax.broadcast_in_dim(vector, shape, [1])


def seen_by(rows_ref, batch, base, shape, first_key):
    """Boolean tile: may row `base + i` of a batch entry see key `first_key + j`?"""
    key = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    lo1, hi1, lo2, hi2 = (
        by_row(load(rows_ref.at[(*entry(rows_ref, batch), i, pl.ds(base, shape[0]))], ROW, anywhere=True), shape)
        for i in range(4)
    )
    return ((key >= lo1) & (key < hi1)) | ((key >= lo2) & (key < hi2))


def seen_from(rows_ref, batch, first_key, shape, base):
    """The same, transposed: may query `base + j` see key `first_key + i`?"""
    key = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    lo1, hi1, lo2, hi2 = (
        by_column(load(rows_ref.at[(*entry(rows_ref, batch), i, pl.ds(base, shape[1]))], COLUMN, anywhere=True), shape)
        for i in range(4)
    )
    return ((key >= lo1) & (key < hi1)) | ((key >= lo2) & (key < hi2))
