"""The derivative rule under JAX's transformations, for every backend; compared with the plain implementation."""

import functools
import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import (
    LSE_NAME,
    OUTPUT_NAME,
    BlockCausal,
    Cached,
    Captioned,
    Intervals,
    TeacherForcing,
    attention,
    autodiff,
)

TOKENS, HEADS, DIM, CHUNK = 96, 2, 64, 32
MASK = TeacherForcing(CHUNK, CHUNK)
ROUNDED = ("mosaic_gpu",)
NAMED = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME, LSE_NAME)


@pytest.fixture
def tiled(backend):
    """A backend with kernels of its own."""
    if backend == "reference":
        pytest.skip("the plain implementation has no derivative rule")
    return backend


def normal(seed, *shape, scale=1.0):
    return scale * jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def stream(seed):
    return normal(seed, 1, TOKENS, HEADS, DIM)


def network(weights, x, clean, implementation, unroll=False, policy="none", one_pass=False):
    """Layers of teacher-forcing attention: the clean stream sees itself, the noisy one sees it and its own chunk."""

    def layer(streams, w):
        x, clean = streams
        k = clean @ w
        clean_out = attend(clean, k, clean, mask=BlockCausal(CHUNK, CHUNK), implementation=implementation)
        out = attend(x @ w, x @ w, x, context=(k, clean), mask=MASK, implementation=implementation, one_pass=one_pass)
        return (x + out, clean + clean_out), None

    if policy != "none":
        layer = jax.checkpoint(layer, policy=policy)
    if unroll:
        streams = (x, clean)
        for w in weights:
            streams, _ = layer(streams, w)
        return streams[0]
    return jax.lax.scan(layer, (x, clean), weights)[0][0]


def consistency_loss(weights, x, clean, dx, implementation, **how):
    """The shape of a continuous-time consistency loss: one pass gives value and tangent, the tangent is a target."""
    y, dy = jax.jvp(lambda x: network(weights, x, clean, implementation, **how), (x,), (dx,))
    return jnp.mean((y - jax.lax.stop_gradient(y - 0.1 * dy)) * jnp.cos(y) + 0.01 * y**2)


def attend(q, k, v, *, context=None, implementation, **how):
    """`attention` on float32 streams; a backend that has only low precision gets its inputs rounded."""
    if implementation not in ROUNDED:
        return attention(q, k, v, context=context, implementation=implementation, **how)
    q, k, v, context = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (q, k, v, context))
    return attention(q, k, v, context=context, implementation=implementation, **how).astype(jnp.float32)


def close(a, b, backend=None):
    tolerance = 3e-2 if backend in ROUNDED else 5e-5  # nearly one-hot rows: plain float32 is itself 6e-6 from exact
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), np.linalg.norm(x - y) / np.linalg.norm(y)


WEIGHTS = normal(0, 3, DIM, DIM, scale=DIM**-0.5)
ARGS = (WEIGHTS, stream(1), stream(2), stream(3))


@functools.cache
def expected_gradient():
    return jax.jit(jax.grad(functools.partial(consistency_loss, implementation="reference")))(*ARGS)


@pytest.fixture
def one_pass(tiled, monkeypatch):
    """Sees to it that the backend has a kernel for forward and tangent together."""
    module = importlib.import_module(f"pallas_kernels.attention.{tiled}")
    calls = []

    def forward_tangent(q, segments, scale, dq, dsegments):
        calls.append(None)
        o, lse = module.forward(q, segments, scale)
        return o, lse, *module.tangent(q, segments, scale, o, lse, dq, dsegments)

    if not hasattr(module, "forward_tangent"):
        monkeypatch.setattr(module, "forward_tangent", forward_tangent, raising=False)
        yield tiled
        assert calls
    else:
        yield tiled


@pytest.mark.parametrize(
    "how",
    [{}, {"unroll": True}, {"policy": None}, {"policy": NAMED}],
    ids=["scan", "unrolled", "scan_remat", "scan_remat_names"],
)
def test_gradient_of_a_consistency_loss(tiled, how):
    loss = functools.partial(consistency_loss, implementation=tiled, **how)
    close(jax.jit(jax.grad(loss))(*ARGS), expected_gradient(), tiled)


@pytest.mark.parametrize("how", [{"policy": NAMED}, {"unroll": True}], ids=["scan_remat_names", "unrolled"])
def test_gradient_of_a_consistency_loss_in_one_pass(one_pass, how):
    loss = functools.partial(consistency_loss, implementation=one_pass, one_pass=True, **how)
    close(jax.jit(jax.grad(loss))(*ARGS), expected_gradient(), one_pass)


def test_second_derivatives_of_one_pass(one_pass):
    x, clean, dx = (a[:, :64] for a in ARGS[1:])

    def tangent(x, clean, implementation):
        def call(x):
            k = 0.5 * x
            return attend(x, k, x, context=(k, clean), mask=MASK, implementation=implementation, one_pass=True)

        return jnp.vdot(jax.jvp(call, (x,), (dx,))[1], dx)

    def gradients(implementation):
        return jax.jit(jax.grad(functools.partial(tangent, implementation=implementation), (0, 1)))(x, clean)

    close(gradients(one_pass), gradients("reference"), one_pass)


def test_one_pass_refuses_reverse_mode(one_pass):
    """An error from JAX, whose wording depends on where tracing stops; never a wrong gradient."""
    x = ARGS[1][:, :32]
    with pytest.raises(ValueError):
        jax.grad(lambda x: attend(x, x, x, implementation=one_pass, one_pass=True).sum())(x)


def test_linearize_and_transpose(tiled):
    x, clean, dx = ARGS[1:]

    def call(x, implementation=tiled):
        return attend(x, 0.5 * x, x, context=(clean, clean), mask=MASK, implementation=implementation)

    @jax.jit
    def derivatives():
        y, push = jax.linearize(call, x)
        return (y, push(dx)), jax.linear_transpose(push, x)(dx)

    plain = functools.partial(call, implementation="reference")
    close(derivatives(), jax.jit(lambda: (jax.jvp(plain, (x,), (dx,)), jax.vjp(plain, x)[1](dx)))(), tiled)


def test_without_jit():
    x, _, dx = ARGS[1:]
    call = functools.partial(attend, mask=BlockCausal(CHUNK, CHUNK))
    plain = functools.partial(call, implementation="reference")
    tiled = functools.partial(call, implementation="chunked")
    close(jax.jvp(tiled, (x, x, x), (dx, dx, dx)), jax.jvp(plain, (x, x, x), (dx, dx, dx)))


def test_second_derivatives_are_right(tiled):
    x, clean, dx = ARGS[1:]
    x, clean, dx = x[:, :64], clean[:, :64], dx[:, :64]
    g = stream(5)[:, :64]

    def along(implementation):
        def call(x, clean):
            k = clean * 0.7
            return attend(x, 0.5 * x, x, context=(k, clean), mask=MASK, implementation=implementation)

        def tangent(x, clean):
            return jax.jvp(lambda x: call(x, clean), (x,), (dx,))[1]

        forward = jax.jvp(tangent, (x, clean), (g, dx))[1]
        reverse = jax.vjp(tangent, x, clean)[1](g)
        return forward, reverse

    close(jax.jit(lambda: along(tiled))(), jax.jit(lambda: along("reference"))(), tiled)


def test_a_gradient_of_a_gradient_is_an_error(tiled):
    x = ARGS[1][:, :32]

    def gradient(x):
        return jax.grad(lambda x: attend(x, x, x, implementation=tiled).sum())(x)

    with pytest.raises(AssertionError):
        jax.make_jaxpr(jax.grad(lambda x: gradient(x).sum()))(x)


def test_unused_second_derivatives_cost_nothing():
    """The plain implementation, which second derivatives go through, is not in the compiled gradient."""
    loss = functools.partial(consistency_loss, implementation="chunked", policy=NAMED)
    compiled = jax.jit(jax.grad(loss)).lower(*ARGS).compile()
    first_order = jax.jit(jax.grad(lambda *a: jnp.mean(network(*a[:3], "chunked", policy=NAMED) ** 2))).lower(*ARGS)
    tangent_only = jax.jit(lambda *a: consistency_loss(*a, "chunked")).lower(*ARGS)
    flops = [c.cost_analysis()["flops"] for c in (compiled, first_order.compile(), tangent_only.compile())]
    assert flops[0] < 1.1 * (flops[1] + flops[2])


def _kernel_calls(function, *args):
    """Which backend functions run, with which tangents and gradients, when `function` is traced."""
    from pallas_kernels.attention import chunked

    seen = []
    real = chunked.tangent, chunked.backward

    def tangent(q, segments, scale, o, lse, dq, dsegments):
        seen.append(("tangent", jax.tree.map(lambda x: x is not None, (dq, dsegments), is_leaf=lambda x: x is None)))
        return real[0](q, segments, scale, o, lse, dq, dsegments)

    def backward(q, segments, scale, o, lse, do, dlse, wanted):
        seen.append(("backward", wanted))
        return real[1](q, segments, scale, o, lse, do, dlse, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "tangent", tangent)
        patch.setattr(chunked, "backward", backward)
        jax.make_jaxpr(function)(*args)
    return seen


def test_a_context_without_tangent_costs_nothing():
    x, clean, dx = ARGS[1:]

    def call(x, clean):
        return attend(x, x, x, context=(clean, clean), mask=MASK, implementation="chunked").sum()

    layers = functools.partial(network, implementation="chunked")
    want = (True, ((True, True), (False, False)))
    assert _kernel_calls(lambda x: jax.jvp(lambda x: call(x, clean), (x,), (dx,)), x) == [("tangent", want)]
    calls = _kernel_calls(lambda x: jax.jvp(lambda x: layers(WEIGHTS, x, clean), (x,), (dx,)), x)
    assert calls and all(c == ("tangent", want) for c in calls)
    backward = [c for c in _kernel_calls(jax.grad(call), x, clean) if c[0] == "backward"]
    assert backward == [("backward", want)]


def test_saved_names_spare_the_forward_kernel():
    """With output and log-sum-exp kept, the backward pass holds no third forward kernel."""
    x, clean, _ = ARGS[1:]

    def gradient(policy):
        def block(x):
            call = attend(x, x, x, context=(clean, clean), mask=MASK, implementation="chunked")
            return jnp.sin(call)

        f = jax.checkpoint(block, policy=policy)
        return jax.jit(jax.grad(lambda x: f(x).sum())).lower(x).compile().as_text().count(" while(")

    assert gradient(NAMED) < gradient(None)


def captioned(clean, lengths, tokens=17):
    """A batch of three whose captions differ in length, ahead of the clean stream."""
    return jnp.concatenate([clean[:, :tokens], clean], axis=1), Captioned(MASK, lengths, tokens)


def captioned_gradients(lengths, implementation, **how):
    x, clean, dx = (normal(seed, 3, TOKENS, HEADS, DIM) for seed in (4, 5, 6))

    def loss(x, clean):
        context, mask = captioned(clean, lengths)

        def call(x):
            k = x[:, :, :1] * 0.5
            pair = context[:, :, :1] * 0.7, context[:, :, 1:]
            return attend(x, k, x[:, :, 1:], context=pair, mask=mask, implementation=implementation, **how)

        y, dy = jax.jvp(call, (x,), (dx,))
        return jnp.mean((y - jax.lax.stop_gradient(y - 0.1 * dy)) * jnp.cos(y) + 0.01 * y**2)

    return jax.value_and_grad(loss, (0, 1))(x, clean)


@functools.cache
def expected_over_captions():
    return jax.jit(functools.partial(captioned_gradients, implementation="reference"))(jnp.int32([17, 0, 5]))


@pytest.mark.parametrize("how", [{}, {"one_pass": True}], ids=["two_passes", "one_pass"])
def test_a_consistency_loss_over_captions_of_different_lengths(tiled, how):
    """Lengths are traced; queries have twice as many heads as keys."""
    gradients = jax.jit(functools.partial(captioned_gradients, implementation=tiled, **how))
    close(gradients(jnp.int32([17, 0, 5])), expected_over_captions(), tiled)
    with pytest.raises(AssertionError):  # captions exchanged show
        close(gradients(jnp.int32([17, 5, 0])), expected_over_captions(), tiled)


def test_second_derivatives_with_rows_of_each_entry(tiled):
    """More queries than the plain implementation takes at a time."""
    x, dx, g = (normal(seed, 2, 160, 1, 16) for seed in (4, 5, 6))
    mask = Intervals(own=((np.int32([[0], [30]]), np.arange(160) + np.int32([[5], [90]])),))

    def tangent(x, implementation):
        return jax.jvp(lambda x: attend(x, 0.5 * x, x, mask=mask, implementation=implementation), (x,), (dx,))[1]

    def pulled(implementation):
        return jax.jit(lambda x: jax.vjp(functools.partial(tangent, implementation=implementation), x)[1](g))(x)

    if tiled in ROUNDED:
        pytest.skip("head dim 16")
    close(pulled(tiled), pulled("reference"), tiled)


def test_traced_masks(tiled):
    x, clean, dx = ARGS[1:]

    def chunk(x, stop, implementation):
        mask = Cached(stop, start=8, sink=4)
        return attend(x, x, x, context=(clean, clean), mask=mask, implementation=implementation)

    def both(implementation):
        def derivative(stop):
            f = functools.partial(chunk, stop=stop, implementation=implementation)
            return jax.jvp(f, (x[:, :32],), (dx[:, :32],)), jax.grad(lambda x: f(x).sum())(x[:, :32])

        return jax.jit(lambda: jax.lax.map(derivative, jnp.array([0, 20, 96])))()

    close(both(tiled), both("reference"), tiled)


def test_chunks_one_by_one_are_the_whole(backend):
    x = stream(6)
    whole = attend(x, x, x, mask=BlockCausal(CHUNK, CHUNK), implementation=backend)

    def one(i):
        q = jax.lax.dynamic_slice_in_dim(x, i * CHUNK, CHUNK, 1)
        by_offset = attend(q, x, x, mask=BlockCausal(CHUNK, CHUNK, offset=i), implementation=backend)
        by_cache = attend(q, q, q, context=(x, x), mask=Cached(i * CHUNK), implementation=backend)
        return by_offset, by_cache

    by_offset, by_cache = jax.lax.map(one, jnp.arange(TOKENS // CHUNK))
    for parts in (by_offset, by_cache):
        close(jnp.concatenate(list(parts), axis=1), whole, backend)


def test_memory_grows_with_length_not_its_square():
    def temporaries(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 1, 64), jnp.float32)

        def loss(x):
            return attend(x, x, x, mask=BlockCausal(tokens // 4, tokens // 4), implementation="chunked").sum()

        return jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(32768) < 2.2 * temporaries(16384)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from pallas_kernels.attention import attention, TeacherForcing
mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
x, clean, dx = (jnp.asarray(rng.normal(size=(2, 96, 4, 32)), jnp.float32) for _ in range(3))
def call(x, clean):
    return attention(x, x, x, context=(clean, clean), mask=TeacherForcing(32, 32), implementation="chunked")
spec = P("data", None, "heads")
split = jax.shard_map(call, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
def derivatives(f):
    loss = lambda x: jnp.vdot(f(x, clean), dx)
    return jax.jvp(lambda x: f(x, clean), (x,), (dx,)), jax.grad(loss)(x)
a, b = jax.jit(lambda: derivatives(split))(), jax.jit(lambda: derivatives(call))()
jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=2e-4, atol=2e-5), a, b)
print("equal on", len(jax.devices()), "devices")
"""


def test_shard_map_over_data_and_heads():
    run = subprocess.run(
        [sys.executable, "-c", "import jax; jax.config.update('jax_num_cpu_devices', 4)\n" + SHARDED],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "JAX_PLATFORMS": "cpu"},
    )
    assert "equal on 4 devices" in run.stdout, run.stderr[-2000:]


def test_only_perturbed_inputs_are_linear():
    """A constant tangent among the linear arguments would break transposition in unrolled layers."""
    x, clean, dx = ARGS[1:]

    def call(x):
        return attend(x, clean, clean, mask=BlockCausal(CHUNK, CHUNK), implementation="chunked")

    jaxpr = jax.make_jaxpr(lambda x: jax.jvp(call, (x,), (dx,)))(x)
    assert autodiff.OUTPUT_NAME in str(jaxpr)
    (y, pullback) = jax.vjp(call, x)
    assert pullback(y)[0].shape == x.shape
