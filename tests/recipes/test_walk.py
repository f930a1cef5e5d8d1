"""Every recipe of the registry, from its configuration to a clip: built, trained, saved, resumed, sampled.

A recipe that joins `RECIPES`, a policy or a storage that joins its table is walked too, without a line here.
"""

import contextlib
import dataclasses
import io
import shutil

import jax
import numpy as np
import pytest
import tiny

from crcm_jax import parts, pipeline, recipes
from crcm_jax.cache import POLICIES, STORAGES
from crcm_jax.configs import digits
from crcm_jax.data import pipeline as pipeline_data
from crcm_jax.errors import UserError
from crcm_jax.evaluate import producer
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.recipes import RECIPES
from crcm_jax.sampling import Session, Whole, generate
from crcm_jax.saving import storage
from crcm_jax.saving.weights import load_params, save_params
from crcm_jax.train import assemble

SIZES = {
    **{"model.dim": 12, "model.ffn_dim": 8, "model.heads": 2, "model.layers": 1, "model.freq_dim": 4},
    **{"data.batch_size": 2, "data.frames": 3, "data.straight": 0, "data.prefetch": 1, "dmd.student_update_freq": 2},
    **{"rollout.steps": (2,), "rollout.times": ((5 / 6,),), "sample.ode_steps": 2, "sample.prompts": 0},
    **{"train.log_every": 1, "train.sample_every": 0},
    # An update is its gradient's alone, and full-sized from the first on.
    **{f"{section}.{key}": 0 for section in ("optim", "critic_optim") for key in ("weight_decay", "warmup")},
}


def config(training, **changes):
    """configs/digits.py at its smallest; of a recipe that is not its own, the variant of the joint recipe."""
    c = digits.get_config(training if training in digits.TRAINING else "tf_scm_sf_dmd")
    c.training = training
    c.update_from_flattened_dict(SIZES | changes)
    return c


def start(role):
    """The recipe that a role's weights come from here: one that is not the role's own where there is another."""
    return role.starts_from[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """`weights(recipe)`: a file that says to be of that recipe, every parameter random; all are of one shape."""
    folder = tmp_path_factory.mktemp("weights")
    params = tiny.parameters(recipes.student(config("tf")))

    def of(name):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            rng = np.random.default_rng(list(RECIPES).index(name))
            own = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), params)
            save_params(path, own, {"training": name})
        return path

    return of


def paths(recipe, weights):
    """A path for every role that does not take another's weights."""
    roles = {name: role for name, role in recipe.roles.items() if role.like is None}
    return {f"init.{name}": str(weights(start(role))) for name, role in roles.items()}


def train(c, workdir):
    with contextlib.redirect_stderr(io.StringIO()):
        return jax.tree.map(np.asarray, assemble.train(c, workdir))


def assert_one_sentence(caught):
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_from_its_config_to_a_clip(name, weights, tmp_path):
    """Roles as declared, a turn for every player, a run that goes on bit for bit, and a clip by its own sampler."""
    recipe, c = RECIPES[name], config(name)
    training = recipes.make(c)
    assert set(training.networks) == set(recipe.roles) == {*training.players, *training.reads}
    for role, network in training.networks.items():
        assert network.chunks == (parts.chunk_pattern(c) if recipe.roles[role].causal else None), role

    # As many iterations as give every player a turn, and one more.
    turns = training.turns
    most = next(n for n in range(1, 20) if {turns.player(i) for i in range(n)} == set(training.players))
    c.update_from_flattened_dict(paths(recipe, weights) | {"train.save_every": most, "train.steps": most + 1})
    whole = train(c, tmp_path / "whole")
    assert int(whole.iteration) == most + 1 and int(whole.bad_samples) == int(whole.skipped_updates) == 0
    for player, own in whole.players.items():
        assert int(own.updates) == turns.counts(most + 1)[player] > 0, player
        before = load_params(weights(start(recipe.roles[recipe.roles[player].like or player])))
        for (path, leaf), old in zip(storage.leaves(own.params), jax.tree.leaves(before), strict=True):
            assert np.isfinite(leaf).all() and np.abs(leaf - old).max() > 1e-5, f"{player}: {path} never moved"

    # What the run left after `most` iterations: a run that was stopped there.
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / storage.FOLDER / f"{most + 1:09d}")
    resumed = train(c, tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes().count(b"\n") == most + 1

    sampler, _ = recipes.own_sampler(c)
    assert recipe.mismatch(sampler) is None and (type(sampler) is Whole) != recipe.causal
    model = pipeline.load(tmp_path / "stopped")
    assert model.recipe is recipe and model.sampler == recipes.own_sampler(c)
    jax.tree.map(np.testing.assert_array_equal, model.bound.params, whole.players["student"].averages["ema"])
    clips = producer.producer(model)(["a three moves up and left", "a five"], [0, 1])
    assert clips.shape == (2, 3, 16, 16, 1) and np.isfinite(clips).all()
    assert np.abs(clips[0] - clips[1]).max() > 0.1


STREAMS = next(name for name, recipe in RECIPES.items() if recipe.causal and recipe.distills)


@pytest.mark.parametrize("storage_name", STORAGES)
@pytest.mark.parametrize("policy_name", POLICIES)
def test_a_stream_on_every_cache(policy_name, storage_name):
    """As long as its policy lets it be, and beyond the clip where that forgets; nothing is seen before chunk 0."""
    c = config(STREAMS)
    network, (solver, _) = recipes.student(c), recipes.own_sampler(c)
    model, shape = Bound(network, tiny.parameters(network)), (2, *parts.latent_shape(c))
    cond, key = Condition({"text": tiny.normal(1, 2, c.text.length, c.text.dim)}), jax.random.key(0)
    session = Session(
        network, solver, 2, shape[2:], shape[1], policy=POLICIES[policy_name], storage=STORAGES[storage_name]
    )
    chunks = session.limit or 2 * network.chunks.count(shape[1])
    state, found = session.start(model.params, cond, key), []
    for _ in range(chunks):
        x, state = session.step(model.params, state)
        found.append(np.asarray(x))
    assert all(x.shape == (2, network.chunks.size, *shape[2:]) and np.isfinite(x).all() for x in found)
    if session.limit:
        with pytest.raises(ValueError, match=f"its cache holds {chunks} chunks"):
            session.step(model.params, state)
    usual = np.asarray(generate(model, cond, key, shape=shape, solver=solver))
    np.testing.assert_array_equal(found[0], usual[:, : network.chunks.size])
    # Coarse storages stay in sight of the usual one, and what a chunk sees matters.
    assert tiny.relative(found[1], usual[:, network.chunks.span(1)]) < 0.2
    alone, _ = session.step(model.params, session.start(model.params, cond, key).replace(count=1))
    assert tiny.relative(alone, found[1]) > 1e-3


@pytest.mark.parametrize("name", RECIPES)
def test_weights_of_another_recipe_are_refused(name, weights):
    """In every role that does not start from it, by name."""
    recipe, training = RECIPES[name], recipes.make(config(name))
    uncond, usual = Condition({"text": np.zeros((1, 12, 32), np.float32)}), paths(recipe, weights)
    for role_name, role in recipe.roles.items():
        other = next(other for other in RECIPES if other not in role.starts_from)
        c = config(name, **usual | {f"init.{role_name}": str(weights(other))})
        with pytest.raises(UserError, match=f"another stage.*'{other}', needed here is") as caught:
            assemble.initial(c, training, uncond)
        assert_one_sentence(caught)


def test_a_workdir_of_another_recipe_is_refused(weights, tmp_path):
    names = [name for name, recipe in RECIPES.items() if not recipe.distills][:2]
    train(config(names[0], **{"train.steps": 0}), tmp_path / "run")
    with pytest.raises(UserError, match="training") as caught:
        train(config(names[1], **{"train.steps": 0}), tmp_path / "run")
    assert_one_sentence(caught)


def test_an_unknown_recipe_is_told_by_name(tmp_path):
    """By training, before the workdir is made, and by who loads what such a run has left."""
    unknown = config("tf_xcm")
    with pytest.raises(UserError, match=f"training type 'tf_xcm' is not one of {', '.join(RECIPES)}") as caught:
        assemble.train(unknown, tmp_path / "run")
    assert_one_sentence(caught)
    assert not (tmp_path / "run").exists()
    meta = {"training": "tf_xcm", "config": unknown.to_dict()}
    save_params(tmp_path / "left.safetensors", tiny.parameters(recipes.student(config("tf"))), meta)
    with pytest.raises(UserError, match="'tf_xcm' is not one of") as caught:
        pipeline.load(tmp_path / "left.safetensors")
    assert_one_sentence(caught)


@pytest.mark.parametrize("name", RECIPES)
def test_data_without_what_a_recipe_needs_are_refused(name, weights, monkeypatch, tmp_path):
    """Before anything is read; a source that has it is named, if there is one."""
    needy = dataclasses.replace(RECIPES[name], needs=frozenset({"latents", "actions"}))
    monkeypatch.setitem(RECIPES, name, needy)
    told = rf"'{name}' needs actions in its data, and data\.name=digits has none: "
    with pytest.raises(UserError, match=told + "no source of this version has them") as caught:
        assemble.train(config(name), tmp_path / "run")
    assert_one_sentence(caught)
    monkeypatch.setitem(pipeline_data.HOLDS, "latents", frozenset({"latents", "actions"}))
    with pytest.raises(UserError, match=told + "use latents") as caught:
        assemble.train(config(name), tmp_path / "run")
    assert_one_sentence(caught)
    assert not (tmp_path / "run").exists()
