"""How a kernel is put together: its plan, its grid, and named arrays cut into blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.mosaic_tpu import plan as plans
from pallas_kernels.attention.mosaic_tpu.blocks import LANES, Blocks
from pallas_kernels.attention.mosaic_tpu.target import INTERPRETER, Chip


class Step(NamedTuple):
    """Where a running kernel is.

    outer: number of the outer tile. inner: number of the inner tile, by segment. first, last: whether this is the outer
    tile's first and its last step.
    """

    code: Any
    outer: Any
    inner: tuple[Any, ...]
    first: Any
    last: Any


class Launch:
    """Collects a kernel's arrays by name, then runs it. Made by `by_queries` and `by_keys`."""

    def __init__(self, name, chip: Chip, blocks: Blocks, plan, q, segments, grid, at_queries, at_keys, loads):
        self.name, self.chip, self.blocks, self.plan, self.grid = name, chip, blocks, plan, grid
        self.batch, self.queries, self.heads, self.dim = q.shape
        self.at_queries, self.at_keys, self.loads = at_queries, at_keys, loads
        self.traffic = 0  # HBM bytes for one head of one batch entry
        self.inputs: dict[Any, tuple] = {}
        self.outputs: dict[Any, tuple] = {}
        self.scratch: dict[Any, tuple[int, ...]] = {}
        rows = jnp.concatenate([jnp.asarray(r) for r in plans.rows_of(segments, self.queries)], axis=-2)
        if rows.ndim == 2:
            spec = pl.BlockSpec((len(rows), blocks.q), lambda *args: (0, at_queries(*args)[2]))
        else:
            spec = pl.BlockSpec((None, rows.shape[1], blocks.q), lambda b, *args: (b, 0, at_queries(b, *args)[2]))
        self.inputs["rows"] = spec, rows

    def _count(self, side, tokens, dtype):
        """Adds the traffic of an array: how often its blocks `[tokens, D]` move. side: "queries" or a segment."""
        self.traffic += self.loads[side] * tokens * self.dim * jnp.dtype(dtype).itemsize

    def read_queries(self, **arrays):
        """Arrays `[B, N, H, D]`, by name."""
        for name, x in arrays.items():
            self.inputs[name] = _spec(self.blocks.q, self.dim, self.at_queries), _view(x)
            self._count("queries", self.blocks.q, x.dtype)

    def read_vectors(self, **arrays):
        """Arrays `[B, H, N]`, by name."""
        for name, x in arrays.items():
            self.inputs[name] = _vector_spec(self.blocks.q, self.at_queries), x[:, :, None]

    def read_keys(self, segment: int, **arrays):
        """Arrays `[B, M, Hkv, D]`, by (name, segment)."""
        for name, x in arrays.items():
            self.inputs[name, segment] = _spec(self.blocks.k, self.dim, self.at_keys[segment]), _view(x)
            self._count(segment, self.blocks.k, x.dtype)

    def write_queries(self, name, dtype):
        """A result `[B, N, H, D]`."""
        shape = self.batch, self.queries, self.heads, self.dim
        self.outputs[name] = _spec(self.blocks.q, self.dim, self.at_queries), _viewed(shape, dtype), self._unview
        self._count("queries", self.blocks.q, dtype)

    def write_vector(self, name):
        """A result `[B, H, N]` in float32."""
        shape = jax.ShapeDtypeStruct((self.batch, self.heads, 1, self.queries), jnp.float32)
        self.outputs[name] = _vector_spec(self.blocks.q, self.at_queries), shape, lambda x: x[:, :, 0]

    def write_keys(self, name, like):
        """A result of the shape and dtype of keys `[B, M, Hkv, D]`, of segment 0."""
        spec = _spec(self.blocks.k, self.dim, self.at_keys[0])
        self.outputs[name] = spec, _viewed(like.shape, like.dtype), self._unview
        self._count(0, self.blocks.k, like.dtype)

    def keep(self, **shapes):
        """Accumulators in float32, by name."""
        self.scratch |= shapes

    def run(self, body, products) -> dict[Any, jax.Array]:
        """Runs `body(refs, step)` over the grid, refs by name; returns the results by name.

        products: matrix products a tile takes, by segment; what XLA is told the kernel costs follows from it.
        """
        names = [*self.inputs, *self.outputs, *self.scratch]
        segments = len(self.plan.tiles)

        def kernel(codes, *refs):
            tiles, refs = refs[:segments], refs[segments:]
            at = _place(self.plan, pl.program_id(0), pl.program_id(2))
            code = codes[at]
            first, last = (code & plans.FIRST) != 0, (code & plans.LAST) != 0
            if len(self.grid) == 4:
                group = pl.program_id(3)
                first, last = first & (group == 0), last & (group == self.grid[3] - 1)
            if _differs(self.plan):
                first, last = first & (code >= 0), last & (code >= 0)
            inner = tuple(tile[at] for tile in tiles)
            body(dict(zip(names, refs)), Step(code, _outer(self.plan, code), inner, first, last))

        in_specs, inputs = zip(*self.inputs.values())
        out_specs, out_shape, finishers = zip(*self.outputs.values())
        results = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1 + segments,
                grid=self.grid,
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in self.scratch.values()],
            ),
            out_shape=out_shape,
            cost_estimate=self._cost(products),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=tuple("parallel" if axis < 2 else "arbitrary" for axis in range(len(self.grid))),
                vmem_limit_bytes=self.chip.vmem_limit,
            ),
            interpret=self.chip is INTERPRETER,
            name=self.name,
        )(*(x.reshape(-1) for x in (self.plan.codes, *self.plan.tiles)), *inputs)
        return {name: finish(x) for name, finish, x in zip(self.outputs, finishers, results)}

    def _cost(self, products):
        heads = self.batch * self.grid[1]
        tiles = [steps * (self.grid[3] if len(self.grid) == 4 else 1) * heads for steps in self.plan.steps]
        pairs = self.blocks.q * self.blocks.k
        return pl.CostEstimate(
            flops=sum(2 * n * count * pairs * self.dim for n, count in zip(products, tiles)),
            bytes_accessed=self.traffic * heads,
            transcendentals=sum(tiles) * pairs,
        )

    def _unview(self, x):
        """The inverse of `_view`."""
        return x.reshape(*x.shape[:2], -1, self.dim) if self.dim % LANES == 0 else x.swapaxes(1, 2)

    def for_each_kind(self, step: Step, visit):
        """Runs `visit(segment, masked)` for the kind of tile that the step visits."""
        bits = step.code & (plans.SEGMENT | plans.MASKED)
        if _differs(self.plan):
            bits = jnp.where(step.code >= 0, bits, -1)
        for segment, masked in self.plan.kinds:

            @pl.when(bits == segment * plans.SEGMENT + masked * plans.MASKED)
            def _(segment=segment, masked=masked):
                visit(segment, masked)


def by_queries(name, chip, blocks, q, segments) -> Launch:
    """A kernel that goes from query block to query block and sums over the keys that each may see."""
    batch, queries, heads, _ = q.shape
    groups = heads // segments[0].k.shape[2]
    plan = plans.by_queries(segments, queries, blocks.q, blocks.k)

    def at_queries(b, h, step, codes, *_):
        return b, h, _outer(plan, codes[_place(plan, b, step)])

    def at_keys_of(segment):
        return lambda b, h, step, codes, *tiles: (b, lax.div(h, groups), tiles[segment][_place(plan, b, step)])

    at_keys = [at_keys_of(number) for number in range(len(segments))]
    loads = {"queries": -(-queries // blocks.q)} | dict(enumerate(plan.loads))
    grid = batch, heads, plan.count
    return Launch(name, chip, blocks, plan, q, segments, grid, at_queries, at_keys, loads)


def by_keys(name, chip, blocks, q, segment) -> Launch:
    """A kernel that goes from key tile to key tile and sums over the queries, of a whole group, that may see it."""
    batch, queries, heads, _ = q.shape
    kv_heads = segment.k.shape[2]
    groups = heads // kv_heads
    plan = plans.by_keys(segment, queries, blocks.q, blocks.k)

    def at_queries(b, h, step, group, codes, tiles):
        return b, h * groups + group, tiles[_place(plan, b, step)]

    def at_keys(b, h, step, group, codes, tiles):
        return b, h, _outer(plan, codes[_place(plan, b, step)])

    grid = batch, kv_heads, plan.count, groups
    loads = {"queries": plan.loads[0] * groups, 0: -(-segment.k.shape[1] // blocks.k)}
    return Launch(name, chip, blocks, plan, q, (segment,), grid, at_queries, [at_keys], loads)


def _differs(plan) -> bool:
    """Whether each batch entry has a list of steps of its own."""
    return plan.codes.ndim == 2


def _place(plan, b, step):
    """Where a step of a batch entry stands in the lists, which kernels read as one line."""
    return b * plan.codes.shape[1] + step if _differs(plan) else step


def _outer(plan, code):
    """The outer tile's number; an idle step has the one that it holds."""
    return (jnp.maximum(code, -1 - code) if _differs(plan) else code) >> plans.OUTER_SHIFT


def _view(x):
    """`[B, N, H, D]` as kernels read it: heads stay beside each other where each fills whole lanes.

    Reading one is then a strided load; for other head dims heads come first, which is a copy.
    """
    batch, tokens, heads, dim = x.shape
    return x.reshape(batch, tokens, heads * dim) if dim % LANES == 0 else x.swapaxes(1, 2)


def _viewed(shape, dtype):
    batch, tokens, heads, dim = shape
    shape = (batch, tokens, heads * dim) if dim % LANES == 0 else (batch, heads, tokens, dim)
    return jax.ShapeDtypeStruct(shape, dtype)


def _spec(tokens, dim, where):
    """Blocks `[tokens, dim]` of a viewed array. where: grid indices and scalars -> (batch, head, tile)."""
    if dim % LANES == 0:

        def index(*args):
            batch, head, tile = where(*args)
            return batch, tile, head

        return pl.BlockSpec((None, tokens, dim), index)
    return pl.BlockSpec((None, None, tokens, dim), lambda *args: (*where(*args), 0))


def _vector_spec(tokens, where):
    """Blocks `[1, tokens]` of an array `[B, H, 1, N]`."""

    def index(*args):
        batch, head, tile = where(*args)
        return batch, head, 0, tile

    return pl.BlockSpec((None, None, 1, tokens), index)
