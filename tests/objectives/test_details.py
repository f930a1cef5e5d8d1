"""Details of the objectives, one by one, on a linear network whose every call is written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from nets import Simple

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import ITSELF, Condition, TeacherForcing
from crcm_jax.models.bound import Bound
from crcm_jax.objectives import common, diffusion
from crcm_jax.objectives.common import ContextNoise
from crcm_jax.objectives.sf_dmd import Matching, Scores, dmd_target
from crcm_jax.objectives.tf_dcm import DiscreteTime, Levels, tf_dcm
from crcm_jax.objectives.tf_scm import ContinuousTime, ramp, tf_scm
from crcm_jax.sampling.chunk import Given

PATTERN, FRAMES = ChunkPattern(1, 2), 3
SHAPE = (4, FRAMES, 2, 2, 3)
TIMES = flow.LogNormal(-0.8, 1.6)
pytestmark = pytest.mark.usefixtures("x64")


class Linear(Simple):
    """v = a·x + b·t + k·(context) + m·(text); keeps its calls."""

    chunks = PATTERN

    def __init__(self):
        self.calls = []

    def velocity(self, params, x, t, prepared, view=ITSELF):
        text = prepared.prompt["text"]
        self.calls.append({"x": x, "t": t, "text": text, "view": view, "frames": prepared.frames})
        text = jnp.mean(text, (1, 2))[:, None, None, None, None]
        v = params["a"] * x + params["b"] * flow.expand(t, x) + params["m"] * text
        if view != ITSELF:
            v = v + params["k"] * (view.context + flow.expand(view.times, view.context)).mean(1, keepdims=True)
        return v


class Mixing(Linear):
    """The same plus c·(mean over the frames of x + t), and j in frames at time 0."""

    def velocity(self, params, x, t, prepared, view=ITSELF):
        mixed = params["c"] * (x + flow.expand(t, x)).mean(1, keepdims=True)
        return super().velocity(params, x, t, prepared, view) + mixed + params["j"] * (flow.expand(t, x) == 0)


def linear(params):
    """A fresh network of its own, with parameters."""
    return Bound(Linear(), params)


def params(a=0.4, b=0.3, k=0.2, m=0.5):
    return {"a": jnp.asarray(a), "b": jnp.asarray(b), "k": jnp.asarray(k), "m": jnp.asarray(m)}


# NumPy, since JAX would narrow them here, before the fixture.
BATCH = {"latents": tiny.normal(0, *SHAPE, dtype=np.float64)}
COND, UNCOND = (Condition({"text": tiny.normal(s, 4, 2, 2, dtype=np.float64)}) for s in (1, 2))
X0, KEY = BATCH["latents"], jax.random.key(0)


def wide(t):
    return np.asarray(t)[:, :, None, None, None]


@pytest.mark.parametrize("weighting", ["none", "gaussian_bell"])
def test_diffusion_losses_are_means_over_pixels_and_sums_over_frames(weighting):
    """100·Σ_frames w(t)·mean_{H,W,C}(v̂ − (ε − x0))², with ε recovered from the recorded x_t."""
    net = linear(params())
    losses, _ = diffusion.teacher_forcing(net, BATCH, COND, KEY, times=TIMES, weighting=weighting)
    call = net.network.calls[0]
    assert call["t"].shape == (4, 1)
    np.testing.assert_array_equal(call["view"].context, X0)
    assert float(call["view"].times.max()) == 0
    t = np.asarray(call["t"], np.float64)
    noise = (np.asarray(call["x"]) - (1 - wide(t)) * X0) / wide(t)
    v = linear(params()).velocity(call["x"], call["t"], COND, call["view"])
    w = np.exp(-2 * (t - 0.5) ** 2) - np.exp(-0.5) if weighting == "gaussian_bell" else np.ones_like(t)
    expected = 100 * (w * np.mean((np.asarray(v) - (noise - X0)) ** 2, (2, 3, 4))).sum(1)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)  # t is float32, ε is divided by it


def test_diffusion_forcing_times_are_constant_within_chunks():
    """Independent, shared or monotone over chunks."""
    for strategy in diffusion.STRATEGIES:
        net = linear(params())
        diffusion.diffusion_forcing(net, BATCH, COND, KEY, times=TIMES, strategy=strategy)
        (call,) = net.network.calls
        t = np.asarray(call["t"])
        assert t.shape == (4, FRAMES) and call["view"] == ITSELF
        np.testing.assert_array_equal(t[:, 1], t[:, 2])
        assert (t[:, 0] == t[:, 1]).all() == (strategy == "same")
        if strategy == "fopp":
            assert (t[:, 0] <= t[:, 1]).all()
        assert len(np.unique(t[:, 0])) == 4


def test_guidance_is_two_forwards():
    """v_u + g·(v_c − v_u), and the plain velocity for g ≤ 1 or without a negative prompt."""
    net, x, t = linear(params()), X0, jnp.full((1, 1), 0.3)
    view = TeacherForcing(x, t)
    c, u = (net.velocity(x, t, cond, view) for cond in (COND, UNCOND))
    np.testing.assert_allclose(net.guided(x, t, COND, UNCOND, 3.0, view), u + 3.0 * (c - u), atol=1e-14)
    assert net.network.calls[-1]["x"].shape[0] == 8
    longer = Condition({"text": np.concatenate([UNCOND.prompt["text"]] * 2, 1)})  # its mean is the same
    np.testing.assert_allclose(net.guided(x, t, COND, longer, 3.0, view), u + 3.0 * (c - u), atol=1e-14)
    assert net.network.calls[-1]["x"].shape[0] == 4, "two passes"
    for uncond, scale in ((UNCOND, 1.0), (None, 3.0)):
        np.testing.assert_array_equal(net.guided(x, t, COND, uncond, scale, view), c)
    # What accompanies the frames accompanies them in both branches.
    actions = tiny.normal(3, 4, FRAMES, 2)
    net.guided(x, t, COND.replace(frames={"actions": actions}), UNCOND, 3.0, view)
    np.testing.assert_array_equal(net.network.calls[-1]["frames"]["actions"], np.concatenate([actions, actions]))
    # Of a single clip too, both branches are one batch.
    one, own = (
        TeacherForcing(x[:1], t),
        [cond.replace(prompt={"text": cond.prompt["text"][:1]}) for cond in (COND, UNCOND)],
    )
    np.testing.assert_allclose(net.guided(x[:1], t, *own, 3.0, one), (u + 3.0 * (c - u))[:1], atol=1e-14)
    assert net.network.calls[-1]["x"].shape[0] == 2


def test_noisy_context():
    """Chunks from the start on are noised to their time and told so; earlier ones stay clean (spec causal_rcm 3.4)."""
    view = common.context(KEY, X0, PATTERN, ContextNoise((5 / 8,), 1))
    c, t = view.context, view.times
    np.testing.assert_array_equal(t, np.float32([[0, 5 / 8, 5 / 8]]))
    np.testing.assert_array_equal(c[:, 0], X0[:, 0])
    noise = (np.asarray(c) - (3 / 8) * X0)[:, 1:] / (5 / 8)
    assert abs(noise.mean()) < 0.4 and 0.75 < noise.std() < 1.25, "96 unit normal draws"
    t = common.context(KEY, X0, PATTERN, ContextNoise((5 / 8, 1.0), 0)).times
    np.testing.assert_array_equal(t, np.float32([[5 / 8, 1, 1]]))


@pytest.mark.parametrize("skip", [1, 2])
def test_discrete_consistency_by_hand(skip):
    """So many guided Euler steps of the teacher on a clean context, each at its own time; the target is the live
    student, not differentiated; the student's context noise is fresh in each of its two passes."""
    student, teacher = Linear(), linear(params(0.9, -0.2, 0.1, 0.7))
    constants = DiscreteTime(Levels(skip=skip), context_noise=ContextNoise((5 / 8,), 1))

    def loss(p):
        return tf_dcm(Bound(student, p), BATCH, COND, KEY, teacher=teacher, uncond=UNCOND, constants=constants)[0]

    losses = loss(params())
    online, target = student.calls
    for guided in (steps := teacher.network.calls[:]):
        np.testing.assert_array_equal(guided["view"].context[:4], X0)
        assert float(guided["view"].times.max()) == 0
    assert not np.allclose(online["view"].context[:, 1:], target["view"].context[:, 1:])
    clean, x = TeacherForcing(X0, jnp.zeros((1, 1))), online["x"]
    times = [online["t"], *(step["t"][:4] for step in steps[1:]), target["t"]]
    assert len(steps) == skip and all((a > b).all() for a, b in zip(times, times[1:]))
    for t, below in zip(times, times[1:]):
        x = x - wide(t - below) * linear(teacher.params).guided(x, t, COND, UNCOND, 3.0, clean)
    np.testing.assert_allclose(target["x"], x, atol=1e-7)

    def predict(p, call):
        return flow.to_clean(call["x"], linear(p).velocity(call["x"], call["t"], COND, call["view"]), call["t"])

    frozen = predict(params(), target)
    by_hand = lambda p: 100 * jnp.mean(jnp.square(predict(p, online) - frozen), (2, 3, 4)).sum(1)  # noqa: E731
    np.testing.assert_allclose(losses, by_hand(params()), rtol=1e-6)  # float32 times
    for name, g in jax.jacfwd(loss)(params()).items():
        np.testing.assert_allclose(g, jax.jacfwd(by_hand)(params())[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("iteration", "r"), [(0, 0.0), (250, 0.25), (5000, 1.0)])
def test_continuous_consistency_by_hand(iteration, r):
    """g = −(v⁻ − v_T) − r·t·τ, ĝ = g/(‖g‖ + 0.1), loss 100·‖ĝ‖², gradient −200·(∂v)ᵀĝ, in one pass and in two."""
    student, teacher = Linear(), linear(params(0.9, -0.2, 0.1, 0.7))

    def run(p, one_pass):
        constants = ContinuousTime(TIMES, context_noise=ContextNoise((5 / 8,), 1), one_pass=one_pass)
        options = {"teacher": teacher, "uncond": UNCOND, "r": ramp(iteration, 1000), "constants": constants}
        return tf_scm(Bound(student, p), BATCH, COND, KEY, **options)

    losses, metrics = run(params(), False)
    call = student.calls[-1]
    assert float(teacher.network.calls[-1]["view"].times.max()) == 0, "the teacher's context is clean"
    np.testing.assert_array_equal(call["view"].times, np.float32([[0, 5 / 8, 5 / 8]]))
    clean = TeacherForcing(X0, jnp.zeros((1, 1)))
    v_T = np.asarray(linear(teacher.params).guided(call["x"], call["t"], COND, UNCOND, 3.0, clean))
    v = linear(params()).velocity(call["x"], call["t"], COND, call["view"])
    tau = 0.4 * v_T + 0.3  # a·dx/dt + b
    g = -(np.asarray(v) - v_T) - r * wide(call["t"]) * tau
    norm = np.sqrt((g**2).sum((1, 2, 3, 4)))
    g_hat = g / (norm[:, None, None, None, None] + 0.1)
    assert float(metrics["warmup"]) == r
    # Times and the warm-up are float32.
    np.testing.assert_allclose(metrics["tangent_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(losses, 100 * (norm / (norm + 0.1)) ** 2, rtol=1e-6)
    slope = jax.jacfwd(lambda p: linear(p).velocity(call["x"], call["t"], COND, call["view"]))(params())
    for one_pass in (False, True):
        for name, gradient in jax.jacrev(lambda p: run(p, one_pass)[0])(params()).items():  # noqa: B023
            expected = -200 * (np.asarray(slope[name]) * g_hat).sum((1, 2, 3, 4))
            np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_one_pass_is_two_passes():
    """Value and every parameter's gradient, on the transformer in float64."""
    net = tiny.wan(PATTERN, "float64", layers=1)
    student, teacher = (tiny.parameters(net, seed, np.float64) for seed in (0, 1))
    batch = {"latents": tiny.latents(3, 2, FRAMES, np.float64)}
    cond, uncond = (tiny.condition(seed, dtype=np.float64) for seed in (7, 8))

    @tiny.jit
    def both(p):
        def loss(p, one_pass):
            options = {"teacher": Bound(net, teacher), "uncond": uncond, "r": 0.7}
            constants = ContinuousTime(one_pass=one_pass)
            return tf_scm(Bound(net, p), batch, cond, KEY, constants=constants, **options)[0].sum()

        return [jax.value_and_grad(lambda p: loss(p, one_pass))(p) for one_pass in (True, False)]  # noqa: B023

    (one, grads), (two, others) = both(student)
    np.testing.assert_allclose(one, two, rtol=1e-12)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    for g, other in zip(jax.tree.leaves(grads), jax.tree.leaves(others)):
        assert float(jnp.abs(g).max()) > 0 and float(jnp.abs(g - other).max()) < 1e-12 * largest


def test_the_context_receives_gradients():
    """In teacher forcing, unlike in self-forcing, parameters learn through the context's keys and values."""
    net = tiny.wan(PATTERN, "float64", layers=2)
    p = tiny.parameters(net, 0, np.float64)
    batch = {"latents": tiny.latents(3, 2, FRAMES, np.float64)}
    cond = tiny.condition(dtype=np.float64)
    step = tiny.parameters(net, 9, np.float64)

    def along(h):
        moved = jax.tree.map(lambda a, b: a + h * b, p, step)
        return diffusion.teacher_forcing(Bound(net, moved), batch, cond, KEY, times=TIMES)[0].sum()

    loss, slope = tiny.jit(along), tiny.jit(jax.grad(along))(0.0)
    d = [float(loss(h) - loss(-h)) / (2 * h) for h in (2e-4, 1e-4)]
    richardson = d[1] + (d[1] - d[0]) / 3
    # A whole gradient, the context's part included: equal to differences up to their own error.
    assert abs(float(slope) - richardson) < 0.1 * abs(d[1] - d[0]) + 1e-8 * abs(richardson)


GIVEN = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]], bool)


@pytest.mark.parametrize("name", ["tf", "df", "bidirectional", "tf_dcm", "tf_scm"])
def test_given_frames_are_clean_and_count_for_nothing(name):
    """Whoever looks sees them as they are, at time 0; what a network says of them changes no loss."""

    def run(junk):
        student, teacher = (Bound(Mixing(), params() | {"c": 0.3, "j": junk}) for _ in range(2))
        to, guide = (student, BATCH | {"given": GIVEN}, COND, KEY), {"teacher": teacher, "uncond": UNCOND}
        losses = {
            "tf": lambda: diffusion.teacher_forcing(*to, times=TIMES),
            "df": lambda: diffusion.diffusion_forcing(*to, times=TIMES),
            "bidirectional": lambda: diffusion.bidirectional(*to, times=TIMES),
            "tf_dcm": lambda: tf_dcm(*to, **guide, constants=DiscreteTime(Levels(skip=2))),
            "tf_scm": lambda: tf_scm(*to, **guide, constants=ContinuousTime(TIMES, one_pass=False)),
        }[name]()[0]
        return losses, student.network.calls + teacher.network.calls

    losses, calls = run(0.0)
    seen = [call for call in calls if not isinstance(call["x"], jax.core.Tracer)]
    for call in seen:
        times = len(call["x"]) // 4  # both branches of a guided pass
        given, clean = np.tile(GIVEN, (times, 1)), np.tile(X0, (times, 1, 1, 1, 1))
        np.testing.assert_array_equal(np.asarray(call["x"])[given], clean[given])
        assert (np.asarray(call["t"])[given] == 0).all() and (np.asarray(call["t"])[~given] > 0).all()
    assert seen and float(losses.min()) > 0
    np.testing.assert_allclose(run(7.0)[0], losses, rtol=1e-12)


def test_given_frames_do_not_move_along_the_tangent():
    """dx/dt and dt/dt are zero there: τ of the other frames, which see them, knows."""
    student, teacher = (Bound(Mixing(), params(*p) | {"c": 0.3, "j": 0.0}) for p in ((), (0.9, -0.2, 0.1, 0.7)))
    constants = ContinuousTime(TIMES, one_pass=False)
    options = {"teacher": teacher, "uncond": UNCOND, "constants": constants}
    _, metrics = tf_scm(student, BATCH | {"given": GIVEN}, COND, KEY, **options)
    call, free = student.network.calls[-1], ~GIVEN[:, :, None, None, None]
    x, t, view = call["x"], call["t"], call["view"]
    v_T = free * teacher.guided(x, t, COND, UNCOND, 3.0, view)
    tau = 0.4 * v_T + 0.3 * free + 0.3 * (v_T + free).mean(1, keepdims=True)
    g = free * (-(student.velocity(x, t, COND, view) - v_T) - wide(t) * tau)
    np.testing.assert_allclose(metrics["tangent_norm"], np.sqrt((g**2).sum((1, 2, 3, 4))), rtol=1e-6)  # float32 times


@pytest.mark.parametrize("given", [None, GIVEN], ids=["nothing given", "frames given"])
def test_the_dmd_target(given):
    """x − (x_fake − x_real)/W with W = mean|x − x_real| of a sample's generated frames; the critic unguided, the real
    score guided."""
    critic, real = linear(params()), linear(params(0.9, -0.2, 0.1, 0.7))
    held = None if given is None else Given(given, X0)
    target, norm = dmd_target(X0, KEY, Scores(real, critic, UNCOND), COND, Matching(guidance=5.0), held)
    y, t = critic.network.calls[0]["x"], critic.network.calls[0]["t"]
    assert t.shape == (4, 1 if given is None else FRAMES) and y.shape[0] == 4
    free = np.ones(SHAPE, bool) if given is None else np.broadcast_to(~wide(given), SHAPE)
    np.testing.assert_array_equal(np.asarray(y)[~free], X0[~free])
    x_fake = flow.to_clean(y, linear(critic.params).velocity(y, t, COND), t)
    x_real = flow.to_clean(y, linear(real.params).guided(y, t, COND, UNCOND, 5.0), t)
    w = np.mean(np.abs(X0 - x_real), (1, 2, 3, 4), keepdims=True, where=free)
    g = (x_fake - x_real) / w * free
    np.testing.assert_allclose(target, X0 - g, rtol=1e-10)
    np.testing.assert_allclose(norm, jnp.sqrt(jnp.sum(g**2, (1, 2, 3, 4))), rtol=1e-10)
    slope = jax.grad(lambda x: jnp.sum(jnp.square(x - jax.lax.stop_gradient(target))))(X0)
    np.testing.assert_allclose(slope, 2 * g, rtol=1e-10)


def test_trigonometric_and_straight_consistency_are_parallel():
    """g_Trig = cosθ·df/dθ = (1−t)·√((1−t)² + t²)·g_RF for the same function f, any network, any teacher:
    spec causal_rcm 4.4."""
    rng = np.random.default_rng(0)
    theta = jnp.asarray(rng.uniform(0.1, 1.4, size=(6, 1)))
    z, noise = (jnp.asarray(rng.normal(size=(6, 1, 1, 1, 2))) for _ in range(2))
    net = lambda x, t, w: jnp.tanh(w * x + 2 * flow.expand(t, x)) * jnp.cos(3 * x)  # noqa: E731
    student, teacher = (lambda x, t: net(x, t, 1.3)), (lambda x, t: net(x, t, 0.6))
    wide_theta = flow.expand(theta, z)
    cos, sin = jnp.cos(wide_theta), jnp.sin(wide_theta)
    t = flow.trig_to_flow(theta)
    x = flow.interpolate(z, noise, t)
    f = lambda x, t: flow.to_clean(x, student(x, t), t)  # noqa: E731
    g = jax.jvp(f, (x, t), (teacher(x, t), jnp.ones_like(t)))[1]

    def trig_f(x, theta):
        """f = cosθ·x − sinθ·F, with F of the wrapper."""
        s = flow.expand(theta, x)
        scale = jnp.cos(s) + jnp.sin(s)
        big = flow.trig_velocity(student(x / scale, flow.trig_to_flow(theta)), x, theta)
        return jnp.cos(s) * x - jnp.sin(s) * big

    x_trig = cos * z + sin * noise
    np.testing.assert_allclose(x_trig / (cos + sin), x, atol=1e-14)
    np.testing.assert_allclose(trig_f(x_trig, theta), f(x, t), atol=1e-14)
    slope = flow.trig_velocity(teacher(x, t), x_trig, theta)
    g_trig = cos * jax.jvp(trig_f, (x_trig, theta), (slope, jnp.ones_like(theta)))[1]
    w = flow.expand(t, x)
    np.testing.assert_allclose(g_trig, (1 - w) * jnp.sqrt((1 - w) ** 2 + w**2) * g, atol=1e-13)
