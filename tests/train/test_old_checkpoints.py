"""Checkpoints of format 1 are read, and runs go on from them as the version that wrote them would have.

`data/format_1.tar.xz` holds what that version left of a tiny run after four iterations (`run`), the real score that it
read (`real.safetensors`), and the weights that the same version came to in three more (`later.safetensors`).
"""

import itertools
import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from crcm_jax.configs.digits import get_config
from crcm_jax.errors import UserError
from crcm_jax.saving import storage
from crcm_jax.saving.weights import load_meta, load_params
from crcm_jax.train import assemble

DATA = Path(__file__).parent / "data" / "format_1.tar.xz"
TREES = ("ema", "params", "critic")

SETTINGS = {
    **{"model.dim": 12, "model.ffn_dim": 8, "model.heads": 2, "model.layers": 1, "model.freq_dim": 4},
    **{"data.batch_size": 2, "data.frames": 3, "train.save_every": 0, "train.sample_every": 0, "train.log_every": 1},
    **{"train.steps": 7, "init.real": "real.safetensors"},
}


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The workdir, in the folder that its configuration's paths start from."""
    with tarfile.open(DATA) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def config(**changes):
    c = get_config("sf_dmd")
    c.update_from_flattened_dict(SETTINGS | changes)
    return c


def weights(workdir):
    """Every weight that others may ask for, by name."""
    return {
        f"{which}/{name}": np.asarray(leaf)
        for which in TREES
        for name, leaf in storage.leaves(load_params(workdir, which))
    }


def test_its_weights_are_found_by_the_names_that_others_use(old):
    folder = old / storage.FOLDER / "000000004"
    assert load_meta(old)["format"] == 1 and load_meta(old)["iteration"] == 4
    for which in TREES:
        stored = storage.read_trees(folder, storage.abstract({which: storage.stored_shapes(folder)[which]}))[which]
        found = load_params(old, which, expect=stored, training=("sf_dmd",))
        jax.tree.map(np.testing.assert_array_equal, found, stored)
    flat = weights(old)
    heads = [flat[f"{which}/outside/head/kernel"] for which in TREES]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(heads, 2))  # three trees, not one
    with pytest.raises(UserError, match="holds no 'teacher' weights, only counters, critic, critic_opt, ema, opt, par"):
        load_params(old, "teacher")


def test_a_run_goes_on_as_the_version_before_would_have(old):
    before, lines = weights(old), (old / "metrics.jsonl").read_text().splitlines()
    assemble.train(config(), old)
    assert load_meta(old)["format"] == 2 and load_meta(old)["iteration"] == 7
    found, later = weights(old), dict(storage.leaves(load_params("later.safetensors")))
    assert found.keys() == later.keys() == before.keys()
    clear = 0
    for name, expected in later.items():
        moved = np.abs(expected - before[name]).max()
        # Other compilers round otherwise: single numbers and, a little, how far they move.
        tolerance = 2e-7 * np.abs(expected).max() + 1e-3 * moved
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=tolerance, err_msg=name)
        clear += moved > 20 * tolerance
    assert clear > 0.7 * len(later)  # power: most of them move by far more than that

    log = (old / "metrics.jsonl").read_text().splitlines()
    assert log[:4] == lines and [json.loads(line)["iteration"] for line in log] == list(range(1, 8))
    sixth, last = map(json.loads, log[5:])
    assert (last["student_updates"], last["critic_updates"], last["student/steps"]) == (3, 4, 3)
    assert sixth["critic/loss"] == pytest.approx(1.5469, rel=1e-4)
    assert last["student/loss"] == pytest.approx(4.53358e-05, rel=1e-3)
