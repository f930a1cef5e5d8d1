"""What the kernels share: how arrays are cut into blocks, and the arithmetic on one tile.

Scores are held transposed, keys × queries. Everything that belongs to a query (maximum, sum, log-sum-exp, intervals) is
then a row vector: reductions run down the sublanes, nothing is broadcast across lanes, and vectors are stored as they
are.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.mosaic_tpu import plan as plans
from pallas_kernels.attention.mosaic_tpu.target import INTERPRETER, Chip

LOG2E = math.log2(math.e)
LANES = 128


def view(x):
    """`[B, N, H, D]` as the kernels read it: heads stay beside each other where one fills whole lanes.

    Then reading a head is a strided load; for other head dims heads come first, which is a copy.
    """
    batch, tokens, heads, dim = x.shape
    return x.reshape(batch, tokens, heads * dim) if dim % LANES == 0 else x.swapaxes(1, 2)


def unview(x, dim: int):
    """The inverse of `view`."""
    return x.reshape(*x.shape[:2], -1, dim) if dim % LANES == 0 else x.swapaxes(1, 2)


def viewed(shape, dtype):
    """Shape and dtype of the view of an array."""
    return jax.eval_shape(view, jax.ShapeDtypeStruct(shape, dtype))


def spec(tokens: int, dim: int, where):
    """Blocks `[tokens, dim]` of a viewed array. where: grid indices and scalars -> (batch, head, tile)."""
    if dim % LANES == 0:

        def index(*args):
            batch, head, tile = where(*args)
            return batch, tile, head

        return pl.BlockSpec((None, tokens, dim), index)
    return pl.BlockSpec((None, None, tokens, dim), lambda *args: (*where(*args), 0))


def vector_spec(tokens: int, where):
    """Blocks `[1, tokens]` of an array `[B, H, 1, N]`."""

    def index(*args):
        batch, head, tile = where(*args)
        return batch, head, 0, tile

    return pl.BlockSpec((None, None, 1, tokens), index)


def rows_spec(rows: int, tokens: int, where):
    """Blocks `[rows, tokens]` of the key intervals of all segments, `[rows, N]`."""
    return pl.BlockSpec((rows, tokens), lambda *args: (0, where(*args)[2]))


def all_rows(segments, queries: int):
    """Key intervals of all segments, int32 `[4 · segments, N]`."""
    return jnp.concatenate([jnp.asarray(plans.rows_of(s, queries)) for s in segments])


def call(kernel, chip: Chip, plan: plans.Plan, grid, in_specs, out_specs, out_shape, scratch, inputs, name: str):
    """Runs a kernel over `grid`, whose third axis is the plan's steps and whose first two are batch and heads."""
    interpret = chip is INTERPRETER
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(plan.tiles),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel") + ("arbitrary",) * (len(grid) - 2),
            vmem_limit_bytes=chip.vmem * 3 // 4,
        ),
        interpret=interpret,
        name=name,
    )(plan.codes, *plan.tiles, *inputs)


def has(code, bit):
    """Whether a step has a bit set."""
    return (code & bit) != 0


def for_each_kind(plan_kinds, code, body):
    """Runs `body(segment, masked)` for the kind of step that `code` is."""
    bits = code & (plans.SEGMENT | plans.MASKED)
    for segment, masked in plan_kinds:

        @pl.when(bits == segment * plans.SEGMENT + masked * plans.MASKED)
        def _(segment=segment, masked=masked):
            body(segment, masked)


def seen_by(rows, tile, shape):
    """Booleans `[keys, queries]` of a tile: rows `[4, queries]`, tile number, shape."""
    lo1, hi1, lo2, hi2 = (rows[i : i + 1] for i in range(4))
    key = tile * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
    return ((key >= lo1) & (key < hi1)) | ((key >= lo2) & (key < hi2))


def without_tail(x, tile, length: int):
    """A tile `[tokens, D]` with zeros beyond the array's end, where anything may be, not-a-number included."""
    block = x.shape[0]
    if length % block == 0:
        return x
    token = tile * block + lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(token < length, x, jnp.zeros_like(x))


def dot_nt(a, b):
    """a bᵀ in float32."""
    return _dot(a, b, ((1,), (1,)))


def dot_tn(a, b):
    """aᵀ b in float32; b is rounded to a's dtype."""
    return _dot(a, b.astype(a.dtype), ((0,), (0,)))


def dot_nn(a, b):
    """a b in float32; a is rounded to b's dtype."""
    return _dot(a.astype(b.dtype), b, ((1,), (0,)))


def _dot(a, b, contract):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)
