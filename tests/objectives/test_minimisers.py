"""Every objective's minimiser is the closed form of a Gaussian world: stationary there, and nowhere near it."""

import analytic_world as world
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from analytic_world import AnalyticNetwork, World

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import ITSELF, TeacherForcing
from crcm_jax.models.bound import Bound
from crcm_jax.objectives import diffusion
from crcm_jax.objectives.common import ContextNoise
from crcm_jax.objectives.sf_dmd import Scores, critic, sf_dmd
from crcm_jax.objectives.tf_dcm import DiscreteTime, Levels, tf_dcm
from crcm_jax.objectives.tf_scm import tf_scm
from crcm_jax.sampling.rollout import rollout
from crcm_jax.sampling.schedule import MID_TIMES, RolloutPlan

ONE, PAIRS, UNEVEN = ChunkPattern(1, 1), ChunkPattern(2, 2), ChunkPattern(1, 3)
DRAWS = 4000
TIMES = flow.LogNormal(-0.8, 1.6)

pytestmark = pytest.mark.usefixtures("x64")


def draw(count=DRAWS, seed=0):
    x0 = World().draw(seed, count)
    return {"latents": x0}, world.condition(count), jax.random.key(seed)


def test_the_closed_forms_agree():
    """The world checks itself: the velocity is d/ds of the trajectory, along which f is constant and f(x, 0) = x."""
    batch, cond, _ = draw(5)
    x0 = batch["latents"]
    net, cm = AnalyticNetwork(UNEVEN), AnalyticNetwork(UNEVEN, consistency=True)
    x, t, zero, params = x0 + 0.3, jnp.full((5, 1), 0.4), jnp.zeros((5, 1)), world.zero_params()

    @tiny.jit
    def both(x0, s):
        v, end = (Bound(n, params).velocity(x, t, cond, TeacherForcing(x0, zero)) for n in (net, cm))
        return v, x - 0.4 * end, trajectory(net, x0, x, t, s)

    v, end, start = both(x0, zero)
    slope = (both(x0, t + 1e-6)[2] - both(x0, t - 1e-6)[2]) / 2e-6
    np.testing.assert_allclose(v, slope, atol=1e-8)  # the difference quotient's own error
    np.testing.assert_allclose(end, start, atol=1e-13)


def trajectory(net, x0, x, t, s):
    """Where the teacher's flow, given the clean context x0, takes x from times t to times s `[batch, 1]`."""
    parts, frames = [], jnp.arange(world.FRAMES)
    for span in net.chunks.spans(world.FRAMES):
        hidden = frames >= span.start
        seen = jnp.where(hidden[:, None], 0, x0[:, :, 0, 0])
        mean, prior = net._given(seen, jnp.where(hidden, 1.0, jnp.zeros(x0.shape[:2])), frames, frames[span])
        parts.append(world.flow_along(x[:, span, 0, 0], t[..., None], s[..., None], mean, prior))
    return jnp.concatenate(parts, 1).reshape(x.shape)


@pytest.mark.parametrize(
    ("chunks", "noise", "weighting"),
    [(UNEVEN, ContextNoise(), "gaussian_bell"), (PAIRS, ContextNoise((5 / 8,), 1), "none")],
)
def test_teacher_forcing(chunks, noise, weighting):
    """The minimiser is the velocity given the context, clean or as noisy as it was made."""
    batch, cond, key = draw()
    net = AnalyticNetwork(chunks)
    options = {"times": TIMES, "context_noise": noise, "weighting": weighting}
    world.assert_minimum(lambda p: diffusion.teacher_forcing(Bound(net, p), batch, cond, key, **options)[0])


@pytest.mark.parametrize("strategy", diffusion.STRATEGIES)
def test_diffusion_forcing(strategy):
    """The minimiser is the velocity given a past as noisy as it is."""
    batch, cond, key = draw()
    net = AnalyticNetwork(UNEVEN)
    options = {"times": flow.UniformShift(2.0), "strategy": strategy}
    world.assert_minimum(lambda p: diffusion.diffusion_forcing(Bound(net, p), batch, cond, key, **options)[0])


def test_bidirectional():
    """The minimiser is the velocity given the whole noisy clip."""
    batch, cond, key = draw()
    net = AnalyticNetwork()
    world.assert_minimum(lambda p: diffusion.bidirectional(Bound(net, p), batch, cond, key, times=TIMES)[0])


def test_continuous_consistency():
    """At the closed form every sample's gradient is zero, not only their mean; off it, it pulls back."""
    batch, cond, key = draw(400)
    teacher, student = AnalyticNetwork(UNEVEN), AnalyticNetwork(UNEVEN, consistency=True)
    options = {"teacher": Bound(teacher, world.zero_params()), "uncond": None}

    @tiny.jit
    def losses_and_gradient(params):
        losses = lambda p: tf_scm(Bound(student, p), batch, cond, key, **options)[0]  # noqa: E731
        return losses(params), jax.jacrev(losses)(params)

    losses, each = losses_and_gradient(world.zero_params())
    # g cancels two numbers of order one; dividing the norm by 0.1 and the scale of 100 take three digits.
    assert float(jnp.abs(losses).max()) < 1e-18
    assert max(float(jnp.abs(g).max()) for g in each.values()) < 1e-9
    for name in world.zero_params():
        _, each = losses_and_gradient(world.wrong_params(name))
        assert abs(float(each[name].mean())) > 1.0, name


def test_the_continuous_target_is_the_analytic_derivative():
    """‖g‖ of a wrong student is ‖df/dt‖, f = x − t·v, along the teacher's exact trajectory (central differences)."""
    batch, cond, key = draw(20)
    x0, clean = batch["latents"], jnp.zeros((20, 1))
    student = AnalyticNetwork(UNEVEN, consistency=True)
    params = {name: jnp.asarray(value) for name, value in zip(world.zero_params(), (0.3, -0.2, 0.1, 0.4))}
    seen = {}

    class Spy(AnalyticNetwork):
        def velocity(self, params, x, t, prepared, view=ITSELF):
            seen.update(x=x, t=t)
            return super().velocity(params, x, t, prepared, view)

    options = {"teacher": Bound(Spy(UNEVEN), world.zero_params()), "uncond": None}

    @tiny.jit
    def norm_and_derivative(params):
        _, metrics = tf_scm(Bound(student, params), batch, cond, key, **options)
        x, t = seen["x"], seen["t"].astype(jnp.float64)

        def f_at(s):
            y = trajectory(AnalyticNetwork(UNEVEN), x0, x, t, s)
            v = Bound(student, params).velocity(y, s, cond, TeacherForcing(x0, clean))
            return flow.to_clean(y, v, s)

        h = 1e-4 * t
        return metrics["tangent_norm"], (f_at(t + h) - f_at(t - h)) / flow.expand(2 * h, x)

    norm, derivative = norm_and_derivative(params)
    expected = jnp.sqrt(jnp.sum(jnp.square(derivative), (1, 2, 3, 4)))
    np.testing.assert_allclose(norm, expected, rtol=1e-6)  # h² of the differences


def test_discrete_consistency():
    """The closed form misses only by the teacher's Euler step: its gradient falls as Δ², that of a wrong one as Δ."""
    batch, cond, key = draw(2000)
    teacher, student = AnalyticNetwork(UNEVEN), AnalyticNetwork(UNEVEN, consistency=True)

    def gradient(levels):
        def loss(p):
            options = {"teacher": Bound(teacher, world.zero_params()), "uncond": None}
            constants = DiscreteTime(Levels(levels))
            return jnp.mean(tf_dcm(Bound(student, p), batch, cond, key, constants=constants, **options)[0])

        compiled = tiny.jit(jax.grad(loss))
        return lambda params: {name: float(g) for name, g in compiled(params).items()}

    gradients = gradient(500), gradient(1000)
    coarse, fine = (at(world.zero_params()) for at in gradients)
    for name in coarse:
        wrong = [at(world.wrong_params(name))[name] for at in gradients]
        assert abs(fine[name]) < 0.02 * abs(wrong[1]), name
        # The levels drawn differ a little between the two (u < 1 − Δ).
        assert 3.6 < coarse[name] / fine[name] < 4.4, name
        assert 1.8 < wrong[0] / wrong[1] < 2.2, name


@pytest.mark.parametrize("steps", [1, 4])
def test_an_exact_student_rolls_out_the_data(steps):
    """Self-forcing of the consistency function draws clips of the data's mean and covariance, whatever the steps."""
    _, cond, key = draw(20_000)
    model = Bound(AnalyticNetwork(PAIRS, consistency=True), world.zero_params())
    shape = (20_000, *world.SHAPE)
    done = tiny.jit(lambda key: rollout(model, cond, key, RolloutPlan(), steps, shape))(key)
    truth = World()
    assert_moments(done.samples, truth.mean, truth.covariance)
    # What the last step saw is the data at its time.
    t = float(done.times[0])
    assert t == (1.0 if steps == 1 else np.float32(MID_TIMES[steps - 2]))
    assert_moments(done.inputs, (1 - t) * truth.mean, (1 - t) ** 2 * truth.covariance + t**2 * np.eye(4), across=False)


def assert_moments(x, mean, covariance, across=True):
    """Sample mean and covariance within five standard errors; `across` False compares within chunks of two only."""
    x = np.asarray(x)[:, :, 0, 0].transpose(0, 2, 1).reshape(-1, world.FRAMES)
    n, spread = len(x), np.sqrt(np.diag(covariance))
    np.testing.assert_array_less(np.abs(x.mean(0) - mean), 5 * spread / np.sqrt(n))
    error = np.abs(np.cov(x.T) - covariance)
    if not across:
        error = error[:2, :2], error[2:, 2:]
        error = np.kron(np.eye(2), np.ones((2, 2))) * np.block(
            [[error[0], np.zeros((2, 2))], [np.zeros((2, 2)), error[1]]]
        )
    np.testing.assert_array_less(error, 5 * np.sqrt(2 / n) * np.outer(spread, spread))


def dmd(student, params, scores, count=2000, updates=0):
    _, cond, key = draw(count)
    batch = {"latents": jnp.zeros((count, *world.SHAPE))}

    def loss(p):
        losses, metrics = sf_dmd(Bound(student, p), batch, cond, key, scores=scores, updates=updates)
        return jnp.mean(losses), metrics

    return tiny.jit(jax.grad(loss, has_aux=True))(params)


def test_distribution_matching():
    """No pull where the critic and the real score agree; a student moved by b is pushed back by its own critic."""
    student, truth = AnalyticNetwork(ONE, consistency=True), AnalyticNetwork()
    real = Bound(truth, world.zero_params())
    same = Scores(real, real, None)
    grads, metrics = dmd(student, world.zero_params(), same, updates=3)
    assert float(metrics["dmd_norm"].max()) == 0 and all(float(g) == 0 for g in grads.values())
    # One step from noise: every chunk moves by −shift, and so does what the next one sees of it.
    moved, shape = world.wrong_params("shift", 0.3), (4000, *world.SHAPE)
    one_step = tiny.jit(
        lambda key: rollout(Bound(student, moved), world.condition(4000), key, RolloutPlan(), 1, shape).samples
    )
    offset = float(jnp.mean(one_step(jax.random.key(1))) - World().mean.mean())
    assert offset < -0.3
    theirs = Bound(AnalyticNetwork(world=World(offset=offset)), world.zero_params())
    grads, _ = dmd(student, moved, Scores(real, theirs, None))
    assert float(grads["shift"]) > 0.1


def test_critic():
    """On the rollouts of an exact student, the critic's minimiser is the velocity of the data."""
    _, cond, key = draw()
    student = AnalyticNetwork(ONE, consistency=True)
    batch = {"latents": jnp.zeros((DRAWS, *world.SHAPE))}
    options = {"student": Bound(student, world.zero_params()), "updates": 1}
    world.assert_minimum(lambda p: critic(Bound(AnalyticNetwork(), p), batch, cond, key, **options)[0])
