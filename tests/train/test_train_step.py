"""One iteration: a bad sample costs only itself, accumulation is exact, each player keeps its own count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fakes as fakes

from crcm_jax.objectives.algorithm import Algorithm, gradient_of
from crcm_jax.train import state as state_lib
from crcm_jax.train.optimizer import Optimizer
from crcm_jax.train.step import make_steps, step_key

OPTIMIZER = Optimizer(lr=1e-2, warmup=0)


def weighted_loss(params, others, batch, key, progress):
    """Depends on its own sample alone; `poison` makes a NaN *inside* the network, after parameters have acted."""
    hidden = fakes.forward(params, batch["latents"])
    hidden = hidden + jnp.sqrt(batch["poison"])[:, None] * hidden
    losses = jnp.sum(jnp.square(hidden - 1.0), 1)
    return losses, {"size": losses}


def make_batch(size=6, poison=()):
    x = np.random.default_rng(1).normal(size=(size, fakes.DIM)).astype(np.float32)
    flags = np.zeros(size, np.float32)
    flags[list(poison)] = -1.0
    return {"latents": jnp.asarray(x), "poison": jnp.asarray(flags)}


def take(batch, rows):
    return {name: value[jnp.asarray(rows)] for name, value in batch.items()}


@functools.cache
def step_for(loss, accumulate=1):
    return make_steps(Algorithm(gradient_of(loss)), OPTIMIZER, accumulate=accumulate)[0]


def step_once(batch, loss=weighted_loss, accumulate=1, params=None):
    step = step_for(loss, accumulate)
    return step(state_lib.create(params or fakes.init_params(), OPTIMIZER), {}, batch)


def assert_same(a, b, atol=1e-7):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=atol), a, b)


def difference(a, b):
    return max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("bad", [[2], [0, 5], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("where", ["network", "data"])
def test_update_equals_the_update_without_the_bad_samples(bad, where):
    batch = make_batch(poison=bad if where == "network" else ())
    if where == "data":
        batch["latents"] = batch["latents"].at[jnp.asarray(bad), 0].set(jnp.inf)
    good = [row for row in range(6) if row not in bad]
    guarded, metrics = step_once(batch)
    clean, expected = step_once(take(make_batch(), good))
    everyone, _ = step_once(make_batch())
    assert_same(guarded.params, clean.params)
    assert_same(guarded.opt, clean.opt)
    assert_same(guarded.ema, clean.ema)
    assert difference(guarded.opt.adam, everyone.opt.adam) > 1e-3  # the bad samples would have changed the update
    for name in ("loss", "size", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    assert int(guarded.bad_samples) == int(metrics["bad_samples"]) == len(bad)
    assert int(guarded.skipped_updates) == int(guarded.bad_streak) == 0


def test_a_mask_on_the_loss_alone_would_not_do():
    def masked(params, others, batch, key, progress):
        losses, _ = weighted_loss(params, others, batch, key, progress)
        return jnp.where(jnp.isfinite(losses), losses, 0.0), {}

    after, metrics = step_once(make_batch(poison=[2]), masked)
    assert int(metrics["skipped"]) == 1 and int(after.skipped_updates) == 1


def test_all_bad_changes_nothing_and_counts():
    params = fakes.init_params()
    step = step_for(weighted_loss)
    now = state_lib.create(params, OPTIMIZER)
    now, _ = step(now, {}, make_batch())
    before = jax.tree.map(np.array, now)
    for streak in (1, 2):
        now, metrics = step(now, {}, make_batch(poison=range(6)))
        assert int(now.bad_streak) == streak == int(metrics["bad_streak"])
    for name in ("params", "ema", "opt"):
        jax.tree.map(np.testing.assert_array_equal, getattr(now, name), getattr(before, name))
    assert int(now.bad_samples) == 12 and int(now.skipped_updates) == 2
    assert int(now.progress.iteration) == int(now.progress.student_updates) == 3  # phases follow the iteration
    now, _ = step(now, {}, make_batch())
    assert int(now.bad_streak) == 0 and int(now.opt.count) == 2


def test_a_gradient_that_is_not_finite_skips_the_update():
    def kink(params, others, batch, key, progress):
        # value 0, derivative infinite
        return jnp.sqrt(jnp.square(params["layer"]["w"][0])) * batch["latents"][:, 0], {}

    params = {"layer": {"w": jnp.zeros(fakes.DIM), "b": jnp.ones(fakes.DIM)}}
    after, metrics = step_once(make_batch(), kink, params=params)
    assert_same(after.params, params)
    assert int(after.skipped_updates) == 1 and int(metrics["bad_samples"]) == 6


def test_replacement_comes_from_a_good_sample():
    """A network that is NaN at zero input still yields the good samples' update."""

    def picky(params, others, batch, key, progress):
        unit = batch["latents"] / jnp.linalg.norm(batch["latents"], axis=1, keepdims=True)
        return jnp.sum(jnp.square(fakes.forward(params, unit) - 1), 1), {}

    batch = make_batch()
    batch["latents"] = batch["latents"].at[0].set(0.0)
    guarded, _ = step_once(batch, picky)
    clean, _ = step_once(take(make_batch(), range(1, 6)), picky)
    assert_same(guarded.params, clean.params)


@pytest.mark.parametrize("poison", [(), (1,), (0, 3)], ids=["clean", "one bad", "a whole microbatch bad"])
def test_accumulation_equals_the_big_batch(poison):
    # microbatches of 2 take every third sample: 0 and 3 make up the first
    whole, one = step_once(make_batch(poison=poison))
    parts, many = step_once(make_batch(poison=poison), accumulate=3)
    assert_same(whole.params, parts.params)
    assert_same(whole.opt, parts.opt)
    assert int(parts.bad_samples) == len(poison)
    for name in ("loss", "grad_norm", "size"):
        assert float(one[name]) == pytest.approx(float(many[name]), rel=1e-5)


def test_a_microbatch_with_a_bad_gradient_costs_only_itself():
    def kink(params, others, batch, key, progress):
        # value 0 and derivative NaN for the poisoned sample, value 1 and derivative 0 for the others
        edge = jnp.sqrt(jnp.where(batch["poison"] < 0, jnp.square(params["layer"]["b"][0]), 1.0))
        return jnp.sum(jnp.square(params["layer"]["w"] * batch["latents"] - 1.0), 1) + edge, {}

    params = {"layer": {"w": jnp.ones(fakes.DIM), "b": jnp.zeros(fakes.DIM)}}
    after, metrics = step_once(make_batch(poison=[1]), kink, accumulate=3, params=params)
    clean, _ = step_once(take(make_batch(), [0, 2, 3, 5]), kink, params=params)
    assert_same(after.params, clean.params)
    assert difference(after.params, params) > 1e-3
    assert int(metrics["bad_samples"]) == 2 and int(metrics["skipped"]) == 0


def test_indivisible_accumulation_is_refused():
    with pytest.raises(ValueError, match=r"6 does not split into optim\.accumulate = 4"):
        step_once(make_batch(), accumulate=4)


def test_keys_differ_by_seed_purpose_iteration_and_microbatch():
    arguments = [
        (0, "student", 0, 0),
        (1, "student", 0, 0),
        (0, "critic", 0, 0),
        (0, "student", 1, 0),
        (0, "student", 0, 1),
    ]
    drawn = {tuple(np.asarray(jax.random.key_data(step_key(*a)))) for a in arguments}
    assert len(drawn) == len(arguments)


def test_players_take_turns_and_keep_their_own_counts():
    algorithm = fakes.algorithm(freq=3)
    critic_optimizer = Optimizer(lr=3e-2, warmup=4)
    student_step, critic_step = make_steps(algorithm, OPTIMIZER, critic_optimizer)
    now = state_lib.create(fakes.init_params(0), OPTIMIZER, fakes.init_params(1), critic_optimizer)
    for iteration, batch in zip(range(8), fakes.Data()):
        before = jax.tree.map(np.array, now)
        student = algorithm.is_student_phase(iteration)
        assert student == (iteration % 3 == 0)
        now, metrics = (student_step if student else critic_step)(now, {}, batch)
        moved = {
            name: difference(getattr(now, name), getattr(before, name)) > 0 for name in ("params", "ema", "critic")
        }
        assert moved == {"params": student, "ema": student, "critic": not student}
        done = (int(now.progress.student_updates), int(now.progress.critic_updates))
        assert done == algorithm.counts(iteration + 1) == (int(now.opt.count), int(now.critic_opt.count))
        own = done[0] - 1 if student else done[1] - 1
        rate = 1e-2 if student else 3e-2 * (1e-6 + (1 - 1e-6) * min(1, own / 4))
        assert float(metrics["lr"]) == pytest.approx(rate, rel=1e-5)


def test_a_critic_that_starts_as_the_real_score_does_not_take_it_along():
    real = fakes.init_params(1)
    now = state_lib.create(real, OPTIMIZER, real, OPTIMIZER)
    _, critic_step = make_steps(fakes.algorithm(), OPTIMIZER, OPTIMIZER)
    now, _ = critic_step(now, {"real": real}, next(fakes.Data()))
    assert difference(now.critic, real) > 0  # and `real` can still be read: it was not donated
    assert difference(now.params, real) == 0
