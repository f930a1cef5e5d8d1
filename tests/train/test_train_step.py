"""One iteration: a bad sample costs only itself, accumulation is exact, each player keeps its own count."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fakes as fakes

from crcm_jax.aot import dumps
from crcm_jax.train import state as state_lib
from crcm_jax.train.checkpoint import trees_of
from crcm_jax.train.optimizer import Optimizer
from crcm_jax.train.step import Frozen, make_steps, step_key, step_name

OPTIMIZER = Optimizer(lr=1e-2, warmup=0)
NOTHING = Frozen({}, None)


def weighted_loss(nets, batch, key, progress):
    """Depends on its own sample alone; `poison` makes a NaN *inside* the network, after parameters have acted."""
    hidden = fakes.forward(nets["student"].params, batch["latents"])
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
    return make_steps(fakes.training_of({"student": loss}), {"student": OPTIMIZER}, accumulate=accumulate)["student"]


def create(params=None, training=None, optimizers=None):
    """The state before iteration 0, of a student alone unless told otherwise; `params` by player."""
    training = training or fakes.training_of({"student": weighted_loss})
    params = params or {"student": fakes.init_params()}
    return state_lib.create(params, training.players, optimizers or dict.fromkeys(params, OPTIMIZER))


def step_once(batch, loss=weighted_loss, accumulate=1, params=None):
    """(the state after one iteration, the student's part of it, metrics)."""
    step = step_for(loss, accumulate)
    now, metrics = step(create(params and {"student": params}), NOTHING, batch)
    return now, now.players["student"], metrics


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
    now, guarded, metrics = step_once(batch)
    _, clean, expected = step_once(take(make_batch(), good))
    _, everyone, _ = step_once(make_batch())
    assert_same(guarded.params, clean.params)
    assert_same(guarded.opt, clean.opt)
    assert_same(guarded.averages["ema"], clean.averages["ema"])
    assert difference(guarded.opt.adam, everyone.opt.adam) > 1e-3  # the bad samples would have changed the update
    for name in ("loss", "size", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    assert int(now.bad_samples) == int(metrics["bad_samples"]) == len(bad)
    assert int(now.skipped_updates) == int(now.bad_streak) == 0


def test_a_mask_on_the_loss_alone_would_not_do():
    def masked(nets, batch, key, progress):
        losses, _ = weighted_loss(nets, batch, key, progress)
        return jnp.where(jnp.isfinite(losses), losses, 0.0), {}

    now, _, metrics = step_once(make_batch(poison=[2]), masked)
    assert int(metrics["skipped"]) == 1 and int(now.skipped_updates) == 1


def test_all_bad_changes_nothing_and_counts():
    step = step_for(weighted_loss)
    now = create()
    for _ in range(2):
        now, _ = step(now, NOTHING, make_batch())
    before = jax.tree.map(np.array, now.players["student"])
    assert difference(before.params, before.averages["ema"]) > 1e-5  # an average that went on would move
    for streak in (1, 2):
        now, metrics = step(now, NOTHING, make_batch(poison=range(6)))
        assert int(now.bad_streak) == streak == int(metrics["bad_streak"])
    student = now.players["student"]
    for name in ("params", "averages", "opt"):
        jax.tree.map(np.testing.assert_array_equal, getattr(student, name), getattr(before, name))
    assert int(now.bad_samples) == 12 and int(now.skipped_updates) == 2
    assert int(now.iteration) == int(student.updates) == 4  # phases follow the iteration
    assert int(now.progress.iteration) == int(now.progress.updates["student"]) == 4
    now, _ = step(now, NOTHING, make_batch())
    assert int(now.bad_streak) == 0 and int(now.players["student"].opt.count) == 3


def test_a_gradient_that_is_not_finite_skips_the_update():
    def kink(nets, batch, key, progress):
        # value 0, derivative infinite
        return jnp.sqrt(jnp.square(nets["student"].params["layer"]["w"][0])) * batch["latents"][:, 0], {}

    params = {"layer": {"w": jnp.zeros(fakes.DIM), "b": jnp.ones(fakes.DIM)}}
    now, after, metrics = step_once(make_batch(), kink, params=params)
    assert_same(after.params, params)
    assert int(now.skipped_updates) == 1 and int(metrics["bad_samples"]) == 6


def test_replacement_comes_from_a_good_sample():
    """A network that is NaN at zero input still yields the good samples' update."""

    def picky(nets, batch, key, progress):
        unit = batch["latents"] / jnp.linalg.norm(batch["latents"], axis=1, keepdims=True)
        return jnp.sum(jnp.square(fakes.forward(nets["student"].params, unit) - 1), 1), {}

    batch = make_batch()
    batch["latents"] = batch["latents"].at[0].set(0.0)
    _, guarded, _ = step_once(batch, picky)
    _, clean, _ = step_once(take(make_batch(), range(1, 6)), picky)
    assert_same(guarded.params, clean.params)


@pytest.mark.parametrize("poison", [(), (1,), (0, 3)], ids=["clean", "one bad", "a whole microbatch bad"])
def test_accumulation_equals_the_big_batch(poison):
    # microbatches of 2 take every third sample: 0 and 3 make up the first
    _, whole, one = step_once(make_batch(poison=poison))
    now, parts, many = step_once(make_batch(poison=poison), accumulate=3)
    assert_same(whole.params, parts.params)
    assert_same(whole.opt, parts.opt)
    assert int(now.bad_samples) == len(poison)
    for name in ("loss", "grad_norm", "size"):
        assert float(one[name]) == pytest.approx(float(many[name]), rel=1e-5)


def test_a_microbatch_with_a_bad_gradient_costs_only_itself():
    def kink(nets, batch, key, progress):
        # value 0 and derivative NaN for the poisoned sample, value 1 and derivative 0 for the others
        params = nets["student"].params
        edge = jnp.sqrt(jnp.where(batch["poison"] < 0, jnp.square(params["layer"]["b"][0]), 1.0))
        return jnp.sum(jnp.square(params["layer"]["w"] * batch["latents"] - 1.0), 1) + edge, {}

    params = {"layer": {"w": jnp.ones(fakes.DIM), "b": jnp.zeros(fakes.DIM)}}
    _, after, metrics = step_once(make_batch(poison=[1]), kink, accumulate=3, params=params)
    _, clean, _ = step_once(take(make_batch(), [0, 2, 3, 5]), kink, params=params)
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


def test_every_microbatch_draws_for_itself():
    """By the keys of its own number: what is logged is the mean over them."""

    def draws(nets, batch, key, progress):
        losses, _ = weighted_loss(nets, batch, key, progress)
        return losses, {"draw": jax.random.normal(key)}

    for accumulate in (1, 3):
        _, _, metrics = step_once(make_batch(), draws, accumulate)
        expected = np.mean([jax.random.normal(step_key(0, "student", 0, m)) for m in range(accumulate)])
        assert float(metrics["draw"]) == pytest.approx(expected, rel=1e-5)


def two_players(critic_optimizer=OPTIMIZER, **options):
    """(training, a step for each player, the state before iteration 0)."""
    training = fakes.training(**options)
    optimizers = {"student": OPTIMIZER, "critic": critic_optimizer}
    params = {"student": fakes.init_params(0), "critic": fakes.init_params(1)}
    return training, make_steps(training, optimizers), create(params, training, optimizers)


def moved(now, before):
    """Which trees an iteration has changed, by name."""
    trees, old = trees_of(now), trees_of(before)
    return {name for name in trees if name != "counters" and difference(trees[name], old[name]) > 0}


def test_players_take_turns_and_keep_their_own_counts():
    training, steps, now = two_players(Optimizer(lr=3e-2, warmup=4), freq=3)
    for iteration, batch in zip(range(8), fakes.Data()):
        before = jax.tree.map(np.array, now)
        name = training.turns.player(iteration)
        assert name == ("student" if iteration % 3 == 0 else "critic")
        now, metrics = steps[name](now, NOTHING, batch)
        own = {"student": {"student.params", "student.opt", "student.ema"}, "critic": {"critic.params", "critic.opt"}}
        assert moved(now, before) == own[name]
        done = {name: int(player.updates) for name, player in now.players.items()}
        assert done == training.turns.counts(iteration + 1) and sum(done.values()) == int(now.iteration)
        assert done == {name: int(player.opt.count) for name, player in now.players.items()}
        assert done == {name: int(count) for name, count in now.progress.updates.items()}
        rate = 1e-2 if name == "student" else 3e-2 * (1e-6 + (1 - 1e-6) * min(1, (done[name] - 1) / 4))
        assert float(metrics["lr"]) == pytest.approx(rate, rel=1e-5)


def test_the_average_counts_its_players_own_updates_from_the_first():
    """By hand: after one update the average is the parameters, after two the power law's mean of both, critic's turns
    between them or not."""
    _, steps, now = two_players()
    data, seen = fakes.Data(), []
    for name in ("critic", "student", "critic", "critic", "student", "critic"):
        now, _ = steps[name](now, NOTHING, next(data))
        if name == "student":
            seen.append(jax.tree.map(np.array, now.players["student"].params))
        student = now.players["student"]
        assert int(student.updates) == len(seen)
        if len(seen) == 1:
            jax.tree.map(np.testing.assert_array_equal, student.averages["ema"], seen[0])
    assert difference(seen[0], seen[1]) > 1e-3

    def mixed(kept):
        return jax.tree.map(lambda first, second: kept * first + (1 - kept) * second, *seen)

    # At update 1 the older parameters keep (1 − 1/2)^(γ+1), γ + 1 = 7.9372 for a width of 0.1.
    expected = mixed(0.5**7.9372)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), student.averages["ema"], expected)
    # Power: an index that runs one late keeps the first, or (2/3)^(γ+1) of it.
    for wrong in (1.0, (2 / 3) ** 7.9372):
        assert difference(mixed(wrong), expected) > 1e-5


def test_losses_read_players_and_their_averages():
    def student(nets, batch, key, progress):
        gap = fakes.forward(nets["student"].params, batch["latents"])
        return jnp.sum(jnp.square(gap - fakes.forward(nets["student.ema"].params, batch["latents"]) - 1.0), 1), {}

    _, after, _ = step_once(make_batch(), student)
    # Away from the average, which does not move along: by Adam's whole first step.
    start = fakes.init_params()["layer"]["b"]
    np.testing.assert_allclose(after.params["layer"]["b"], start + 1e-2 * (1 - 0.01 * start), atol=1e-6)


def test_metrics_are_numbers_of_the_batch_or_of_its_samples():
    def loss(nets, batch, key, progress):
        losses, _ = weighted_loss(nets, batch, key, progress)
        return losses, {"latents": batch["latents"]}

    with pytest.raises(ValueError, match=r"metric latents has shape \(6, 4\): give one number, or one a sample, \[6\]"):
        step_once(make_batch(), loss)


@pytest.mark.parametrize("name", ["student", "critic"])
def test_programs_are_called_what_the_compilers_files_are_looked_for_by(name):
    _, steps, now = two_players()
    lowered = steps[name].lower(now, NOTHING, next(fakes.Data()))
    module = re.search(r"module @(\w+)", lowered.as_text())[1]
    assert re.search(dumps.options("", step_name(name))["xla_dump_hlo_module_re"], module), module


def test_a_critic_that_starts_as_the_real_score_does_not_take_it_along():
    real = fakes.init_params(1)
    training = fakes.training(reads=("real",))
    optimizers = {"student": OPTIMIZER, "critic": OPTIMIZER}
    now = create({"student": real, "critic": real}, training, optimizers)
    now, _ = make_steps(training, optimizers)["critic"](now, Frozen({"real": real}, None), next(fakes.Data()))
    assert difference(now.players["critic"].params, real) > 0  # and `real` can still be read: it was not donated
    assert difference(now.players["student"].params, real) == 0
