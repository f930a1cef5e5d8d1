"""Rectified flow, TrigFlow and time distributions against formulas in NumPy (spec causal_rcm 1, 2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from crcm_jax import flow

DRAWS = 20_000
KS = 1.95 / np.sqrt(DRAWS)
"""Kolmogorov–Smirnov distance exceeded by chance once in a thousand; the seeds are fixed."""


def distance(draws, cdf):
    return stats.kstest(np.asarray(draws, np.float64).ravel(), cdf).statistic


def test_the_straight_path(x64):
    """x0, ε and v from each other; one Euler step along a constant velocity is exact."""
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 3, 4, 5, 6, 2))
    t = rng.uniform(size=(3, 4))
    wide = t[:, :, None, None, None]
    x, v = flow.interpolate(x0, noise, t), noise - x0
    np.testing.assert_allclose(x, (1 - wide) * x0 + wide * noise, atol=1e-14)
    np.testing.assert_allclose(flow.to_clean(x, v, t), x0, atol=1e-14)
    np.testing.assert_allclose(flow.to_noise(x, v, t), noise, atol=1e-14)
    np.testing.assert_allclose(flow.euler(x, v, t, t / 3), flow.interpolate(x0, noise, t / 3), atol=1e-14)
    np.testing.assert_allclose(flow.euler(x, v, 0.7, 0.2), x - 0.5 * v, atol=1e-14)


def test_shift_and_its_inverse():
    u = np.linspace(0, 1, 11)
    for s in (1.0, 3.0, 5.0):
        np.testing.assert_allclose(flow.shift(u, s), s * u / (1 + (s - 1) * u))
        np.testing.assert_allclose(flow.unshift(flow.shift(u, s), s), u, atol=1e-15)
    np.testing.assert_array_equal(flow.shift(u, 0), u)
    np.testing.assert_array_equal(flow.unshift(u, -1.0), u)
    # The few-step times are shifted quarters (spec causal_rcm 2), and so is `shift3_backward`.
    np.testing.assert_allclose(flow.shift(np.array([3, 2, 1]) / 4, 5.0), [15 / 16, 5 / 6, 5 / 8])
    np.testing.assert_allclose(flow.shift(np.array([3, 2, 1]) / 4, 3.0), [0.9, 0.75, 0.5])


def test_trigonometric_time(x64):
    """θ = arctan(t/(1−t)) and back; the listed trig times are the listed flow times (spec causal_rcm 2)."""
    t = np.linspace(0, 1, 101)
    np.testing.assert_allclose(flow.trig_to_flow(flow.flow_to_trig(t)), t, atol=1e-15)
    assert float(flow.flow_to_trig(1.0)) == np.pi / 2
    np.testing.assert_allclose(flow.trig_to_flow(np.array([1.5, 1.4, 1.0])), [0.93378, 0.85290, 0.60898], atol=5e-6)


def test_trigonometric_velocity_is_the_wrapper(x64):
    """The closed form of spec causal_rcm 1.2 equals its table c_skip, c_out, c_in and (cosθ·x − x0)/sinθ."""
    rng = np.random.default_rng(1)
    theta = rng.uniform(0.05, np.pi / 2, size=(3, 1))
    x = rng.normal(size=(3, 2, 1, 1, 4))
    wide = theta[:, :, None, None, None]
    cos, sin = np.cos(wide), np.sin(wide)
    a = cos + sin

    def net(z, t):
        return np.tanh(z) + 3 * t * z

    x0 = x / a + (-sin / a) * net(x / a, sin / a)
    table = (cos * x - x0) / sin
    # Dividing by sinθ ≥ 0.05 costs at most two of sixteen digits.
    np.testing.assert_allclose(flow.trig_velocity(net(x / a, sin / a), x, theta), table, atol=1e-13)


@pytest.mark.parametrize(
    ("distribution", "cdf"),
    [
        (flow.UniformShift(5.0), lambda t: t / (5 - 4 * t)),
        (flow.LogNormal(-0.8, 1.6), lambda t: stats.norm.cdf((np.log(t / (1 - t)) + 0.8) / 1.6)),
        (flow.LogNormal(0.7, 0.5), lambda t: stats.norm.cdf((np.log(t / (1 - t)) - 0.7) / 0.5)),
    ],
)
def test_times_follow_their_distribution(distribution, cdf, x64):
    """Draws, cdf and quantile, each against the formula; a neighbouring distribution is told apart."""
    draws = flow.sample_times(jax.random.key(0), distribution, (DRAWS,), jnp.float64)
    assert float(draws.min()) >= 0 and float(draws.max()) <= 1
    assert distance(draws, cdf) < KS
    assert distance(draws, lambda t: cdf(np.clip(t * 1.1, 1e-9, 1 - 1e-9))) > 2 * KS
    u = np.linspace(0.001, 0.999, 99)
    np.testing.assert_allclose(distribution.cdf(draws[:99]), cdf(np.asarray(draws[:99])), atol=1e-12)
    np.testing.assert_allclose(cdf(np.asarray(distribution.quantile(u))), u, atol=1e-9)


def test_time_distributions_by_name():
    assert flow.time_distribution("uniform_shift", s=2.0) == flow.UniformShift(2.0)
    assert flow.time_distribution("log_normal", mean=1.0, std=2.0) == flow.LogNormal(1.0, 2.0)
    with pytest.raises(ValueError, match="'gauss' is not one of uniform_shift, log_normal"):
        flow.time_distribution("gauss")


@pytest.mark.parametrize("distribution", [flow.UniformShift(5.0), flow.LogNormal(-0.8, 1.6)])
def test_fopp_is_its_definition(distribution, x64):
    """Rows are non-decreasing, and every chunk's time and every gap have the law of a literal second construction:
    a uniform anchor chunk whose time keeps the distribution, sorted uniforms below and above it."""
    n = 5
    t = np.asarray(flow.fopp_times(jax.random.key(1), distribution, DRAWS, n), np.float64)
    assert (np.diff(t, axis=1) >= 0).all()
    assert len(np.unique(t[0])) == n
    rng = np.random.default_rng(0)
    expected = np.empty((DRAWS, n))
    for row, f in zip(expected, rng.integers(0, n, DRAWS)):
        row[f] = rng.uniform()
        row[:f] = np.sort(rng.uniform(0, row[f], f))
        row[f + 1 :] = np.sort(rng.uniform(row[f], 1, n - 1 - f))
    u = np.asarray(distribution.cdf(t))
    two_samples = KS * np.sqrt(2)
    for j in range(n):
        assert stats.ks_2samp(u[:, j], expected[:, j]).statistic < two_samples
    for gap, other in zip(np.diff(u).T, np.diff(expected).T):
        assert stats.ks_2samp(gap, other).statistic < two_samples
    # Power: independent sorted times, which have no anchor, are another law.
    assert stats.ks_2samp(u[:, 0], np.sort(rng.uniform(size=(DRAWS, n)), 1)[:, 0]).statistic > 5 * two_samples


def test_fopp_of_one_chunk_is_the_plain_distribution(x64):
    t = flow.fopp_times(jax.random.key(2), flow.UniformShift(5.0), DRAWS, 1)
    assert distance(t, lambda t: t / (5 - 4 * t)) < KS


def test_consistency_times_are_neighbouring_levels(x64):
    """u ~ U[0, 1 − n/48), t_k = shift(1 − (u + k/48); 3): spaced by 1/48 before the shift, never below 0."""
    for steps in (1, 3):
        t = np.asarray(flow.consistency_times(jax.random.key(3), DRAWS, steps, 48, 3.0))
        u = 1 - t / (3 - 2 * t)
        assert t.shape == (DRAWS, steps + 1) and (t >= 0).all()
        np.testing.assert_allclose(np.diff(u, axis=1), 1 / 48, atol=1e-12)
        assert distance(u[:, 0] / (1 - steps / 48), lambda p: np.clip(p, 0, 1)) < KS


def test_gaussian_bell():
    """exp(−2(t−½)²) − exp(−½): nothing at both ends, 1 − exp(−½) in the middle."""
    t = jnp.array([0.0, 0.25, 0.5, 1.0])
    # float32 rounding of a difference of numbers near 1.
    np.testing.assert_allclose(flow.gaussian_bell(t), np.exp(-2 * (np.asarray(t) - 0.5) ** 2) - np.exp(-0.5), atol=1e-7)
    assert abs(float(flow.gaussian_bell(1.0))) < 1e-7
