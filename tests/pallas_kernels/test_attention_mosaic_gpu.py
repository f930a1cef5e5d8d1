"""The Hopper kernels without a GPU: they lower at Wan's size, pad what no tile divides, and plan like the mask says."""

import functools
import re

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import mosaic_gpu
from pallas_kernels.attention.backend import Segment
from pallas_kernels.attention.mosaic_gpu import blocks, plan
from pallas_kernels.attention.shapes import BY_ENTRY, SMALL, case

MOVING, STILL = (True, True), (False, False)


def test_kernels_lower_for_cuda_without_a_quadratic_buffer():
    shape = case("tf_target_1")
    x = jax.ShapeDtypeStruct((1, shape.queries, 2, shape.dim), jnp.bfloat16)

    def run(q, own, context, dq, d_own, g):
        visible = shape.mask.visible(shape.queries, shape.own, shape.context)
        segments = tuple(Segment(*pair, rows) for pair, rows in zip((own, context), visible))
        o, lse = mosaic_gpu.forward(q, segments, 0.1)
        do, dlse = mosaic_gpu.tangent(q, segments, 0.1, o, lse, dq, (d_own, (None, None)))
        together = mosaic_gpu.forward_tangent(q, segments, 0.1, dq, (d_own, (None, None)))
        return do, together, mosaic_gpu.backward(q, segments, 0.1, o, lse, g, dlse, (True, (MOVING, MOVING)))

    lowered = jax.jit(run).trace(x, (x, x), (x, x), x, (x, x), x).lower(lowering_platforms=("cuda",))
    sizes = [
        np.prod([int(n) for n in dims.split("x") if n])
        for dims in re.findall(r"tensor<((?:\d+x)+)", str(lowered.as_text()))
    ]
    assert max(sizes) == x.size


@pytest.mark.parametrize("name, traced", [("captions_alone", False), ("captions", True)])
def test_kernels_lower_for_rows_of_each_batch_entry(name, traced):
    """Each program's rows and plan are read at its batch entry: kernels take them with three axes."""
    shape = case(name, BY_ENTRY)
    sizes = {"q": (shape.queries, shape.heads)} | {n: (m, shape.kv_heads) for n, m in shape.segments.items()}
    x = {
        name: jax.ShapeDtypeStruct((shape.batch, tokens, heads, shape.dim), jnp.bfloat16)
        for name, (tokens, heads) in sizes.items()
    }
    names = tuple(shape.segments)
    known = shape.mask.visible(shape.queries, shape.own, shape.context)[: len(names)]
    given = [rows for rows in known if rows is not None] if traced else []

    def run(x, given):
        given = iter(given)
        rows = [next(given) if traced and r is not None else r for r in known]
        segments = tuple(Segment(x[name], x[name], r) for name, r in zip(names, rows))
        still = ((None, None),) * (len(names) - 1)
        o, lse = mosaic_gpu.forward(x["q"], segments, 0.1)
        moving = x["q"], ((x["own"], x["own"]), *still)
        do, dlse = mosaic_gpu.tangent(x["q"], segments, 0.1, o, lse, *moving)
        together = mosaic_gpu.forward_tangent(x["q"], segments, 0.1, *moving)
        wanted = True, (MOVING,) * len(names)
        return together, mosaic_gpu.backward(x["q"], segments, 0.1, o, lse, do, dlse, wanted)

    traced_run = jax.jit(run).trace(x, given)
    assert re.search(rf"i32\[{shape.batch},\d+,8\]", str(traced_run.jaxpr))
    traced_run.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("shape", BY_ENTRY, ids=lambda c: c.name)
def test_the_plan_of_each_batch_entry_is_its_own(shape):
    visible = shape.mask.visible(shape.queries, shape.own, shape.context)
    for name in shape.segments:
        keys, rows = shape.segments[name], getattr(visible, name)
        if rows is None:
            continue
        rows = plan.rows_of(Segment(np.zeros((shape.batch, keys, 1, 1)), None, rows), shape.queries, 128)
        planned = functools.partial(plan.plan_of, block_q=128, block_k=64)
        for table in (planned(rows), np.asarray(jax.jit(planned)(rows))):
            alone = [planned(r) for r in rows] if rows.ndim == 3 else planned(rows)
            np.testing.assert_array_equal(table, alone)


def test_what_is_not_wanted_is_not_computed():
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((1, 2, 256), jnp.float32)

    def kernels(want_q, *wanted):
        def run(x, row):
            segments = (Segment(x, x, None),) * 2
            return mosaic_gpu.backward(x, segments, 0.1, x, row, x, row, (want_q, wanted))

        return str(jax.make_jaxpr(run)(x, row)).count("custom_vmap_call")

    assert kernels(True, MOVING, MOVING) == 3
    assert kernels(True, MOVING, STILL) == 2
    assert kernels(True, STILL, STILL) == 1
    assert kernels(False, STILL, MOVING) == 1


def test_every_kernel_has_measured_blocks():
    kernels = "forward", "forward_tangent", "tangent", "dq", "dkv"
    assert set(blocks.table()) == {(kernel, dim) for kernel in kernels for dim in mosaic_gpu.DIMS}
    with blocks.trying("dq", 64, blocks.Blocks(64, 2)):
        assert blocks.blocks_for("dq", 64) == blocks.Blocks(64, 2)
    assert blocks.blocks_for("dq", 64) == blocks.table()["dq", 64]


@pytest.mark.parametrize("shape", SMALL + BY_ENTRY, ids=lambda c: c.name)
def test_the_transposed_plan_visits_what_is_seen(shape):
    visible = shape.mask.visible(shape.queries, shape.own, shape.context)
    for name, predicate in oracle.allowed(shape).items():
        keys = shape.segments[name]
        segment = Segment(np.zeros((shape.batch, keys, 1, 1)), None, getattr(visible, name))
        rows = plan.rows_of(segment, shape.queries, 128)
        planned = functools.partial(plan.transposed_plan_of, block_q=64, block_k=128, keys=keys)
        for tables in (planned(rows), np.asarray(jax.jit(planned)(rows))):
            assert tables.ndim == rows.ndim
            entries = ([tables], [predicate]) if rows.ndim == 2 else (tables, predicate)
            for table, seen_by_entry in zip(*entries, strict=True):
                _check_transposed(table, seen_by_entry, rows.shape[-1], keys)


def _check_transposed(table, predicate, queries, keys):
    predicate = np.pad(predicate, ((0, queries - len(predicate)), (0, -keys % 128)), mode="edge")
    predicate[:, keys:] = False
    for block, (first, end, *_, inner, inner_end, _, _) in enumerate(table):
        tiles = predicate[:, block * 128 : (block + 1) * 128].reshape(-1, 64, 128)
        seen, whole = tiles.any((1, 2)), tiles.all((1, 2))
        assert set(np.flatnonzero(seen)) <= set(range(first, end))
        assert first <= inner <= inner_end <= end and whole[inner:inner_end].all()


@pytest.mark.parametrize("queries, keys", [(1, 200), (150, 77), (256, 256)])
def test_padding_keeps_added_keys_unseen(queries, keys):
    q, k = jnp.ones((1, queries, 1, 64)), jnp.ones((1, keys, 1, 64))
    (padded,), (segment,), n = mosaic_gpu._padded((q,), (Segment(k, k, None),))
    assert n == queries and padded.shape[1] % 8 == segment.k.shape[1] % 8 == 0
    if segment.rows is None:
        assert segment.k.shape[1] == keys
    else:
        assert segment.rows.shape == (4, padded.shape[1])
        assert (segment.rows[0] == 0).all() and (segment.rows[1] == keys).all()
