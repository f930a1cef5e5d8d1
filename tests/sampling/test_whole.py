"""Euler and UniPC against diffusers' flow schedulers, with the same network function and noise."""

import jax.numpy as jnp
import numpy as np
import pytest
from nets import Simple

from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.sampling import Whole, whole
from crcm_jax.sampling.whole import denoise_whole, generate_whole, solve, teacher_times, unipc_table

BOUND = 1e-5
"""Relative to the largest value; sums in float32 in another order."""
SHAPE = (2, 3, 4, 4, 5)
NOISE = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def velocity(x, t):
    """Something curved in x and t."""
    return x - 0.7 * jnp.tanh((1.5 - t) * x) + 0.2 * jnp.sin(3 * t)


def theirs(scheduler, times):
    torch = pytest.importorskip("torch", reason="needs torch (pip install -e .[parity])")
    scheduler.set_timesteps(sigmas=np.asarray(times[:-1], np.float32))
    np.testing.assert_allclose(scheduler.sigmas.numpy(), times, atol=1e-7)
    x = torch.tensor(NOISE)
    for i, timestep in enumerate(scheduler.timesteps):
        v = torch.tensor(np.asarray(velocity(jnp.asarray(x.numpy()), jnp.float32(scheduler.sigmas[i]))))
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return x.numpy()


def schedulers():
    return pytest.importorskip("diffusers", reason="needs diffusers (pip install -e .[parity])")


def relative(a, b):
    return float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b)))


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50])
def test_euler_is_diffusers(steps):
    times = teacher_times(steps)
    scheduler = schedulers().FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert relative(solve("euler", velocity, NOISE, times), theirs(scheduler, times)) <= BOUND


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50])
def test_unipc_is_diffusers(steps):
    times = teacher_times(steps)
    scheduler = schedulers().UniPCMultistepScheduler(
        solver_order=2, solver_type="bh2", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    assert relative(solve("unipc", velocity, NOISE, times), theirs(scheduler, times)) <= BOUND


def test_unipc_is_of_higher_order():
    """Against many Euler steps of the same ODE: UniPC's error falls faster than Euler's, which is the point of it."""
    exact = np.asarray(solve("euler", velocity, NOISE, teacher_times(8000)))
    errors = {
        s: [relative(solve(s, velocity, NOISE, teacher_times(n)), exact) for n in (20, 40)] for s in whole.SOLVERS
    }
    # Measured: Euler 0.0338, 0.0164; UniPC 0.0138, 0.0019.
    assert errors["euler"][0] / errors["euler"][1] == pytest.approx(2, rel=0.15)
    assert errors["unipc"][0] / errors["unipc"][1] > 4
    assert errors["unipc"][1] < errors["euler"][1] / 5


def test_a_constant_prediction_is_reached_exactly():
    """Whatever the times: with m the same everywhere, the solution is m."""
    m = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    for solver in whole.SOLVERS:
        found = solve(solver, lambda x, t: (x - m) / t, NOISE, teacher_times(12))
        assert relative(found, m) <= BOUND
    rows = unipc_table(teacher_times(12))
    before, now = np.asarray(teacher_times(12))[:-1], np.asarray(teacher_times(12))[1:]
    np.testing.assert_allclose(rows.carry + 0, now / before, rtol=1e-6, atol=1e-12)
    # A constant x0 is interpolated exactly: what is left of the sample and of the predictions add up to the path.
    np.testing.assert_allclose(rows.predict.sum(1), (1 - now) - rows.carry * (1 - before), rtol=1e-3, atol=1e-7)

    # The correction after a step of order one weighs the predictions at both its ends alike, and no other.
    np.testing.assert_allclose(rows.correct[1], np.array([0.5, 0.5, 0.0]) * rows.correct[1].sum(), rtol=1e-12)


def test_teacher_times():
    """shift(linspace; 5) from 5000/5001, by hand (spec causal_rcm 6.4)."""
    top = 5000 / 5001
    u = np.linspace(top / (5 - 4 * top), 0, 51)
    np.testing.assert_allclose(teacher_times(), 5 * u / (1 + 4 * u), rtol=1e-12)
    assert Whole(steps=20, shift=3.0).times == teacher_times(20, 3.0)
    with pytest.raises(ValueError, match="end in 0"):
        unipc_table((0.9, 0.5))
    with pytest.raises(ValueError, match="start below 1"):
        unipc_table((1.0, 0.5, 0.0))


def test_guidance_over_a_network():
    class Network(Simple):
        def velocity(self, params, x, t, prepared, view):
            text = prepared.prompt["text"].mean((1, 2))[:, None, None, None, None]
            return params * velocity(x, t[..., None, None, None]) + text

    cond, uncond = (Condition({"text": jnp.full((n, 3, 4), float(n - 1))}) for n in (2, 1))
    model, times = Bound(Network(), jnp.float32(1)), teacher_times(4)
    for solver in whole.SOLVERS:
        view = {"times": times, "solver": solver, "uncond": uncond, "guidance": 3.0}
        found = generate_whole(model, cond, NOISE, **view)
        expected = solve(solver, lambda x, t: velocity(x, t) + 3.0, NOISE, times)
        assert relative(found, np.asarray(expected)) <= BOUND
        # The same, step by step: after each, one more of the times is behind.
        steps = list(denoise_whole(model, cond, NOISE, **view))
        assert len(steps) == 4 and relative(steps[-1], np.asarray(found)) <= BOUND
        program = whole._program(times, solver, 3.0, steps[-1].sharding)
        assert program._cache_size() == 1  # compiled once for all steps
        assert min(relative(a, np.asarray(b)) for a, b in zip(steps, steps[1:])) > 1e-2
    with pytest.raises(ValueError, match="is not one of unipc, euler"):
        generate_whole(model, cond, NOISE, times=times, solver="heun")
