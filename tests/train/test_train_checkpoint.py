"""Checkpoints that can be trusted, weights for the next stage, and one sentence for each thing that can be wrong."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fakes as fakes

from crcm_jax.errors import UserError
from crcm_jax.saving import manifest, storage
from crcm_jax.saving.weights import load_meta
from crcm_jax.train import identity, state
from crcm_jax.train.checkpoint import Checkpoints, load_params, save_params
from crcm_jax.train.optimizer import Optimizer

OPTIMIZER = Optimizer(lr=1e-2)


def make_state(dtype=jnp.float32, iteration=0, critic=True):
    params = {"student": fakes.init_params(0, dtype)} | ({"critic": fakes.init_params(1, dtype)} if critic else {})
    now = create(params)
    # Counters that differ, so that none can come back as another.
    players = {name: own.replace(updates=jnp.int32(40 + n)) for n, (name, own) in enumerate(now.players.items())}
    totals = {"bad_samples": jnp.int32(51), "skipped_updates": jnp.int32(52), "bad_streak": jnp.int32(53)}
    return now.replace(iteration=jnp.int32(iteration), players=players, **totals)


def create(params):
    players = {name: fakes.training().players[name] for name in params}
    return state.create(params, players, dict.fromkeys(params, OPTIMIZER))


def save(workdir, *iterations, keep=5, **kinds):
    checkpoints = Checkpoints(workdir, fakes.config(), keep)
    for iteration in iterations:
        checkpoints.save(make_state(iteration=iteration, **kinds), {"position": iteration}, {"loss": [0.1, 3.0]})
    checkpoints.close()
    return checkpoints


def restore(workdir, like=None, config=None):
    return Checkpoints(workdir, config or fakes.config()).restore(like or make_state())


def folder(workdir, iteration):
    return workdir / storage.FOLDER / f"{iteration:09d}"


def largest_file(path):
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with whole checkpoints at 4 and 8; copy it before harming it."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 4, 8)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("critic", [True, False])
def test_everything_comes_back(tmp_path, dtype, critic):
    now = make_state(dtype, 7, critic)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(now.players["student"].averages))
    checkpoints = Checkpoints(tmp_path, fakes.config())
    checkpoints.save(now, b"\x00position\xff", {"a": [1 / 3, 2.0]})
    checkpoints.close()
    like = jax.eval_shape(lambda: make_state(dtype, 0, critic))
    back, data, log = restore(tmp_path, like)
    assert_equal(back, now)
    assert data == b"\x00position\xff" and log == {"a": [1 / 3, 2.0]}


def test_saving_is_not_disturbed_by_donation(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    big = {"w": jnp.arange(3_000_000, dtype=jnp.float32)}
    now = create({"student": big})
    checkpoints = Checkpoints(tmp_path, fakes.config())
    checkpoints.save(now, None, {})
    for _ in range(3):
        now = step(now)
    checkpoints.close()
    np.testing.assert_array_equal(load_params(tmp_path, "params")["w"], np.arange(3_000_000, dtype=np.float32))


def test_only_the_last_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert [path.name for path in storage.candidates(tmp_path / storage.FOLDER)] == ["000000004", "000000003"]


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda f: truncate(largest_file(f / "state")), "bytes in state/"),
        (lambda f: flip(largest_file(f / "state" / "student.ema")), "has altered bytes in state/student.ema"),
        (lambda f: flip(f / "meta.json"), "has altered bytes in meta.json"),
        (lambda f: (f / "data.json").unlink(), "lacks data.json"),
        (lambda f: shutil.rmtree(f / "state" / "student.opt"), "lacks state/student.opt"),
        (lambda f: truncate(f / manifest.NAME), "unreadable manifest.json"),
    ],
)
def test_damage_is_told_and_the_one_before_is_used(workdir, capsys, harm, words):
    harm(folder(workdir, 8))
    back, data, _ = restore(workdir)
    assert int(back.iteration) == 4 and data == {"position": 4}
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "000000008" in told and words in told and "going back" in told


def test_a_half_written_one_is_passed_over_and_later_cleared(workdir):
    (folder(workdir, 8) / manifest.NAME).unlink()
    (folder(workdir, 9)).mkdir()
    checkpoints = Checkpoints(workdir, fakes.config(), keep=2)
    assert int(checkpoints.restore(make_state())[0].iteration) == 4
    checkpoints.save(make_state(iteration=6), {}, {})
    checkpoints.close()
    assert [path.name for path in storage.candidates(workdir / storage.FOLDER)] == ["000000006", "000000004"]


def test_a_damaged_later_one_never_displaces_a_whole_one(workdir):
    truncate(largest_file(folder(workdir, 8)))
    checkpoints = Checkpoints(workdir, fakes.config(), keep=1)
    checkpoints.restore(make_state())
    checkpoints.save(make_state(iteration=6), {}, {})
    checkpoints.close()
    assert [path.name for path in storage.candidates(workdir / storage.FOLDER)] == ["000000006"]


def test_what_was_restored_is_not_written_again(workdir):
    """A whole checkpoint is never given up for a second writing of it."""
    checkpoints = Checkpoints(workdir, fakes.config())
    now, data, _ = checkpoints.restore(make_state())
    assert data == {"position": 8}
    checkpoints.save(now, {"position": 99}, {})
    checkpoints.close()
    assert restore(workdir)[1] == data


def test_nothing_but_damage_is_an_error(workdir):
    for iteration in (4, 8):
        truncate(largest_file(folder(workdir, iteration)))
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is undamaged"):
        restore(workdir)


def test_no_finished_save_means_a_fresh_start(tmp_path):
    assert restore(tmp_path) is None
    folder(tmp_path, 3).mkdir(parents=True)
    assert restore(tmp_path) is None


def test_restore_refuses_another_type_or_architecture(workdir):
    with pytest.raises(UserError, match="training type 'sf_dmd', this run is 'tf'"):
        restore(workdir, config=fakes.config(training="tf"))
    wide = create({"student": fakes.init_params(width=5), "critic": fakes.init_params()})
    with pytest.raises(
        UserError, match=r"architecture: student\.params: layer/b has shape \[4\] there and \[5\] in this model"
    ):
        restore(workdir, wide)
    half = make_state(jnp.bfloat16)
    with pytest.raises(UserError, match=r"student\.opt: it lacks master/layer/b"):
        restore(workdir, half)


# ---------------------------------------------------------------- weights for others


@pytest.mark.parametrize("which", ["ema", "params", "critic"])
def test_weights_from_workdir_and_folder(saved, which):
    student, critic = (make_state().players[name] for name in ("student", "critic"))
    want = {"ema": student.averages["ema"], "params": student.params, "critic": critic.params}[which]
    assert_equal(load_params(saved, which), want)
    assert_equal(load_params(folder(saved, 4), which, expect=want), want)
    half = load_params(saved, which, expect=want, dtype=jnp.bfloat16)
    assert_equal(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), want))


def test_a_workdir_gives_its_newest_whole_checkpoint(workdir, capsys):
    truncate(largest_file(folder(workdir, 8)))
    assert load_meta(workdir)["iteration"] == 4
    assert "going back" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["teacher", "teacher.safetensors"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16])
def test_weights_alone_go_the_same_way(tmp_path, name, dtype):
    path, params = tmp_path / name, fakes.init_params(2)
    meta = {"training": "bidirectional", "model": {"dim": 4}, "seed": 5}
    save_params(path, params, meta, dtype)
    stored = jax.tree.map(lambda x: x.astype(dtype or x.dtype), params)
    assert_equal(load_params(path), stored)
    assert_equal(load_params(path, "ema", expect=params), jax.tree.map(lambda x: x.astype(jnp.float32), stored))
    assert meta.items() <= load_meta(path).items()
    with pytest.raises(UserError, match="exists already"):
        save_params(path, params, meta)
    with pytest.raises(UserError, match="of another architecture: layer/b has shape"):
        load_params(path, expect=fakes.init_params(width=5))
    with pytest.raises(UserError, match="of another stage: it was trained as 'bidirectional', needed here is tf or df"):
        load_params(path, training=("tf", "df"))
    harmed = path if path.is_file() else largest_file(path / "state")
    with harmed.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(UserError, match=r"has altered bytes.*: restore it from a copy"):
        load_params(path)
    truncate(harmed)
    with pytest.raises(UserError, match="restore it from a copy"):
        load_params(path)


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("run"), 4)
    assert int(restore(Path("run"))[0].iteration) == 4
    save_params("teacher", fakes.init_params(), {})
    for path in ("run", "run/checkpoints/000000004", "teacher"):
        assert_equal(load_params(path, "params"), fakes.init_params())


def test_weights_alone_are_small(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}
    save_params(tmp_path / "teacher", params, {}, jnp.bfloat16)
    total = sum(path.stat().st_size for path in (tmp_path / "teacher").rglob("*") if path.is_file())
    assert total < 2.1e6


@pytest.mark.parametrize(
    "prepare, words",
    [
        (lambda path: None, "there is no checkpoint at"),
        (lambda path: path.mkdir(), "there is no whole checkpoint in .*: none is there"),
        (lambda path: (path / "checkpoints" / "000000005").mkdir(parents=True), "only 000000005, half-written"),
        (lambda path: (path / "state").mkdir(parents=True), "is half-written"),
        (lambda path: path.write_text("?"), "there is no checkpoint at"),
    ],
)
def test_nothing_to_load(tmp_path, prepare, words):
    prepare(tmp_path / "x")
    with pytest.raises(UserError, match=words) as caught:
        load_params(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_architecture_is_compared_leaf_by_leaf(saved):
    stored = fakes.init_params()
    with pytest.raises(UserError, match="it lacks layer/scale, which this model has with shape"):
        load_params(saved, expect={"layer": stored["layer"] | {"scale": jnp.ones(3)}})
    with pytest.raises(UserError, match=r"layer/b of shape \[4\] has no place in this model"):
        load_params(saved, expect={"layer": {"w": stored["layer"]["w"]}})
    trees = r"counters, critic\.opt, critic\.params, student\.ema, student\.opt, student\.params"
    with pytest.raises(UserError, match=f"holds no 'teacher' weights, only {trees}"):
        load_params(saved, "teacher")


# ---------------------------------------------------------------- whose workdir it is


def claim(workdir, config):
    return identity.claim(workdir, config, ours=("metrics.jsonl",))


def test_a_workdir_belongs_to_one_configuration(tmp_path):
    workdir = tmp_path / "new" / "run"
    claim(workdir, fakes.config(**{"optim.lr": 9.0})).close()
    claim(workdir, fakes.config()).close()  # nothing was done yet: the first attempt's configuration binds nobody
    (workdir / "metrics.jsonl").write_text("{}")
    claim(workdir, fakes.config(**{"train.steps": 99, "train.keep": 7, "sample.prompts": 3})).close()
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 99
    kept = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match=r"holds another run: optim\.lr is 0\.01 there and 0\.02 here"):
        claim(workdir, fakes.config(**{"optim.lr": 0.02}))
    with pytest.raises(UserError, match="training is 'sf_dmd' there and 'tf' here"):
        claim(workdir, fakes.config(training="tf", seed=9))
    longer = fakes.config()
    longer.model.heads = 2
    with pytest.raises(UserError, match=r"model\.heads is 2 here and unknown there"):
        claim(workdir, longer)
    assert (workdir / "config.json").read_text() == kept


def test_a_workdir_is_used_by_one_process_at_a_time(tmp_path):
    lock = claim(tmp_path, fakes.config())
    with pytest.raises(UserError, match="another process is training in"):
        claim(tmp_path, fakes.config())
    lock.close()
    claim(tmp_path, fakes.config()).close()


def test_a_workdir_of_unknown_origin_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(UserError, match=r"holds metrics\.jsonl but no config\.json"):
        claim(tmp_path, fakes.config())
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config\.json is not readable"):
        claim(tmp_path, fakes.config())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        claim(tmp_path / "file", fakes.config())
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"
