"""Frames that are conditions (`batch["given"]`) in every objective: clean, at time 0, and no part of what is learnt.

The network is told which they are, and refuses (NaN) to see one that is noised, or to be told of others. What it says
of them has a parameter of its own, by which nothing may change; what it says of all others has one too.
"""

import dataclasses
import functools

import bare
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from bare import FRAMES, PATTERN, SHAPE, Bare

from crcm_jax import flow
from crcm_jax.models.base import ITSELF, OnCache
from crcm_jax.models.bound import Bound
from crcm_jax.objectives import common, diffusion
from crcm_jax.objectives.sf_dmd import Matching, Scores, critic, dmd_target, sf_dmd, sf_dmd_replayed
from crcm_jax.objectives.tf_dcm import DiscreteTime, Levels, tf_dcm
from crcm_jax.objectives.tf_scm import NORM_FLOOR, ContinuousTime, tf_scm
from crcm_jax.sampling import ContextRule, RolloutPlan, Schedule
from crcm_jax.sampling.chunk import Given
from crcm_jax.sampling.rollout import rollout

pytestmark = pytest.mark.usefixtures("x64")

GIVEN = np.zeros(SHAPE[:2], bool)
GIVEN[0, 0] = GIVEN[2, :2] = True
"""A whole chunk of one sample, nothing of the next, a chunk and half of another one of the last."""
BATCH = bare.batch(dtype="float64", given=GIVEN)
X0, COND = BATCH["latents"], common.condition(BATCH)
NEGATIVE = common.unconditioned(BATCH, bare.negative())
HELD = Given(GIVEN, X0)
KEY, WEIGHTS = jax.random.key(3), np.array([0.5, 1.0, 0.25])
TIMES = flow.UniformShift(3.0)
PLAN = RolloutPlan(Schedule((3, 2), ((0.8, 0.5), (0.6,))), ContextRule(noisy=True, start=0))
CONTEXT = common.ContextNoise((0.6,), 0)


@dataclasses.dataclass(frozen=True)
class Watching(Bare):
    """`Bare`, plus `on_given` in given frames, `on_others` elsewhere; NaN where something about given frames is off."""

    def velocity(self, params, x, t, prepared, view=ITSELF):
        chunk = view.chunk if isinstance(view, OnCache) and view.chunk is not None else 0
        start, twice = (0 if self.chunks is None else self.chunks.start(chunk)), len(x) // SHAPE[0]

        def own(leaf):
            cut = jax.lax.dynamic_slice_in_dim(jnp.asarray(leaf), start, x.shape[1], 1)
            return jnp.concatenate([cut] * twice)

        given = own(GIVEN)
        moved = (jnp.broadcast_to(t, given.shape) != 0) | jnp.any(x != own(X0), (2, 3, 4))
        wrong = (given & moved) | (prepared.given != given)
        v = super().velocity(params, x, t, prepared, view)
        v = v + jnp.where(flow.expand(given, x), params["on_given"], params["on_others"])
        return jnp.where(jnp.any(wrong), jnp.nan, v)


def parameters(seed, on_given=0.0, on_others=0.0):
    own = bare.parameters(seed, "float64")
    return own | {"on_given": np.float64(on_given), "on_others": np.float64(on_others)}


def bound(seed, chunks=PATTERN, network=Watching, **more):
    return Bound(network(chunks), parameters(seed, **more))


# Each: (network, student's parameters, batch, what others say of given frames) → ((losses, metrics), gradient).


def differentiated(loss):
    def gradient(network, params, batch, others):
        def total(params):
            losses, metrics = loss(network, params, batch, others)
            return jnp.sum(WEIGHTS * losses), (losses, metrics)

        grads, aux = jax.grad(total, has_aux=True)(params)
        return aux, grads

    return gradient


def diffused(objective, chunks=PATTERN, **options):
    def loss(network, params, batch, others):
        student = Bound(network(chunks), params)
        return objective(student, batch, common.condition(batch), KEY, times=TIMES, **options)

    return differentiated(loss)


def consistent(objective, constants):
    def loss(network, params, batch, others):
        teacher = Bound(network(PATTERN), parameters(1) | others)
        cond, uncond = common.condition(batch), common.unconditioned(batch, bare.negative())
        options = {"teacher": teacher, "uncond": uncond, "constants": constants}
        return objective(Bound(network(PATTERN), params), batch, cond, KEY, **options)

    return differentiated(loss)


def scored(network, batch, others):
    real, fake = (Bound(network(None), parameters(seed) | others) for seed in (1, 2))
    return {"scores": Scores(real, fake, common.unconditioned(batch, bare.negative())), "updates": jnp.int32(2)}


def matching(at_once=False):
    return Matching(PLAN, guidance=3.0, at_once=at_once)


def direct(network, params, batch, others):
    options = scored(network, batch, others) | {"matching": matching()}
    return sf_dmd(Bound(network(PATTERN), params), batch, common.condition(batch), KEY, **options)


def replayed(at_once):
    def gradient(network, params, batch, others):
        options = scored(network, batch, others) | {"matching": matching(at_once)}
        cond = common.condition(batch)
        return sf_dmd_replayed(Bound(network(PATTERN), params), batch, cond, KEY, WEIGHTS, **options)

    return gradient


def criticised(network, params, batch, others):
    student = Bound(network(PATTERN), parameters(1) | others)
    options = {"student": student, "updates": jnp.int32(2), "matching": matching()}
    return critic(Bound(network(None), params), batch, common.condition(batch), KEY, **options)


OBJECTIVES = {
    "tf": diffused(diffusion.teacher_forcing, context_noise=CONTEXT),
    "df": diffused(diffusion.diffusion_forcing),
    "bidirectional": diffused(diffusion.bidirectional, None),
    "tf_dcm": consistent(tf_dcm, DiscreteTime(Levels(skip=2), context_noise=CONTEXT)),
    "tf_scm": consistent(tf_scm, ContinuousTime(context_noise=CONTEXT)),
    "tf_scm, two passes": consistent(tf_scm, ContinuousTime(one_pass=False)),
    "sf_dmd": differentiated(direct),
    "sf_dmd, replayed": replayed(False),
    "sf_dmd, replayed at once": replayed(True),
    "critic": differentiated(criticised),
}
RTOL = 1e-9
"""float64: what only the order of sums tells apart. Times are drawn in float32, and then exact."""


@functools.cache
def compiled(name, network):
    return tiny.jit(functools.partial(OBJECTIVES[name], network))


def found_by(name, on_given=0.0, on_others=0.0, others_on_given=0.0, given=True):
    """(losses, metrics, gradient) of an objective."""
    network, batch = (Watching, BATCH) if given else (Free, {k: v for k, v in BATCH.items() if k != "given"})
    others = {"on_given": jnp.float64(others_on_given), "on_others": jnp.float64(0)}
    (losses, metrics), grads = compiled(name, network)(parameters(0, on_given, on_others), batch, others)
    return np.asarray(losses), metrics, grads


@dataclasses.dataclass(frozen=True)
class Free(Bare):
    """`Watching` where nothing is given."""

    def velocity(self, params, x, t, prepared, view=ITSELF):
        return super().velocity(params, x, t, prepared, view) + params["on_others"]


def close(a, b):
    return jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=RTOL, atol=RTOL * np.abs(b).max()), a, b))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_given_frames_are_seen_and_not_learnt(name):
    """Whatever networks say of them, losses, norms and gradients stay; what is said of the others changes all three."""
    losses, metrics, grads = usual = found_by(name)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(usual)), "a given frame was moved, or not told of"
    assert float(grads["on_given"]) == 0 and abs(float(grads["on_others"])) > 1e-6
    assert close(found_by(name, on_given=3.0), usual)
    assert close(found_by(name, others_on_given=3.0), usual)
    moved = found_by(name, on_others=0.3)
    assert (np.abs(moved[0] / losses - 1) > 1e-4).all()
    assert not close(moved[2], grads)
    for norm in {"tangent_norm", "dmd_norm"} & set(metrics):
        assert (np.abs(moved[1][norm] / metrics[norm] - 1) > 1e-6).all()
    # Samples of one batch differ in what is given: one without is what it is where nothing is given at all.
    alone = found_by(name, given=False)[0]
    np.testing.assert_allclose(losses[1], alone[1], rtol=RTOL)
    assert abs(losses[0] / alone[0] - 1) > 1e-3 and abs(losses[2] / alone[2] - 1) > 1e-3


@pytest.mark.parametrize("name", ["sf_dmd, replayed", "sf_dmd, replayed at once"])
def test_replaying_is_differentiating(name):
    assert close(found_by(name), found_by("sf_dmd"))


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_rollout_holds_them(steps, noisy):
    """To the bit, at time 0 and clean for later chunks too; all else is a slow loop that holds them."""
    plan = RolloutPlan(PLAN.schedule, ContextRule(noisy))
    student = bound(0, on_given=2.0, on_others=0.1)
    done = tiny.jit(lambda steps: rollout(student, COND, KEY, plan, steps, SHAPE, X0))(steps)
    np.testing.assert_array_equal(np.asarray(done.samples)[GIVEN], X0[GIVEN])
    np.testing.assert_array_equal(np.asarray(done.inputs)[GIVEN], X0[GIVEN])
    keys = bare._keys(student.params, X0, np.zeros((1, FRAMES)), COND)
    np.testing.assert_allclose(np.asarray(done.cache[0])[GIVEN], np.asarray(keys)[GIVEN], rtol=1e-12)

    quiet = COND.replace(given=None)
    unwatched = Bound(Free(PATTERN), student.params)
    slow = bare.slow_rollout(unwatched, quiet, KEY, plan, steps, (GIVEN, X0))
    # Times are float32 in the rollout's table.
    np.testing.assert_allclose(done.samples, slow, atol=1e-6)
    free = rollout(unwatched, quiet, KEY, plan, steps, SHAPE).samples
    np.testing.assert_allclose(done.samples[1], free[1], rtol=1e-9)
    assert (np.abs(np.asarray(done.samples - free))[0, 1:].max((1, 2, 3)) > 1e-4).all(), "later frames see them"


class Recorder:
    """What a network saw in every call outside of transformations."""

    def __init__(self, monkeypatch):
        self.calls, velocity = [], Watching.velocity

        def recorded(network, params, x, t, prepared, view=ITSELF):
            v = velocity(network, params, x, t, prepared, view)
            if not isinstance(v, jax.core.Tracer):
                self.calls.append((network, params, x, t, prepared, view, v))
            return v

        monkeypatch.setattr(Watching, "velocity", recorded)


def test_the_tangent_stands_still_there(monkeypatch):
    """Its norm by hand: the central difference along the teacher's direction, in which given frames do not move."""
    seen = Recorder(monkeypatch)
    student, teacher, constants = bound(0), bound(1), ContinuousTime(one_pass=False, guidance=1.0)
    losses, metrics = tf_scm(student, BATCH, COND, KEY, teacher=teacher, uncond=None, constants=constants)
    (*_, v_T), (network, params, x, t, prepared, view, v) = seen.calls
    own, move = bare.wide(~GIVEN), 1e-4

    def along(sign):
        there = x + sign * move * own * v_T, t + sign * move * ~GIVEN
        return Bare.velocity(network, params, *there, prepared, view)

    tau = (along(1) - along(-1)) / (2 * move)
    # The time of the generated frames, one a sample.
    t = np.max(t, 1)[:, None, None, None, None]
    g = own * (v_T - v - t * tau)
    norm = np.sqrt((g**2).sum((1, 2, 3, 4)))
    np.testing.assert_allclose(metrics["tangent_norm"], norm, rtol=1e-6)  # a second difference's error
    np.testing.assert_allclose(losses, 100 * (norm / (norm + NORM_FLOOR)) ** 2, rtol=1e-6)


def test_the_normaliser_is_of_generated_frames(monkeypatch):
    """W is the mean of |x − x_real| over them; a sample of nothing but given frames has no gradient and no NaN."""
    seen = Recorder(monkeypatch)
    x = np.where(bare.wide(GIVEN), X0, X0 + 1.0)
    scores = Scores(bound(1, None), bound(2, None), None)
    target, norm = dmd_target(x, KEY, scores, COND, matching(), HELD)
    (_, _, y, t, *_, fake), (*_, real) = seen.calls
    x_fake, x_real = y - bare.wide(t) * fake, y - bare.wide(t) * real
    for row in range(SHAPE[0]):
        free = ~GIVEN[row]
        w = np.abs(x - x_real)[row, free].mean()
        g = np.zeros(SHAPE[1:])
        g[free] = (x_fake - x_real)[row, free] / w
        np.testing.assert_allclose(target[row], x[row] - g, atol=1e-12)
        np.testing.assert_allclose(norm[row], np.sqrt((g**2).sum()), rtol=1e-12)


def test_a_sample_of_nothing_but_given_frames(monkeypatch):
    """It has no loss, no gradient and no NaN, and leaves its neighbours alone."""
    monkeypatch.setitem(globals(), "GIVEN", np.array([[True] * FRAMES, [False] * FRAMES, [False] * FRAMES]))
    batch = BATCH | {"given": GIVEN}
    others = {"on_given": np.float64(0), "on_others": np.float64(0)}
    for name in ("tf", "tf_scm", "sf_dmd, replayed", "critic"):
        (losses, _), grads = tiny.jit(functools.partial(OBJECTIVES[name], Watching))(parameters(0), batch, others)
        assert losses[0] == 0 and (losses[1:] > 0).all(), name
        assert all(np.isfinite(g).all() for g in grads.values()), name
