"""Self-forcing: what each chunk is generated from, what is cached of it, and that replaying is differentiating."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from nets import Memory, Simple

from crcm_jax import compiler
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.objectives.sf_dmd import Matching, Scores, critic, sf_dmd, sf_dmd_replayed
from crcm_jax.parallel.placement import Placement
from crcm_jax.parallel.rules import Layout, leaf_name
from crcm_jax.sampling.rollout import frozen_rollout, over_chunks, replay, rollout
from crcm_jax.sampling.schedule import MID_TIMES, ContextRule, RolloutPlan, Schedule

FRAMES, SINGLE = 5, ChunkPattern(1, 1)
SHAPE = (2, FRAMES, 1, 1, 3)
TWO_STEP = Schedule((4, 2), (MID_TIMES, (5 / 6,)))
LATER = ContextRule(noisy=True, start=1)


PARAMS = {"a": jnp.asarray(0.7), "b": jnp.asarray(-0.3), "c": jnp.asarray(0.5)}


def run(plan, steps, chunks=SINGLE, params=PARAMS, seed=0):
    model, cond = Bound(Memory(chunks, SHAPE), params), Condition({"text": jnp.zeros((2, 1, 1))})
    done = rollout(model, cond, jax.random.key(seed), plan, steps, SHAPE)
    return done._replace(cache=done.cache[0])


def test_exit_times_of_a_truncated_schedule():
    """Per-chunk steps [4, 2, 2, 2, 2]: min(N, m_b) steps, the last listed time is where x0 is read off:
    spec causal_rcm 11."""
    plan = RolloutPlan(TWO_STEP)
    expected = {
        1: [1, 1, 1, 1, 1],
        2: [15 / 16, 5 / 6, 5 / 6, 5 / 6, 5 / 6],
        3: [5 / 6, 5 / 6, 5 / 6, 5 / 6, 5 / 6],
        4: [5 / 8, 5 / 6, 5 / 6, 5 / 6, 5 / 6],
    }
    jitted = jax.jit(lambda steps: run(plan, steps).times)
    for steps, times in expected.items():
        np.testing.assert_allclose(jitted(steps), times, rtol=1e-7)  # float32 times
    for counter, steps in ((0, 1), (3, 4), (4, 1)):
        assert plan.exit.steps(plan.schedule, counter, None) == steps
    uneven = run(plan, 4, ChunkPattern(1, 4)).times
    np.testing.assert_allclose(uneven, [5 / 8, 5 / 6, 5 / 6, 5 / 6, 5 / 6], rtol=1e-7)


def test_the_last_step_makes_the_sample():
    """samples = inputs − t·v(inputs, t; cache), and each input is (1−t)·x0 of the step before plus t·noise."""
    done = run(RolloutPlan(), 2)
    past = np.cumsum(np.concatenate([np.zeros((2, 1, 1, 1, 3)), done.cache["x"][:, :-1]], 1), 1) / FRAMES
    t = np.asarray(done.times)[None, :, None, None, None]
    v = 0.7 * done.inputs - 0.3 * t + 0.5 * past
    np.testing.assert_allclose(done.samples, done.inputs - t * v, atol=1e-6)
    # One step starts from unit noise at t = 1 exactly; the second re-noises its prediction with fresh noise.
    first = run(RolloutPlan(), 1)
    assert (np.asarray(first.times) == 1).all()
    fresh = (np.asarray(done.inputs)[:, 0] - (1 - 15 / 16) * np.asarray(first.samples)[:, 0]) / (15 / 16)
    assert not np.allclose(fresh, first.inputs[:, 0])
    noise = np.concatenate([fresh.ravel(), np.asarray(first.inputs).ravel()])
    assert 0.5 < noise.std() < 1.5


def test_a_seed_does_not_depend_on_the_chunk_pattern():
    """Noises are full clips, cut by frame (spec causal_rcm 10.30)."""
    np.testing.assert_array_equal(run(RolloutPlan(), 1).inputs, run(RolloutPlan(), 1, ChunkPattern(1, 2)).inputs)


def test_context_is_clean_by_default():
    """Case a: x0 at t = 0."""
    done = run(RolloutPlan(), 3)
    np.testing.assert_array_equal(done.cache["x"], done.samples)
    np.testing.assert_array_equal(done.cache["t"], np.zeros((2, FRAMES)))


def test_noisy_context(usual):
    """Case b, the full schedule: the last step's own input and time. Case c, a truncated one: x0 noised afresh to the
    last time of the chunk's full schedule. Chunks before the start stay clean."""
    plan = RolloutPlan(TWO_STEP, LATER)
    last = np.float32([0, 5 / 6, 5 / 6, 5 / 6, 5 / 6])
    exact = jax.jit(functools.partial(run, plan), static_argnums=0, compiler_options=usual)
    full = exact(4)
    np.testing.assert_array_equal(full.cache["t"], np.tile(last, (2, 1)))
    np.testing.assert_array_equal(full.cache["x"][:, 1:], full.inputs[:, 1:])
    np.testing.assert_array_equal(full.cache["x"][:, 0], full.samples[:, 0])

    short = exact(1)
    np.testing.assert_array_equal(short.cache["t"], np.tile(last, (2, 1)))
    np.testing.assert_array_equal(short.cache["x"][:, 0], short.samples[:, 0])
    noise = (np.asarray(short.cache["x"]) - (1 - 5 / 6) * np.asarray(short.samples))[:, 1:] / (5 / 6)
    assert 0.6 < noise.std() < 1.4, "unit noise, 24 draws"
    assert abs(np.corrcoef(noise.ravel(), np.asarray(short.inputs)[:, 1:].ravel())[0, 1]) < 0.6, "and fresh"
    # A chunk with a single step has an empty schedule: it is cached as it came in, at t = 1.
    single = run(RolloutPlan(Schedule((4, 1), (MID_TIMES, ())), ContextRule(noisy=True)), 4)
    np.testing.assert_array_equal(single.cache["t"][0], np.float32([5 / 8, 1, 1, 1, 1]))


def test_only_last_steps_are_differentiable():
    """The gradient of Σ samples by hand: per chunk −t·Σ(∂v/∂params), with inputs and cache held fixed."""

    def total(params):
        return jnp.sum(run(RolloutPlan(), 3, params=params).samples)

    done, grads = run(RolloutPlan(), 3), jax.grad(total)(PARAMS)
    t = np.asarray(done.times)[None, :, None, None, None]
    past = np.cumsum(np.concatenate([np.zeros((2, 1, 1, 1, 3)), done.cache["x"][:, :-1]], 1), 1) / FRAMES
    expected = {"a": -t * done.inputs, "b": -t * t * np.ones(SHAPE), "c": -t * past}
    for name, value in expected.items():
        np.testing.assert_allclose(grads[name], value.sum(), rtol=1e-5)  # float32 sums of 30 terms


GIVEN = np.array([[1, 0, 0, 1, 0], [0, 0, 1, 1, 0]], bool)
"""A whole chunk of one sample or both, and a part of one, under the pattern (1, 2)."""


def partly_given():
    """(a network, a condition with given frames, the latents of which they are)."""
    cond = Condition({"text": jnp.zeros((2, 1, 1))}, given=jnp.asarray(GIVEN))
    return Memory(ChunkPattern(1, 2), SHAPE), cond, tiny.normal(1, *SHAPE)


@pytest.mark.parametrize("context", [ContextRule(), ContextRule(noisy=True)])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_given_frames_stay_as_they_are(steps, context):
    """In every step, in the clip and in what later chunks see, at time 0; the others are made as ever beside them."""
    network, cond, clean = partly_given()
    plan = RolloutPlan(Schedule(), context)
    done = rollout(Bound(network, PARAMS), cond, jax.random.key(0), plan, steps, SHAPE, clean)
    (cache,) = done.cache
    for made in (done.samples, done.inputs, cache["x"]):
        np.testing.assert_array_equal(np.asarray(made)[GIVEN], clean[GIVEN])
        assert not np.isclose(made, clean)[~GIVEN].any()
    assert (np.asarray(cache["t"])[GIVEN] == 0).all()
    assert (np.asarray(cache["t"])[~GIVEN] == (5 / 8 if context.noisy else 0)).all()
    past = np.cumsum(np.concatenate([np.zeros((2, 1, 1, 1, 3)), cache["x"][:, :-1]], 1), 1) / FRAMES
    past = past[:, [0, 1, 1, 3, 3]]  # of frames before the chunk
    t = np.asarray(done.times)[None, :, None, None, None]
    made = done.inputs - t * (0.7 * done.inputs - 0.3 * t + 0.5 * past)
    np.testing.assert_allclose(np.asarray(done.samples)[~GIVEN], np.asarray(made)[~GIVEN], atol=1e-6)


def test_given_frames_teach_nothing_in_a_replay():
    """Errors and gradient are those of the generated frames, through the rollout as in its replay."""
    network, cond, clean = partly_given()
    weights, goal = jnp.array([0.3, 1.7]), jnp.asarray(tiny.normal(2, *SHAPE))

    def made(params):
        return rollout(Bound(network, params), cond, jax.random.key(0), RolloutPlan(), 3, SHAPE, clean)

    def loss(params):
        errors = jnp.where(GIVEN[:, :, None, None, None], 0, jnp.square(made(params).samples - goal)).sum((1, 2, 3, 4))
        return jnp.sum(weights * errors), errors

    grads, errors = jax.grad(loss, has_aux=True)(PARAMS)
    found, others = replay(Bound(network, PARAMS), cond, made(PARAMS), goal, weights, clean=clean)
    np.testing.assert_allclose(found, errors, rtol=1e-5)  # float32, summed chunk by chunk
    for name, g in grads.items():
        np.testing.assert_allclose(others[name], g, rtol=1e-5)


def test_the_critic_learns_the_velocity_of_rollouts():
    """mean (v − (ε − x))² over the generated frames, of a rollout x that has seen as many steps as the critic's own
    updates say; ε recovered from what the critic sees."""
    network, cond, clean = partly_given()
    seen = []

    class Critic(Simple):
        def velocity(self, params, x, t, prepared, view):
            seen.append((np.asarray(x), np.asarray(t)))
            return 0.6 * x

    batch = {"latents": clean, "prompt": cond.prompt, "given": cond.given}
    student, key = Bound(network, PARAMS), jax.random.key(3)
    losses, metrics = critic(Bound(Critic(), {}), batch, cond, key, student=student, updates=2)
    assert float(metrics["steps"]) == 3
    x = np.asarray(rollout(student, cond, jax.random.split(key, 3)[0], RolloutPlan(), 3, SHAPE, clean).samples)
    ((y, t),) = seen
    assert (t[GIVEN] == 0).all() and (t[~GIVEN] > 0).all()
    t, free = t[..., None, None, None], np.broadcast_to(~GIVEN[..., None, None, None], SHAPE)
    noise = np.where(free, y - (1 - t) * x, 0) / np.where(free, t, 1)
    expected = np.mean(np.square(0.6 * y - (noise - x)), (1, 2, 3, 4), where=free)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)  # ε is divided by t


def test_over_chunks_visits_every_frame_once():
    """In order, with the chunk's index, for equal and unequal first chunks."""
    for pattern in (ChunkPattern(1, 1), ChunkPattern(2, 2), ChunkPattern(2, 4), ChunkPattern(6, 3)):
        body = lambda carry, chunk, x: (carry * 10 + chunk, x + 100 * chunk)  # noqa: E731
        carry, y = over_chunks(pattern, 6, body, jnp.zeros((), jnp.int32), jnp.arange(6))
        np.testing.assert_array_equal(y, np.arange(6) + 100 * pattern.index(6))
        expected = 0
        for chunk in range(pattern.count(6)):
            expected = expected * 10 + chunk
        assert int(carry) == expected


def test_replaying_is_differentiating(x64, monkeypatch):
    """Loss and every parameter's gradient, for one step and the full schedule, with unequal weights of the samples; all
    at once, also from a rollout with layers unrolled, as on GPUs."""
    plan = RolloutPlan(TWO_STEP, LATER)
    pattern = ChunkPattern(1, 2)
    student, score = tiny.wan(pattern, "float64", layers=1), tiny.wan(None, "float64", layers=1)
    params, real, fake = (tiny.parameters(n, s, np.float64) for n, s in ((student, 0), (score, 1), (score, 2)))
    batch = {"latents": tiny.latents(3, 2, 3, np.float64)}
    cond, uncond = tiny.condition(dtype=np.float64), tiny.condition(8, dtype=np.float64)
    matching = Matching(plan, guidance=3.0, scale=0.7)
    options = {"scores": Scores(Bound(score, real), Bound(score, fake), uncond)}
    weights, key = jnp.array([0.3, 1.7]), jax.random.key(5)

    @tiny.jit
    def direct(params, updates):
        def loss(params):
            model = Bound(student, params)
            losses, metrics = sf_dmd(model, batch, cond, key, updates=updates, matching=matching, **options)
            return jnp.sum(weights * losses), (losses, metrics)

        grads, aux = jax.grad(loss, has_aux=True)(params)
        return aux, grads

    @functools.partial(tiny.jit, static_argnums=2)
    def replayed(params, updates, at_once):
        arguments = options | {"updates": updates, "matching": dataclasses.replace(matching, at_once=at_once)}
        return sf_dmd_replayed(Bound(student, params), batch, cond, key, weights, **arguments)

    norms = []
    for updates, at_once in ((0, False), (3, False), (3, True)):
        monkeypatch.setattr(compiler, "unrolls_layers", lambda at_once=at_once: at_once)
        (losses, metrics), grads = direct(params, updates)
        (other, _), others = replayed(params, updates, at_once)
        np.testing.assert_allclose(losses, other, rtol=1e-12)
        # The loss is ‖G‖²·scale: x − (x − G).
        np.testing.assert_allclose(losses, 0.7 * metrics["dmd_norm"] ** 2, rtol=1e-9)
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            other = others
            for k in path:
                other = other[k.key]
            assert float(jnp.abs(g - other).max()) < 1e-12 * largest, path
            assert float(jnp.abs(g).max()) > 0, path
        norms.append(largest)
    assert norms[0] != norms[1]


@pytest.mark.parametrize("unrolled", [False, True])
def test_a_rollout_gathers_every_matrix_once(unrolled, monkeypatch):
    """Counted in the program, where a loop's body stands once."""
    monkeypatch.setattr(compiler, "unrolls_layers", lambda: unrolled)
    mesh, pattern = tiny.abstract_mesh(1, 2, 1, 1), ChunkPattern(1, 1)
    network = tiny.wan(pattern, placement=Placement(mesh))
    params = tiny.parameters(network)

    def gathers(once):
        def samples(params):
            arguments = tiny.condition(), jax.random.key(0), RolloutPlan(), 2, (2, 3, 4, 6, 3)
            return frozen_rollout(Bound(network, params), *arguments, gather_once=once).samples

        return str(jax.make_jaxpr(samples)(params)).count("linear_call[")

    def cut(tree):
        names = jax.tree_util.tree_leaves_with_path({tree: params[tree]})
        layout = Layout(mesh, network.rules)
        return sum("fsdp" in layout.spec(leaf_name(path), leaf.shape)[0] for path, leaf in names)

    layers = network.config.layers if unrolled else 1
    assert gathers(True) == cut("outside") + layers * cut("blocks") < gathers(False)
