"""The laws of averaging weights, against their closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax.recipes.averages import Decay, Power


def test_exponent():
    assert Power(0.1).exponent == pytest.approx(6.9372, abs=5e-5)
    for rate in (0.05, 0.2):
        gamma = Power(rate).exponent
        # the defining property: the profile t^γ on [0, 1] has this standard deviation
        assert np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(rate)
    with pytest.raises(ValueError, match=r"ema\.rate 0\.5"):
        Power(0.5)


def averaged(law, values):
    """The average of parameters that are `values` `[update, …]` in turn, begun with something far off."""
    average = {"x": jnp.full(values.shape[1:], 1e6)}
    for i, value in enumerate(values):
        average = law.update(average, {"x": jnp.asarray(value)}, jnp.int32(i))
    return average["x"]


def test_average_is_the_closed_form():
    """Unrolled, update k's parameters have weight (1 − β_k)·Π_{j>k} β_j = ((k+1)^(γ+1) − k^(γ+1)) / n^(γ+1)."""
    law, n = Power(0.1), 40
    values = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    power = np.arange(n + 1, dtype=np.float64) ** (law.exponent + 1)
    np.testing.assert_allclose(averaged(law, values), np.diff(power) / power[-1] @ values, rtol=0, atol=2e-6)


def test_average_reads_the_rounded_parameters():
    params = {"x": jnp.asarray([1.001, 2.003], jnp.bfloat16)}
    average = Power(0.1).update({"x": jnp.full(2, 1e9)}, params, jnp.int32(0))
    assert average["x"].dtype == jnp.float32
    np.testing.assert_array_equal(average["x"], params["x"].astype(jnp.float32))


def test_late_updates_keep_their_digits():
    law = Power(0.1)
    exact = -np.expm1((law.exponent + 1) * np.log1p(-1.0 / 100_001))
    assert float(law.share(jnp.int32(100_000))) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("start", [1, 3])
def test_decay_forgets_at_one_rate_from_its_start_on(start):
    """Update k's parameters have weight (1 − β)·β^(n − 1 − k), the last before the start what is left."""
    beta, n = 0.8, 9
    values = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    weights = (1 - beta) * beta ** np.arange(n - 1, -1, -1.0)
    weights[: start - 1], weights[start - 1] = 0, beta ** (n - start)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(averaged(Decay(beta, start), values), weights @ values, rtol=0, atol=2e-6)
