"""The tangent of the network along (x, t): right, and free of charge for the context of teacher forcing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import TeacherForcing
from crcm_jax.models.bound import Bound
from pallas_kernels.attention import chunked

PATTERN, FRAMES = ChunkPattern(1, 2), 5
BATCH = 2


def problem(dtype):
    """x, t, context and the tangent (dx, 1)."""
    x, c, dx = (tiny.latents(seed, BATCH, FRAMES, dtype) for seed in (1, 2, 3))
    t = np.random.default_rng(4).uniform(0.2, 0.8, size=(BATCH, 1)).astype(dtype)
    return x, t, (c, np.zeros((BATCH, 1), dtype)), dx, tiny.condition(batch=BATCH, dtype=dtype)


def tangent_of(network, params, context, cond):
    """(x, t, dx) ↦ velocity and its derivative along (dx, 1), as TF-sCM asks for it."""

    def along(x, t, dx):
        f = lambda x, t: Bound(network, params).velocity(x, t, cond, TeacherForcing(*context))  # noqa: E731
        return jax.jvp(f, (x, t), (dx, jnp.ones_like(t)))

    return along


def test_the_tangent_is_the_derivative(x64):
    """The tiled attention's own rule against central differences, against JAX's autodiff of plain attention, and
    against its own transpose."""
    tiled, plain = (tiny.wan(PATTERN, "float64", attention=name) for name in ("chunked", "reference"))
    params = tiny.parameters(plain, dtype=np.float64)
    x, t, context, dx, cond = problem(np.float64)
    value, tangent = tiny.jit(tangent_of(tiled, params, context, cond))(x, t, dx)

    velocity = tiny.jit(lambda h: Bound(plain, params).velocity(x + h * dx, t + h, cond, TeacherForcing(*context)))
    assert tiny.relative(value, velocity(0.0)) < 1e-13

    def differences(h):
        return np.asarray(velocity(h) - velocity(-h)) / (2 * h)

    # Richardson: D(h/2) + (D(h/2) − D(h))/3 has error O(h⁴), and halving h once more shows how large it is. 1000·t
    # makes the network's fastest oscillation 1000 radians a unit of time.
    coarse, middle, fine = (differences(h) for h in (8e-5, 4e-5, 2e-5))
    first, second = middle + (middle - coarse) / 3, fine + (fine - middle) / 3
    own_error = tiny.relative(first, second)
    assert own_error < 1e-5
    assert tiny.relative(tangent, second) < own_error

    _, autodiff = tiny.jit(tangent_of(plain, params, context, cond))(x, t, dx)
    assert tiny.relative(tangent, autodiff) < 1e-12

    # ⟨w, J·u⟩ = ⟨Jᵀ·w, u⟩, with Jᵀ from the backward kernel.
    w = tiny.latents(9, BATCH, FRAMES, np.float64)
    f = lambda x, t: jnp.vdot(w, Bound(tiled, params).velocity(x, t, cond, TeacherForcing(*context)))  # noqa: E731
    back_x, back_t = tiny.jit(jax.grad(f, (0, 1)))(x, t)
    expected = float(jnp.vdot(w, tangent))
    assert abs(float(jnp.vdot(back_x, dx) + back_t.sum()) - expected) < 1e-12 * abs(expected) * 10
    # Power: the time's part is not negligible.
    assert abs(float(back_t.sum())) > 0.1 * abs(expected)


def test_the_tangent_in_float32():
    """Against float64. The angles 1000·t carry a rounding of 3e-5 radians into the time embedding."""
    with jax.enable_x64(True):
        wide = tiny.wan(PATTERN, "float64", attention="reference")
        params = tiny.parameters(wide)
        problem64 = [jax.tree.map(lambda z: np.asarray(z, np.float64), part) for part in problem(np.float32)]
        x, t, context, dx, cond = problem64
        params64 = jax.tree.map(lambda z: z.astype(np.float64), params)
        expected = np.asarray(tiny.jit(tangent_of(wide, params64, context, cond))(x, t, dx)[1])
    x, t, context, dx, cond = problem(np.float32)
    for attention in ("chunked", "reference"):
        network = tiny.wan(PATTERN, attention=attention)
        tangent = tiny.jit(tangent_of(network, params, context, cond))(x, t, dx)[1]
        assert tiny.relative(tangent, expected) < 3e-5


# Structural zeros.


def multiplications(function, *args) -> int:
    """Multiply–adds of every dot_general in the traced program, loops counted as often as they run."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                contracted, _ = eqn.params["dimension_numbers"]
                shape = eqn.invars[0].aval.shape
                total += eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted[0])
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * count(inner)
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def tangent_work(network, params, x, t, context, dx, cond, move_context=False):
    """Multiplications that the tangent adds to the forward pass."""
    c, t_c = context

    def forward(x, t, c):
        return Bound(network, params).velocity(x, t, cond, TeacherForcing(c, t_c))

    def with_tangent(x, t, c, dx):
        if move_context:
            return jax.jvp(forward, (x, t, c), (dx, jnp.ones_like(t), dx))
        return jax.jvp(lambda x, t: forward(x, t, c), (x, t), (dx, jnp.ones_like(t)))

    return multiplications(with_tangent, x, t, c, dx) - multiplications(forward, x, t, c)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_the_context_costs_no_tangent_work(remat):
    """Counted in the program: the tangent's multiplications are, to the last one, those of the noisy half alone."""
    network = tiny.wan(PATTERN, attention="reference", remat=remat)
    params = tiny.parameters(network)
    x, t, context, dx, cond = problem(np.float32)
    c, tokens, words = network.config, FRAMES * (tiny.HEIGHT // 2) * (tiny.WIDTH // 2), cond.prompt["text"].shape[1]
    patch = math.prod(c.patch)
    # One time a sample: the six-way projection is per sample, not per frame. Per token, everything linear once.
    outside = tokens * c.dim * patch * (c.in_channels + c.out_channels) + c.dim * (c.freq_dim + 7 * c.dim)
    linear = tokens * (4 * c.dim**2 + 2 * c.dim**2 + 2 * c.dim * c.ffn_dim)
    # A product a·b of attention has the tangent ȧ·b + a·ḃ: both terms over the own keys, one over those that do not
    # move (context, text), for scores and for values alike.
    attention = 2 * tokens * c.dim * (2 * tokens + 1 * tokens + 1 * words)
    expected = BATCH * (outside + c.layers * (linear + attention))
    assert tangent_work(network, params, x, t, context, dx, cond) == expected
    # Power: a context that does move costs about as much again.
    assert tangent_work(network, params, x, t, context, dx, cond, move_context=True) > 1.7 * expected


@pytest.mark.parametrize("placement", [tiny.ONE_DEVICE, tiny.CUT], ids=["one", "cut"])
def test_attention_sees_no_tangent_of_the_context(monkeypatch, placement):
    """The tiled backend is told, while tracing, which tangents there are: none of the context, none of the text."""
    network = tiny.wan(PATTERN, attention="chunked", placement=placement)
    params = tiny.parameters(network)
    x, t, context, dx, cond = problem(np.float32)
    seen = []
    for name in ("tangent", "forward_tangent"):
        if original := getattr(chunked, name, None):

            def spy(q, segments, scale, *rest, original=original):
                dq, dsegments = rest[-2:]
                seen.append((len(segments), dq is not None, [tuple(d is not None for d in pair) for pair in dsegments]))
                return original(q, segments, scale, *rest)

            monkeypatch.setattr(chunked, name, spy)
    program = str(jax.make_jaxpr(tangent_of(network, params, context, cond))(x, t, dx))
    # Queries, keys, values and outputs, of the context, of the target and of the target's tangent.
    assert program.count(" all_to_all[") == (12 if placement is tiny.CUT else 0)
    own_and_context = (2, True, [(True, True), (False, False)])
    text = (1, True, [(False, False)])
    assert own_and_context in seen and text in seen
    # Nothing else moves: the context's own attention has no tangent at all.
    assert all(call in (own_and_context, text) for call in seen)
