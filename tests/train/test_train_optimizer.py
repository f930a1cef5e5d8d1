"""AdamW against arithmetic written out by hand in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from crcm_jax.train.optimizer import Optimizer

SETTINGS = {"lr": 3e-3, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "warmup": 4, "grad_clip": 0.0}


def reference(params, grads, s, master_of=lambda w: w):
    """The AdamW of spec causal_rcm 7.1 in float64; `params` and each of `grads` are flat vectors."""
    w, m, v = params.astype(np.float64), 0.0, 0.0
    out = []
    for k, g in enumerate(grads):
        g = g.astype(np.float64)
        if s["grad_clip"]:
            g = g * min(1.0, s["grad_clip"] / np.linalg.norm(g))
        m = s["b1"] * m + (1 - s["b1"]) * g
        v = s["b2"] * v + (1 - s["b2"]) * g**2
        lr = s["lr"] * (1e-6 + (1 - 1e-6) * min(1.0, k / s["warmup"]))
        step = (m / (1 - s["b1"] ** (k + 1))) / (np.sqrt(v / (1 - s["b2"] ** (k + 1))) + s["eps"])
        w = w - lr * (step + s["weight_decay"] * w)
        out.append(w)
    return out


def run(settings, dtype, steps=9):
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(size=12), dtype)
    grads = [jnp.asarray(rng.normal(size=12) * 3, dtype) for _ in range(steps)]
    optimizer = Optimizer(**settings)
    # Two leaves, so that decay and the clip's norm must reach all of them.
    params = {"w": start[:8].reshape(2, 4), "bias": start[8:]}
    state = optimizer.init(params)
    update, seen = jax.jit(optimizer.update), []
    for g in grads:
        params, state = update({"w": g[:8].reshape(2, 4), "bias": g[8:]}, state, params)
        seen.append((params, state))
    expected = reference(np.asarray(start, np.float64), [np.asarray(g, np.float64) for g in grads], settings)
    return start, seen, expected


def flat(tree):
    return np.concatenate([np.asarray(tree["w"], np.float64).ravel(), np.asarray(tree["bias"], np.float64)])


@pytest.mark.parametrize("changes", [{}, {"b1": 0.0}, {"grad_clip": 1.0}], ids=["plain", "b1=0", "clipped"])
def test_float32_follows_the_reference(changes):
    _, seen, expected = run(SETTINGS | changes, jnp.float32)
    for (params, state), want in zip(seen, expected):
        # nine float32 updates of values near one: a few roundings of 6e-8
        np.testing.assert_allclose(flat(params), want, rtol=0, atol=1e-6)
        assert state.master is None


@pytest.mark.parametrize("key", ["b1", "b2", "weight_decay", "warmup", "lr"])
def test_the_comparison_has_power(key):
    _, seen, _ = run(SETTINGS, jnp.float32)
    _, _, other = run(SETTINGS | {key: SETTINGS[key] * (2 if key in ("warmup", "lr") else 0.9)}, jnp.float32)
    assert np.abs(flat(seen[-1][0]) - other[-1]).max() > 1e-5


def test_bfloat16_params_are_the_rounded_master():
    start, seen, expected = run(SETTINGS | {"lr": 1e-4}, jnp.bfloat16)
    for (params, state), want in zip(seen, expected):
        np.testing.assert_allclose(flat(state.master), want, rtol=0, atol=1e-6)
        for name in params:
            assert params[name].dtype == jnp.bfloat16 and state.master[name].dtype == jnp.float32
            np.testing.assert_array_equal(params[name], state.master[name].astype(jnp.bfloat16))
        assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state.adam))
    # Updates too small for bfloat16 add up in the master: without it nothing would have moved far.
    moved = np.abs(flat(seen[-1][1].master) - np.asarray(start, np.float64))
    assert 0 < moved.max() < 1e-3


def test_warm_up_starts_at_a_millionth_and_then_stays():
    optimizer = Optimizer(lr=2.0, warmup=100)
    rates = [float(optimizer.learning_rate(jnp.int32(k))) for k in (0, 50, 100, 5000)]
    np.testing.assert_allclose(rates, [2e-6, 1.000001, 2.0, 2.0], rtol=1e-6)


def test_settings_come_from_the_config():
    section = ConfigDict({**SETTINGS, "accumulate": 4})
    assert Optimizer.from_config(section) == Optimizer(**SETTINGS)
