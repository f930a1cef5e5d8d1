"""Every backend against the float64 oracle: values, tangents, gradients; ordinary and adversarial inputs; dtypes."""

import dataclasses
import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Intervals, attention, chunked
from pallas_kernels.attention.shapes import BY_ENTRY, SMALL, case

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
# float32: a few hundred roundings of 6e-8 add up at random. Lower dtypes: measured against an ideal kernel instead.
F32_TOLERANCE = 3e-6


def draw(case, seed, dtype=F32, scale=1.0):
    """Random inputs of a case, in the structure {"q", "own", "context"}."""
    rng = np.random.default_rng(seed)

    def normal(tokens, heads):
        return jnp.asarray(scale * rng.normal(size=(case.batch, tokens, heads, case.dim)), dtype)

    keys = {name: tuple(normal(length, case.kv_heads) for _ in range(2)) for name, length in case.segments.items()}
    return {"q": normal(case.queries, case.heads)} | keys


ADVERSARIAL = ("large_logits", "one_dominating_key", "near_uniform_rows", "large_tangents")


def adversarial(kind, case, dtype):
    """Inputs and tangents that are hard on rounding; `kind` is one of `ADVERSARIAL`, or "random"."""
    inputs, tangents = draw(case, 5, dtype), draw(case, 6, dtype)
    if kind == "large_logits":
        inputs["q"] = inputs["q"] * 12
    if kind == "one_dominating_key":
        inputs["own"] = (inputs["own"][0].at[:, 61].mul(20), inputs["own"][1])
    if kind == "near_uniform_rows":
        inputs["q"] = inputs["q"] * 1e-3
    if kind == "large_tangents":
        tangents = jax.tree.map(lambda x: x * 100, tangents)
    return inputs, tangents


def caller(case, implementation):
    """The case as a function of its inputs, jitted; skips where the backend does not serve it."""

    def call(inputs):
        return attention(
            inputs["q"],
            *inputs["own"],
            context=inputs.get("context"),
            mask=case.mask,
            implementation=implementation,
            return_lse=True,
        )

    return call


def served(case, implementation, dtype):
    """Skips the test where an explicit choice of this backend is refused."""
    try:
        jax.eval_shape(caller(case, implementation), draw(case, 0, dtype))
    except ValueError as error:
        if "cannot serve" not in str(error):
            raise
        pytest.skip(str(error))


def measure(case, implementation, inputs, tangents):
    """(o, lse, ȯ, lse's tangent, gradients) of the backend and the cotangents used."""
    call = caller(case, implementation)

    @jax.jit
    def everything(inputs, tangents, cotangents):
        (o, lse), (do, dlse) = jax.jvp(call, (inputs,), (tangents,))
        grads = jax.vjp(call, inputs)[1](cotangents)[0]
        return o, lse, do, dlse, grads

    rng = np.random.default_rng(99)
    q = inputs["q"]
    g = jnp.asarray(rng.normal(size=q.shape), q.dtype)
    seen = functools.reduce(np.logical_or, [m.any(-1) for m in oracle.allowed(case).values()])
    g_lse = jnp.asarray(
        np.where(seen if seen.ndim == 1 else seen[:, None], rng.normal(size=(case.batch, case.heads, case.queries)), 0),
        jnp.promote_types(q.dtype, F32),
    )
    return everything(inputs, tangents, (g, g_lse)), (g, g_lse)


def errors(case, inputs, tangents, got, cotangents):
    """Relative error of every result against the exact oracle."""
    exact = oracle.Oracle(case, inputs)
    results = {"o": exact.o, "lse": exact.lse}
    results |= dict(zip(("do", "dlse"), exact.tangent(tangents)))
    grads = exact.backward(*cotangents)
    results |= {"dq": grads["q"]}
    results |= {f"d{x}_{name}": grads[name][i] for name in case.segments for i, x in enumerate("kv")}
    o, lse, do, dlse, grads = got
    values = {"o": o, "lse": lse, "do": do, "dlse": dlse, "dq": grads["q"]}
    values |= {f"d{x}_{name}": grads[name][i] for name in case.segments for i, x in enumerate("kv")}
    return {name: oracle.relative_error(values[name], results[name]) for name in results}


def ideal(case, inputs, tangents, cotangents, dtype):
    """What `measure` would give with every matrix product's operands rounded to `dtype` and nothing else lost."""
    kernel = oracle.Oracle(case, inputs, round_to=dtype)
    return kernel.o, kernel.lse, *kernel.tangent(tangents), kernel.backward(*cotangents)


@pytest.mark.parametrize("name", [c.name for c in SMALL + BY_ENTRY])
def test_float32_agrees_with_the_oracle(backend, name):
    shape = case(name, SMALL + BY_ENTRY)
    served(shape, backend, F32)
    inputs, tangents = draw(shape, 1), draw(shape, 2)
    got, cotangents = measure(shape, backend, inputs, tangents)
    found = errors(shape, inputs, tangents, got, cotangents)
    assert max(found.values()) < F32_TOLERANCE, found


@pytest.mark.parametrize("name", [c.name for c in BY_ENTRY])
def test_a_loop_over_tiles_serves_every_batch_entry(monkeypatch, name):
    """Tiles so small that some are seen by one entry alone."""
    monkeypatch.setattr(chunked, "BLOCK_Q", 48)
    monkeypatch.setattr(chunked, "BLOCK_K", 32)
    shape = case(name, BY_ENTRY)
    inputs, tangents = draw(shape, 1), draw(shape, 2)
    got, cotangents = measure(shape, "chunked", inputs, tangents)
    found = errors(shape, inputs, tangents, got, cotangents)
    assert max(found.values()) < F32_TOLERANCE, found


@pytest.mark.parametrize(
    "name, dtype", [("block_causal", BF16), ("teacher_forcing", BF16), ("cached", F16), ("empty_rows", BF16)]
)
def test_low_precision_is_near_an_ideal_kernel(backend, name, dtype):
    shape = case(name, SMALL)
    served(shape, backend, dtype)
    inputs, tangents = draw(shape, 3, dtype), draw(shape, 4, dtype)
    _near_ideal(shape, backend, inputs, tangents, dtype)


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_inputs_stay_near_an_ideal_kernel(backend, kind):
    shape = case("teacher_forcing", SMALL)
    served(shape, backend, BF16)
    _near_ideal(shape, backend, *adversarial(kind, shape, BF16), BF16)


def _near_ideal(shape, backend, inputs, tangents, dtype):
    got, cotangents = measure(shape, backend, inputs, tangents)
    found = errors(shape, inputs, tangents, got, cotangents)
    best = errors(shape, inputs, tangents, ideal(shape, inputs, tangents, cotangents, dtype), cotangents)
    floor = float(jnp.finfo(dtype).eps) / 64  # lse and its tangent are float32: the ideal's error there is nearly zero
    worse = {name: (found[name], best[name]) for name in found if found[name] > 2 * best[name] + floor}
    assert not worse, worse


@pytest.mark.parametrize("name", ["block_causal_window", "teacher_forcing_ragged", "cached_window", "intervals"])
def test_backward_is_the_transpose_of_the_tangent(backend, name):
    shape = case(name, SMALL)
    served(shape, backend, F32)
    inputs, tangents = draw(shape, 7), draw(shape, 8)
    (_, _, do, dlse, grads), (g, g_lse) = measure(shape, backend, inputs, tangents)
    forward = np.vdot(np.asarray(do, np.float64), g) + np.vdot(np.asarray(dlse, np.float64), g_lse)
    pairs = zip(jax.tree.leaves(tangents), jax.tree.leaves(grads))
    transposed = sum(np.vdot(np.asarray(u, np.float64), x) for u, x in pairs)
    size = np.linalg.norm(do) * np.linalg.norm(g)
    assert abs(forward - transposed) < 1e-6 * size


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_float64_is_exact(implementation):
    shape = case("teacher_forcing_ragged", SMALL)
    with jax.enable_x64(True):
        inputs, tangents = draw(shape, 9, jnp.float64), draw(shape, 10, jnp.float64)
        got, cotangents = measure(shape, implementation, inputs, tangents)
        assert got[0].dtype == got[1].dtype == jnp.float64
        found = errors(shape, inputs, tangents, got, cotangents)
    assert max(found.values()) < 1e-13, found


def test_same_inputs_same_bits(backend):
    shape = case("teacher_forcing_ragged", SMALL)
    dtype = F32
    served(shape, backend, dtype)
    inputs, tangents = draw(shape, 11, dtype), draw(shape, 12, dtype)
    first, second = (measure(shape, backend, inputs, tangents)[0] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_rows_that_see_nothing_give_zeros(backend):
    shape = case("empty_rows", SMALL)
    served(shape, backend, F32)
    inputs, tangents = draw(shape, 13), draw(shape, 14)
    (o, lse, do, dlse, grads), _ = measure(shape, backend, inputs, tangents)
    blind = ~oracle.allowed(shape)["own"].any(1)
    assert blind.any() and not blind.all()
    for x in (o, do, grads["q"]):
        assert not np.asarray(x)[:, blind].any()
    assert np.all(np.asarray(lse)[..., blind] == -np.inf)
    assert not np.asarray(dlse)[..., blind].any()


def test_the_comparison_has_power():
    """One key more for one row in three shows."""
    shape = case("empty_rows", SMALL)
    ((lo, hi),) = shape.mask.own
    other = dataclasses.replace(shape, mask=Intervals(own=((lo, hi + 1),)))
    inputs = draw(shape, 15)
    o, _ = caller(shape, "chunked")(inputs)
    assert oracle.relative_error(o, oracle.Oracle(shape, inputs).o) < F32_TOLERANCE
    assert oracle.relative_error(o, oracle.Oracle(other, inputs).o) > 1e-2
