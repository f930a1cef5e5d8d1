"""The protocol is all that anybody asks of a network: one with nothing else trains, rolls out, streams and samples.

It takes a prompt that is a tree of integers, and an action a frame. Frames are held to be cut with their chunk by a
second network that is told no actions: it knows those of the clip, and cuts them itself.
"""

import dataclasses
import functools
import inspect

import bare
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from bare import FRAMES, PATTERN, SHAPE, Bare

from crcm_jax import flow
from crcm_jax.configs import digits
from crcm_jax.models.base import ITSELF, Condition, Network, OnCache
from crcm_jax.models.bound import Bound
from crcm_jax.objectives import common, diffusion
from crcm_jax.objectives.sf_dmd import Matching, Scores, critic, sf_dmd, sf_dmd_replayed
from crcm_jax.objectives.tf_dcm import DiscreteTime, tf_dcm
from crcm_jax.objectives.tf_scm import ContinuousTime, tf_scm
from crcm_jax.recipes import RECIPES, Training
from crcm_jax.sampling import ContextRule, Few, Ode, RolloutPlan, Schedule, draw_noise, generate, generate_whole
from crcm_jax.sampling.rollout import rollout
from crcm_jax.train import state as states
from crcm_jax.train.optimizer import Optimizer
from crcm_jax.train.step import Frozen, make_steps

BATCH = bare.batch()
COND = common.condition(BATCH)
NEGATIVE = bare.negative()
LONGER = Condition({**NEGATIVE.prompt, "words": np.tile(NEGATIVE.prompt["words"], 2)})
"""The same to a network that takes its words' mean, of another shape."""
KEY, WEIGHTS = jax.random.key(3), jnp.asarray([0.5, 1.0, 0.25])
TIMES = flow.UniformShift(3.0)
PLAN = RolloutPlan(Schedule((3, 2), ((0.8, 0.5), (0.6,))), ContextRule(noisy=True, start=1))
CLOSE = 1e-5
"""float32 sums of a few dozen terms, in another order; measured 1e-6."""


@dataclasses.dataclass(frozen=True)
class Told(Bare):
    """The same network, with the clip's actions by heart."""

    def condition(self, params, cond, *, many=True):
        assert not cond.frames
        return super().condition(params, cond.replace(frames={"actions": None}), many=many).replace(frames={})

    def velocity(self, params, x, t, prepared, view=ITSELF):
        chunk = view.chunk if isinstance(view, OnCache) and view.chunk is not None else 0
        return super().velocity(params, x, t, self._cut(x, prepared, chunk), view)

    def write(self, params, x, t, prepared, cache, chunk):
        return super().write(params, x, t, self._cut(x, prepared, chunk), cache, chunk)

    def _cut(self, x, prepared, chunk):
        start = 0 if self.chunks is None else self.chunks.start(chunk)
        own = jax.lax.dynamic_slice_in_dim(jnp.asarray(BATCH["frames"]["actions"]), start, x.shape[1], 1)
        return prepared.replace(frames={"actions": jnp.tile(own, (len(x) // len(own), 1, 1))})


def causal(network=Bare, seed=0):
    return Bound(network(PATTERN), bare.parameters(seed))


def bidirectional(network=Bare, seed=0):
    return Bound(network(None), bare.parameters(seed))


@pytest.fixture
def views(monkeypatch):
    """Of every pass: whether the network is causal, what x sees, and of how many frames it is."""
    found, velocity = set(), Bare.velocity

    def recorded(self, params, x, t, prepared, view=ITSELF):
        whole = isinstance(view, OnCache) and view.chunk is None
        found.add((self.chunks is not None, type(view).__name__ + (" whole" if whole else ""), x.shape[1]))
        return velocity(self, params, x, t, prepared, view)

    monkeypatch.setattr(Bare, "velocity", recorded)
    return found


def test_the_network_has_what_the_protocol_names_and_nothing_else():
    """Its methods take what the protocol's do, by the same names; its own pieces are private."""
    named = {name for name in dir(Network) if not name.startswith("_")}
    assert {name for name in dir(Bare(PATTERN)) if not name.startswith("_")} == named
    for name in named:
        ours, theirs = inspect.getattr_static(Bare, name), inspect.getattr_static(Network, name)
        if inspect.isfunction(theirs):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
    assert hash(Bare(PATTERN)) == hash(Bare(PATTERN)) and Bare(PATTERN) == Bare(PATTERN) != Bare(None)


def matched(network):
    return {"scores": Scores(bidirectional(network, 1), bidirectional(network, 2), NEGATIVE), "updates": jnp.int32(1)}


def replayed(at_once):
    def gradient(network, params, batch, cond, key, negative):
        options = matched(network)
        options["scores"] = options["scores"]._replace(uncond=negative)
        student, matching = Bound(network(PATTERN), params), Matching(PLAN, guidance=3.0, at_once=at_once)
        return sf_dmd_replayed(student, batch, cond, key, WEIGHTS, matching=matching, **options)

    return gradient


def differentiated(loss, chunks=PATTERN):
    """The losses and their gradient in a student's parameters."""

    def gradient(network, params, batch, cond, key, negative):
        def total(params):
            losses, metrics = loss(network, Bound(network(chunks), params), batch, cond, key, negative)
            return jnp.sum(WEIGHTS * losses), (losses, metrics)

        grads, aux = jax.grad(total, has_aux=True)(params)
        return aux, grads

    return gradient


def consistent(objective, constants):
    return differentiated(
        lambda network, student, batch, cond, key, negative: objective(
            student, batch, cond, key, teacher=causal(network, 1), uncond=negative, constants=constants
        )
    )


def diffused(objective, chunks=PATTERN):
    return differentiated(
        lambda network, student, batch, cond, key, negative: objective(student, batch, cond, key, times=TIMES), chunks
    )


def direct(network, student, batch, cond, key, negative):
    options = matched(network)
    options["scores"] = options["scores"]._replace(uncond=negative)
    return sf_dmd(student, batch, cond, key, matching=Matching(PLAN, guidance=3.0), **options)


def criticised(network, fake, batch, cond, key, negative):
    options = {"student": causal(network, 1), "updates": jnp.int32(1), "matching": Matching(PLAN)}
    return critic(fake, batch, cond, key, **options)


CONTEXT = common.ContextNoise((0.6,), 1)
FORCED, ROLLED = {(True, "TeacherForcing", FRAMES)}, {(True, "OnCache", 1), (True, "OnCache", 2)}
SCORED = {(False, "Itself", FRAMES)}
OBJECTIVES = {
    "tf": (diffused(functools.partial(diffusion.teacher_forcing, context_noise=CONTEXT)), FORCED),
    "df": (diffused(diffusion.diffusion_forcing), {(True, "Itself", FRAMES)}),
    "bidirectional": (diffused(diffusion.bidirectional, None), SCORED),
    "tf_dcm": (consistent(tf_dcm, DiscreteTime(context_noise=CONTEXT)), FORCED),
    "tf_scm": (consistent(tf_scm, ContinuousTime(context_noise=CONTEXT)), FORCED),
    "tf_scm, two passes": (consistent(tf_scm, ContinuousTime(context_noise=CONTEXT, one_pass=False)), FORCED),
    "sf_dmd": (differentiated(direct), ROLLED | SCORED),
    "sf_dmd, replayed": (replayed(False), ROLLED | SCORED),
    "sf_dmd, replayed at once": (replayed(True), ROLLED | SCORED | {(True, "OnCache whole", FRAMES)}),
    "critic": (differentiated(criticised, None), ROLLED | SCORED),
}
GUIDED = {name for name in OBJECTIVES if "cm" in name or "dmd" in name}


@functools.cache
def compiled(name, network):
    return tiny.jit(functools.partial(OBJECTIVES[name][0], network))


def found_by(name, network=Bare, batch=BATCH, negative=NEGATIVE):
    """(losses, gradient) of an objective."""
    (losses, _), grads = compiled(name, network)(bare.parameters(0), batch, common.condition(batch), KEY, negative)
    return losses, grads


def assert_same(found, expected):
    assert tiny.relative(found[0], expected[0]) < CLOSE
    for name, grad in expected[1].items():
        assert np.abs(grad).max() > 0, name
        assert tiny.relative(found[1][name], grad) < 20 * CLOSE, name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(name, views):
    """In the view that it is about; the clip's actions reach the frames that they belong to, prompts both branches."""
    jax.eval_shape(functools.partial(OBJECTIVES[name][0], Bare), bare.parameters(0), BATCH, COND, KEY, NEGATIVE)
    assert views == OBJECTIVES[name][1]
    found = found_by(name)
    untold = {key: value for key, value in BATCH.items() if key != "frames"}
    assert_same(found, found_by(name, Told, untold))
    shuffled = {"actions": BATCH["frames"]["actions"][:, ::-1]}
    assert tiny.relative(found_by(name, batch=BATCH | {"frames": shuffled})[0], found[0]) > 1e-3
    if name in GUIDED:
        assert_same(found_by(name, negative=LONGER), found)
        other = Condition(bare.prompt(11, 1))
        assert tiny.relative(found_by(name, negative=other)[0], found[0]) > 1e-3


def test_replaying_is_differentiating():
    """Both ways, with actions."""
    expected = found_by("sf_dmd")
    for name in ("sf_dmd, replayed", "sf_dmd, replayed at once"):
        assert_same(found_by(name), expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_rollout_is_its_slow_loop(steps):
    """Whole clips under the mask in place of a cache, and loops in place of scans."""
    model = causal()
    found = tiny.jit(lambda steps: rollout(model, COND, KEY, PLAN, steps, SHAPE).samples)(steps)
    assert tiny.relative(found, bare.slow_rollout(model, COND, KEY, PLAN, steps)) < CLOSE


def guided(model, scale, negative):
    """The velocity of a whole clip, by two passes."""
    jitted = tiny.jit(model.velocity)
    empty = Condition(jax.tree.map(lambda leaf: np.repeat(leaf, SHAPE[0], 0), negative.prompt), COND.frames)

    def velocity(x, t):
        v = jitted(jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32), COND)
        if scale == 1:
            return v
        v_u = jitted(jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32), empty)
        return v_u + scale * (v - v_u)

    return velocity


STREAMS = {
    "clean context": (ContextRule(), 1.0, NEGATIVE, 0),
    "noisy context": (ContextRule(noisy=True, start=1), 1.0, NEGATIVE, 0),
    "guided": (ContextRule(), 2.5, NEGATIVE, 0),
    "guided, another shape": (ContextRule(noisy=True), 2.5, LONGER, 0),
    "a first frame": (ContextRule(noisy=True, start=1), 2.5, NEGATIVE, 1),
    "first frames, noisy": (ContextRule(noisy=True), 2.5, LONGER, 3),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_is_its_slow_loop(case):
    rule, scale, negative, given = STREAMS[case]
    model, solver = causal(), Few(PLAN.schedule, rule)
    first = tiny.normal(5, *SHAPE)[:, :given] if given else None
    noise = draw_noise(KEY, SHAPE, solver.draws, given)
    options = {"shape": SHAPE, "solver": solver, "noise": noise, "first": first}
    found = generate(model, COND, uncond=negative, guidance=scale, **options)

    chunks, before = PATTERN.count(FRAMES), PATTERN.count(given) if given else 0
    times = [solver.times(max(chunk - before, 0))[:-1] for chunk in range(chunks)]
    start = None
    if given:
        t = np.repeat([times[0][-1] if rule.noisy_at(c) else 0.0 for c in PATTERN.index(given)], 1)
        start = first, (1 - bare.wide(t[None])) * first + bare.wide(t[None]) * np.asarray(noise.image), t
    initial = np.concatenate([np.zeros(SHAPE)[:, :given], noise.initial], 1) * times[-1][0]

    def see(chunk, x, t, x0):
        return (x, t) if rule.noisy_at(chunk) else (x0, 0.0)

    velocity = guided(model, scale, negative)
    expected = bare.one_by_one(velocity, initial, np.asarray(noise.steps), times, see, first=start)
    assert tiny.relative(found, expected) < CLOSE
    shuffled = COND.replace(frames={"actions": BATCH["frames"]["actions"][:, ::-1]})
    assert tiny.relative(generate(model, shuffled, uncond=negative, guidance=scale, **options), found) > 1e-2


def test_a_whole_clip_sees_every_action():
    """Euler in a loop of two passes a step."""
    model, times = bidirectional(), (0.9, 0.5, 0.2, 0.0)
    noise = tiny.normal(5, *SHAPE)
    for negative in (NEGATIVE, LONGER):
        options = {"times": times, "solver": "euler", "uncond": negative, "guidance": 2.0}
        x, velocity = noise, guided(model, 2.0, negative)
        for t, t_next in zip(times, times[1:]):
            x = x - (t - t_next) * np.asarray(velocity(x, np.full((1, 1), t)))
        assert tiny.relative(generate_whole(model, COND, noise, **options), x) < CLOSE


def test_an_ode_streams_with_actions():
    """One program a chunk's length; actions of the wrong name are told before anything is computed."""
    case = {"shape": SHAPE, "solver": Ode(steps=2)}
    told = generate(causal(Told), COND.replace(frames={}), KEY, **case)
    assert tiny.relative(generate(causal(), COND, KEY, **case), told) < CLOSE
    with pytest.raises(ValueError, match="no condition of this family"):
        generate(causal(), COND.replace(frames={"cameras": BATCH["frames"]["actions"]}), KEY, **case)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_every_player(name):
    """Through `make_steps`, with an action a frame, integers and given frames; a bad sample costs only itself."""
    recipe, c = RECIPES[name], digits.get_config(name)
    c.update_from_flattened_dict({"rollout.steps": (2,), "rollout.times": ((0.6,),), "data.frames": FRAMES})
    c.chunks.update({"first": PATTERN.first, "size": PATTERN.size})
    networks = {role: Bare(PATTERN if r.causal else None) for role, r in recipe.roles.items()}
    training = Training(recipe, networks, recipe.players(c, networks), recipe.turns(c))
    optimizers = {player: Optimizer(lr=1e-2, warmup=0) for player in training.players}
    seeds = {role: seed for seed, role in enumerate(recipe.roles)}
    frozen = Frozen({role: bare.parameters(seeds[role]) for role in training.reads}, NEGATIVE)
    steps = make_steps(training, optimizers)
    given = np.zeros(SHAPE[:2], bool)
    given[0, 0] = given[2, :2] = True
    batch = BATCH | {"given": given}
    bad = batch | {"latents": np.where(np.arange(SHAPE[0])[:, None, None, None, None] == 1, np.nan, BATCH["latents"])}
    for player, step in steps.items():
        for data, lost in ((batch, 0), (bad, 0 if "dmd" in name and "cm" not in name else 1)):
            players = {p: jax.tree.map(jnp.asarray, bare.parameters(seeds[p])) for p in training.players}
            now, metrics = step(states.create(players, training.players, optimizers), frozen, data)
            assert int(metrics["bad_samples"]) == (lost if player == "student" else 0)
            assert int(metrics["skipped"]) == 0 and np.isfinite(metrics["loss"])
            for other in training.players:
                for key, old in bare.parameters(seeds[other]).items():
                    moved = np.abs(now.players[other].params[key] - old).max()
                    assert np.isfinite(moved) and (moved > 1e-3) == (other == player), (other, key)
