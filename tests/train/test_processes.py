"""Several real processes on one machine do as one does; what becomes of them when one is told to stop, or killed."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import random_kills
import together
import train_fakes as fakes
from run_files import arrays_of, environment, files_of, wait_for

from crcm_jax.cli.train import parse_processes
from crcm_jax.configs.digits import get_config
from crcm_jax.errors import UsageError, UserError
from crcm_jax.parallel import processes, witness
from crcm_jax.saving import manifest, storage
from crcm_jax.saving.weights import load_params
from crcm_jax.train import assemble, checkpoint, identity

HERE = Path(__file__).parent
FAKES = [sys.executable, str(HERE / "train_fakes.py")]
ROUNDING = 1e-5
"""Of each array's largest entry, after a few steps of Adam: 3e-6 was the most seen."""


def test_signals_and_deaths_lose_nothing(tmp_path):
    """A run of two processes: stopped by a signal to one, then killed in either, then let finish."""
    workdir, checkpoints = tmp_path / "run", tmp_path / "run" / storage.FOLDER
    options = ["train.steps=30", *(f"{key}={value}" for key, value in together.MESH.items())]

    def begin(folder, *more):
        return together.start(FAKES, folder, *options, *more, cache=tmp_path / "cache")

    def saved_anew(started):
        old = [path for path in storage.candidates(checkpoints) if manifest.is_sealed(path)]
        wait_for(
            lambda: any(path not in old and manifest.is_sealed(path) for path in storage.candidates(checkpoints)),
            started[0],
            120,
        )

    whole = begin(tmp_path / "whole")
    assert together.end(whole) == ["", ""] and [process.returncode for process in whole] == [0, 0]

    started = begin(workdir, "delay=0.1")
    saved_anew(started)
    started[1].send_signal(signal.SIGTERM)
    told = together.end(started)
    assert [process.returncode for process in started] == [0, 0]
    assert told == ["crcm: another process was told to stop: saving", "crcm: stopping: finishing the step and saving"]
    assert storage.newest_whole(checkpoints) == storage.candidates(checkpoints)[0]

    for victim, reason in ((1, "another process has ended"), (0, "process 0, the coordinator, has ended")):
        before = random_kills.half_written(workdir)
        started = begin(workdir, "delay=0.1", "slow_save=1")
        if victim == 1:  # in the midst of a save
            wait_for(lambda before=before: random_kills.half_written(workdir) - before, started[0], 120)
        else:
            saved_anew(started)
        started[victim].kill()
        began = time.monotonic()
        told = together.end(started)
        assert time.monotonic() - began < processes.SILENCE
        assert started[1 - victim].returncode not in (0, None)
        assert f"[process {1 - victim}]: " in told[1 - victim]
        # Either the collective that fails or the runtime is the first to notice.
        assert reason in told[1 - victim] or "another process has ended" in told[1 - victim]
        assert "the same command on every process goes on" in told[1 - victim].splitlines()[-1]
        assert f"crcm [process {victim}]: this process was killed" in told[victim]

    last = begin(workdir)
    assert "goes on from iteration" in together.end(last)[0] and [process.returncode for process in last] == [0, 0]
    assert files_of(workdir)[1:] == files_of(tmp_path / "whole")[1:]
    # What one process makes of it, to rounding.
    fakes.train(tmp_path / "one", **{"train.steps": 30})
    assert together.difference(arrays_of(workdir), arrays_of(tmp_path / "one")) < ROUNDING
    assert json.loads(files_of(workdir)[2]) == {"json": {"position": 30}}


def test_kills_at_random_lose_nothing(tmp_path):
    """`python tests/train/random_kills.py` kills a real run, twenty times."""
    sentence, same = random_kills.trial(tmp_path, kills=2, seed=1, command=random_kills.fake)
    assert same, sentence


def test_a_real_run_goes_on_elsewhere_as_if_nothing_had_changed(tmp_path):
    """An iteration in two processes of two devices, then two in one of one; and all three in the latter."""
    settings = together.starting_weights("tf", tmp_path)
    started = together.train("tf", tmp_path / "many", settings | together.MESH | {"train.steps": 1})
    assert together.end(started) == ["", ""]

    c = get_config("tf")
    c.update_from_flattened_dict(settings | {"train.steps": 3})
    assemble.train(c, tmp_path / "many")
    assemble.train(c, tmp_path / "one")
    many, one = arrays_of(tmp_path / "many"), arrays_of(tmp_path / "one")
    assert together.difference(many, one) < ROUNDING
    assert files_of(tmp_path / "many")[2] == files_of(tmp_path / "one")[2]
    # It is no agreement of runs that learnt nothing.
    before = {
        f"student.params/{name}": np.asarray(leaf) for name, leaf in storage.leaves(load_params(tmp_path / "student"))
    }
    assert together.difference({name: one[name] for name in before}, before) > 100 * ROUNDING


def test_a_state_goes_from_any_mesh_to_any_other(tmp_path):
    command = [sys.executable, str(HERE / "remesh_worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment(devices=8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 3 and all(found["equal"] and found["placed"] for found in report.values())
    assert report["one device"]["share"] == 1 and report["fsdp 2 × tensor 4"]["share"] < 0.3


def test_a_coordinator_that_is_not_there_is_one_sentence(tmp_path):
    (alone,) = together.start(FAKES, tmp_path / "run", cache=tmp_path / "cache", which=[1], wait=2)
    (told,) = together.end([alone])
    assert re.fullmatch(
        r"crcm \[process 1\]: not all processes met at 127.0.0.1:\d+ within 2 s \(connection refused\): check "
        "--coordinator, that its host and port can be reached, and that every --process from 0 to --processes − 1 was "
        "started",
        told,
    )
    assert alone.returncode == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        ("", "was killed or crashed"),
        ("ALREADY_EXISTS: Aborted connect attempt as there is a request from a newer incarnation", "same number"),
        ("INVALID_ARGUMENT: Unexpected task registered with task=2", "give the same --processes everywhere"),
        ("UNAVAILABLE: tasks are unhealthy (stopped sending heartbeats):\n1\n3\nThe tasks", "process 1, 3 has ended"),
        ("UNAVAILABLE: Failed to send RPC to coordination service. Either", "process 0, the coordinator, has ended"),
        ("something new", "another process has ended"),
    ],
)
def test_what_the_runtime_says_is_put_into_words(words, says):
    assert says in witness.meaning(words) and "\n" not in witness.meaning(words)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--distributed", "--process=1"], "takes everything from the environment"),
        (["--processes=2", "--process=1"], "need all of --coordinator"),
        (["--coordinator=host", "--processes=2", "--process=1"], "must be HOST:PORT"),
        (["--coordinator=host:1", "--processes=2", "--process=2"], "number them from 0 to N − 1"),
        (["--coordinator=host:1", "--processes=two", "--process=0"], "'two' is not a whole number of at least 1"),
    ],
)
def test_what_is_wrong_with_the_options(words, says):
    with pytest.raises(UsageError, match=says) as caught:
        parse_processes(words)
    assert "\n" not in str(caught.value)


def test_options_of_one_and_of_many():
    words = ["--config=c.py", "--workdir=w", "--config.train.steps=3"]
    assert parse_processes(words) == (None, words)
    options, rest = parse_processes([*words, "--coordinator=h:1", "--processes=2", "--process=1"])
    assert options == {"coordinator": "h:1", "count": 2, "index": 1, "wait": 300} and rest == words
    assert set(parse_processes(["--distributed"])[0].values()) == {None, 300}


def test_processes_must_be_configured_alike(monkeypatch):
    other = identity.as_json(fakes.config(**{"train.steps": 13}))
    monkeypatch.setattr(processes, "gather", lambda text: [text, json.dumps(other)])
    with pytest.raises(UserError, match=r"process 1 was started with another configuration: train\.steps is 13 there"):
        identity.require_same(fakes.config())


def test_the_first_process_decides_and_refuses_for_all(monkeypatch):
    said = []

    def gather(text):
        said.append(text)
        return [said[0], text]

    def refuse():
        raise UserError("the disk is full")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "gather", gather)
    for decide in (lambda: "folder", refuse):
        said.clear()
        results = []
        for index in (0, 1):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            try:
                results.append(processes.decided_by_first(decide if index == 0 else lambda: 1 / 0))
            except UserError as error:
                results.append(f"{type(error).__name__}: {error}")
        assert results in (["folder", "folder"], ["UserError: the disk is full", "ToldByFirst: the disk is full"])
        assert len(said) == 2


@pytest.mark.parametrize(
    "error, says",
    [
        (processes.ToldByFirst("the disk is full"), ""),
        (UsageError("no such key"), "\ncrcm [process 1]: no such key\n"),
        (RuntimeError("FAILED: Gloo all-reduce: Connection closed by peer"), "\ncrcm [process 1]: another process has"),
        (RuntimeError("shapes differ"), "\ncrcm [process 1]:\nRuntimeError: shapes differ\n"),
    ],
)
def test_why_a_process_ends(error, says):
    told, code = processes.explain(error, 1)
    assert code == (2 if isinstance(error, UsageError) else 1)
    assert told.startswith(says) and bool(told) == bool(says)


def test_data_positions_that_differ_belong_to_their_processes(monkeypatch):
    same, other = checkpoint._encode({"at": 1}), checkpoint._encode(b"\x01")
    assert checkpoint._together([same, same]) == same
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert checkpoint._decode(same) == {"at": 1}
    assert checkpoint._decode(checkpoint._together([same, other])) == b"\x01"
    with pytest.raises(UserError, match="each of 3 processes, and they differ: go on with as many processes, not 2"):
        checkpoint._decode(checkpoint._together([same, other, same]))
