"""What is particular to the TPU kernels: their plans, ragged ends, other head dims, which device they accept."""

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Cached, Captioned, Full, TeacherForcing, attention, mosaic_tpu
from pallas_kernels.attention.backend import Segment
from pallas_kernels.attention.mosaic_tpu import plan as plans
from pallas_kernels.attention.mosaic_tpu.blocks import KERNELS, blocks_for
from pallas_kernels.attention.shapes import BY_ENTRY, SMALL, WAN, Case


def segments_of(case, visible=None):
    visible = visible or case.mask.visible(case.queries, case.own, case.context)
    keys = [np.zeros((1, length, 1, 1)) for length in case.segments.values()]
    return [Segment(k, k, rows) for k, rows in zip(keys, visible)]


def plans_of(case, block_q, block_k, visible=None):
    """The plan by queries and one by keys for every segment."""
    segments = segments_of(case, visible)
    by_keys = [plans.by_keys(segment, case.queries, block_q, block_k) for segment in segments]
    return plans.by_queries(segments, case.queries, block_q, block_k), by_keys


def traced_plans_of(case, block_q, block_k):
    """The same from traced intervals, without what is known only while tracing."""

    def build(visible):
        by_queries, by_keys = plans_of(case, block_q, block_k, visible)
        return by_queries[:3], [plan[:3] for plan in by_keys]

    visible = case.mask.visible(case.queries, case.own, case.context)
    by_queries, by_keys = jax.jit(build)(visible)
    return plans.Plan(*by_queries, (), (), ()), [plans.Plan(*plan, (), (), ()) for plan in by_keys]


def steps_of(plan):
    """The steps that run, as (outer, segment, inner, masked), and the bits that open and close outer tiles."""
    count = int(plan.count)
    codes = np.asarray(plan.codes)[:count]
    segment = (codes & plans.SEGMENT) // plans.SEGMENT
    inner = np.stack([np.asarray(tiles)[:count] for tiles in plan.tiles])[segment, np.arange(count)]
    visits = list(zip(codes >> plans.OUTER_SHIFT, segment, inner, (codes & plans.MASKED) != 0))
    return visits, (codes & plans.FIRST) != 0, (codes & plans.LAST) != 0


def check(visits, first, last, tiles_seen, outer_tiles):
    """tiles_seen: (outer, segment, inner) -> some pair visible, all pairs visible."""
    assert len({v[:3] for v in visits}) == len(visits)
    plain = {v[:3]: v[3] for v in visits}
    for place, (some, every) in tiles_seen.items():
        assert not some or place in plain
        assert every or place not in plain or plain[place]
    outer = np.array([v[0] for v in visits])
    np.testing.assert_array_equal(np.unique(outer), np.arange(outer_tiles))
    np.testing.assert_array_equal(outer, np.sort(outer))
    np.testing.assert_array_equal(first, np.diff(outer, prepend=-1) != 0)
    np.testing.assert_array_equal(last, np.diff(outer, append=outer_tiles) != 0)


TRACED = ("block_causal_window", "cached_empty", "intervals", "empty_rows")


@pytest.mark.parametrize(
    "case, build",
    [(c, plans_of) for c in SMALL] + [(c, traced_plans_of) for c in SMALL if c.name in TRACED],
    ids=[c.name for c in SMALL] + [f"{name}-traced" for name in TRACED],
)
def test_plans_visit_what_is_seen_once_and_in_order(case, build):
    check_plans(case, *build(case, 32, 48), oracle.allowed(case))


@pytest.mark.parametrize("build", [plans_of, traced_plans_of])
@pytest.mark.parametrize("case", BY_ENTRY, ids=lambda c: c.name)
def test_each_batch_entry_has_a_plan_of_its_own(case, build):
    by_queries, by_keys = build(case, 32, 48)
    assert by_queries.codes.ndim == 2
    counts = []
    for b in range(case.batch):
        own = [entry_of(plan, b) for plan in (by_queries, *by_keys)]
        counts.append(own[0].count)
        allowed = {name: seen if seen.ndim == 2 else seen[b] for name, seen in oracle.allowed(case).items()}
        check_plans(case, own[0], own[1:], allowed)
    assert by_queries.count == max(counts)
    assert case.name != "captions_cached" or len(set(counts)) > 1  # idle steps are among what is tested


def entry_of(plan, b):
    """The plan of one batch entry without its idle steps, which must hold what the last step held."""
    if plan.codes.ndim == 1:
        return plan
    codes, tiles = np.asarray(plan.codes)[b], [np.asarray(x)[b] for x in plan.tiles]
    count = int((codes >= 0).sum())
    assert (codes[:count] >= 0).all() and (codes[count:] < 0).all() and count <= plan.count
    idle = -1 - codes[count:]
    assert (idle >> plans.OUTER_SHIFT == codes[count - 1] >> plans.OUTER_SHIFT).all()
    assert not (idle & (plans.FIRST | plans.LAST)).any()
    assert all((x[count:] == x[count - 1]).all() for x in tiles)
    return plans.Plan(codes, tuple(tiles), count, (), (), ())


def check_plans(case, by_queries, by_keys, allowed, block_q=32, block_k=48):
    """allowed: booleans `[queries, keys]` by segment."""
    blocks = -(-case.queries // block_q)
    by_query, by_key = {}, []
    for number, (length, seen) in enumerate(zip(case.segments.values(), allowed.values())):
        tiles = -(-length // block_k)
        by_key.append({})
        for i in range(blocks):
            for j in range(tiles):
                part = seen[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
                full_keys, full_queries = part.shape[1] == block_k, part.shape[0] == block_q
                by_query[i, number, j] = part.any(), part.all() and full_keys
                by_key[-1][j, 0, i] = part.any(), part.all() and full_keys and full_queries
    check(*steps_of(by_queries), by_query, blocks)
    for length, plan, tiles in zip(case.segments.values(), by_keys, by_key):
        check(*steps_of(plan), tiles, -(-length // block_k))


def test_steps_of_another_segment_load_nothing():
    case = next(c for c in WAN if c.name == "tf_target_3")
    plan = plans.by_queries(segments_of(case), case.queries, 1024, 512)
    number = (plan.codes & plans.SEGMENT) // plans.SEGMENT
    for segment, tiles in enumerate(plan.tiles):
        held = np.flatnonzero(number[1:] != segment) + 1
        np.testing.assert_array_equal(tiles[held], tiles[held - 1])
        assert plan.steps[segment] == (number == segment).sum() >= plan.loads[segment] - 1


@pytest.mark.parametrize("case", [c for c in WAN if c.name != "full"], ids=lambda c: c.name)
@pytest.mark.parametrize("chip", mosaic_tpu.CHIPS, ids=lambda c: c.name)
def test_tiles_at_wan_size_waste_little(case, chip):
    q = jnp.zeros((1, case.queries, 1, case.dim), jnp.bfloat16)
    segments = segments_of(case)
    for kernel in KERNELS:
        blocks = blocks_for(kernel, chip, q, segments)
        assert blocks.q % 128 == blocks.k % 128 == 0
    blocks = blocks_for("forward", chip, q, segments)
    plan = plans.by_queries(segments, case.queries, blocks.q, blocks.k)
    assert sum(plan.steps) * blocks.q * blocks.k < 1.15 * sum(case.pairs().values())


@pytest.mark.parametrize("dim, groups", [(80, 2), (256, 1)])
def test_other_head_dims(dim, groups):
    """All results at once, float32, with key heads shared where groups > 1."""
    case = Case("", TeacherForcing(50, 45), 140, 140, 140, heads=groups, kv_heads=1, dim=dim)
    rng = np.random.default_rng(0)

    def draw(tokens, heads):
        return jnp.asarray(rng.normal(size=(1, tokens, heads, dim)), jnp.float32)

    inputs, tangents = (
        {"q": draw(140, groups), "own": (draw(140, 1), draw(140, 1)), "context": (draw(140, 1), draw(140, 1))}
        for _ in range(2)
    )
    g, g_lse = draw(140, groups), jnp.zeros((1, groups, 140))

    def call(x):
        return attention(
            x["q"], *x["own"], context=x["context"], mask=case.mask, implementation="mosaic_tpu", return_lse=True
        )

    with mosaic_tpu.interpreted():
        values, moved = jax.jit(lambda x, u: jax.jvp(call, (x,), (u,)))(inputs, tangents)
        (grads,) = jax.jit(lambda x: jax.vjp(call, x)[1]((g, g_lse)))(inputs)
    exact = oracle.Oracle(case, inputs)
    truth = ((exact.o, exact.lse), exact.tangent(tangents), exact.backward(g, g_lse))
    found = jax.tree.map(oracle.relative_error, (values, moved, grads), truth)
    assert max(jax.tree.leaves(found)) < 3e-6, found


def test_rows_of_each_batch_entry_lower_for_a_tpu():
    """The plans' lists, of as many steps as the longest, are traced here: their lengths come with the call."""
    q, k, context = (jax.ShapeDtypeStruct((2, *shape, 128), jnp.bfloat16) for shape in ((160, 4), (160, 2), (197, 2)))

    def derivatives(q, k, context, lengths):
        mask = Captioned(TeacherForcing(80, 80), lengths, 37)

        def call(q, k):
            return attention(q, k, k, context=(context, context), mask=mask, implementation="mosaic_tpu")

        return jax.jvp(call, (q, k), (q, k)), jax.vjp(call, q, k)[1](q)

    with mosaic_tpu.compile_for("v6e"):
        traced = jax.jit(derivatives).trace(q, k, context, jax.ShapeDtypeStruct((2,), jnp.int32))
        assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") >= 4


def test_elsewhere_an_explicit_choice_says_why():
    if jax.default_backend() == "tpu":
        pytest.skip("there is a TPU")
    x = jnp.zeros((1, 128, 2, 64))
    with pytest.raises(ValueError, match="mosaic_tpu cannot serve this call: it needs a TPU"):
        attention(x, x, x, implementation="mosaic_tpu")
    for bad, why in ((x.astype(jnp.float16), "cast to bfloat16"), (jnp.zeros((1, 128, 2, 24)), "multiple of 16")):
        with mosaic_tpu.interpreted(), pytest.raises(ValueError, match=why):
            attention(bad, bad, bad, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="no chip 'v9'"):
        mosaic_tpu.compile_for("v9")


def test_a_call_too_long_for_its_plan_is_refused():
    x = jax.ShapeDtypeStruct((1, 400_000, 1, 128), jnp.bfloat16)

    def call(x):
        return attention(x, x, x, mask=Full(), implementation="mosaic_tpu")

    with mosaic_tpu.compile_for("v5e"), pytest.raises(ValueError, match="split the queries"):
        jax.eval_shape(call, x)

    def call_of_two(x):  # one entry would fit
        mask = Cached((1, 2))
        return attention(x, x, x, context=(x, x), mask=mask, implementation="mosaic_tpu")

    x = jax.ShapeDtypeStruct((2, 50_000, 1, 128), jnp.bfloat16)
    with mosaic_tpu.compile_for("v5e"), pytest.raises(ValueError, match=r"2 batch entries of .* split the batch"):
        jax.eval_shape(call_of_two, x)


def test_a_plan_of_a_traced_mask_runs_only_the_steps_it_needs():
    def count(stop):
        k = jnp.zeros((1, 1024, 1, 64))
        rows = Cached(stop).visible(128, 128, 1024).context
        return plans.by_queries([Segment(k, k, rows)], 128, 128, 128).count

    assert [int(jax.jit(count)(stop)) for stop in (0, 1, 128, 129, 1024)] == [1, 1, 1, 2, 8]
