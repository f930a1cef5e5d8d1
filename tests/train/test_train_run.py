"""A run as a whole: resumption bit for bit, however it ended; signals; the log; what stops a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fakes as fakes
from run_files import environment, files_of, wait_for
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from crcm_jax.errors import UserError
from crcm_jax.saving import manifest, storage
from crcm_jax.train import loop
from crcm_jax.train.checkpoint import Checkpoints, load_params
from crcm_jax.train.step import Frozen


def start(workdir, *words, **options) -> subprocess.Popen:
    command = [sys.executable, str(Path(__file__).with_name("train_fakes.py")), str(workdir), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment(), text=True, **pipes, **options)


def said(process) -> str:
    """What a finished process told the user, without its progress bar."""
    lines = process.communicate(timeout=120)[1].replace("\r", "\n").splitlines()
    return "\n".join(line for line in lines if line.startswith(("crcm:", "Traceback")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    fakes.train(workdir, **{"train.steps": 30})
    return workdir


def test_a_run_leaves_what_it_should(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(3, 31, 3))
    for line in lines:
        # three iterations a line, every third the student's
        assert (
            line["student_updates"] == line["iteration"] // 3 and line["critic_updates"] == line["iteration"] * 2 // 3
        )
        for key in ("student/loss", "student/spread", "critic/loss", "critic/grad_norm", "student/lr"):
            assert np.isfinite(line[key])
        assert line["student/rate"] == line["student_updates"] - 1
        assert line["student/bad_samples"] == line["critic/skipped"] == 0
    whole = storage.candidates(finished / storage.FOLDER)
    assert [int(path.name) for path in whole] == [30, 28]
    assert all(manifest.damage(path) is None for path in whole)
    assert {name: value for name, _, value in events(finished) if name == "student/loss"}


def events(workdir):
    """(tag, step, value) of every scalar, checksums verified."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            record = content[12 : 12 + length]
            assert int.from_bytes(content[12 + length : 16 + length], "little") == masked_crc32c(record)
            event = Event.FromString(record)
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            content = content[16 + length :]
    return found


def test_stopping_between_any_two_steps_changes_nothing(finished, tmp_path):
    """Ends in the middle of logging windows (of 3) and save intervals (of 4), in one process."""
    for steps in (1, 5, 6, 17, 30):
        fakes.train(tmp_path / "run", **{"train.steps": steps})
    assert files_of(tmp_path / "run")[1:] == files_of(finished)[1:]
    # TensorBoard: one value a window, whichever process wrote it
    steps = [step for tag, step, _ in events(tmp_path / "run") if tag == "critic/loss"]
    assert steps == list(range(3, 31, 3))


def test_the_comparison_has_power(finished, tmp_path):
    class Jumpy(fakes.Data):
        def set_state(self, state):
            self.position = state["position"] + 1

    for steps in (5, 30):
        fakes.train(tmp_path / "run", Jumpy(), **{"train.steps": steps})
    _, arrays, data, _, log = files_of(tmp_path / "run")
    _, wanted, wanted_data, _, wanted_log = files_of(finished)
    assert arrays.keys() == wanted.keys() and arrays != wanted and data != wanted_data and log != wanted_log


def test_a_finished_run_does_nothing_more(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = files_of(tmp_path / "run")
    now = fakes.train(tmp_path / "run", **{"train.steps": 30})
    assert int(now.iteration) == 30 and files_of(tmp_path / "run") == before


def test_kills_at_any_moment_lose_nothing(finished, tmp_path):
    """SIGKILL in the midst of steps and, with saves made slow, in the midst of writing and of sealing."""
    workdir = tmp_path / "run"
    checkpoints = workdir / storage.FOLDER
    rng = np.random.default_rng(0)

    def half_written(old):
        new = [path for path in storage.candidates(checkpoints) if old.get(path) != path.stat().st_ino]
        return any(not manifest.is_sealed(path) for path in new)

    options = ["train.steps=30", "delay=0.02"]
    for count, moment in enumerate(("stepping", "saving", "saving")):
        old = {path: path.stat().st_ino for path in storage.candidates(checkpoints)}
        process = start(workdir, *options, *(["slow_save=0.4"] if moment == "saving" else []))
        if moment == "saving":
            wait_for(lambda old=old: half_written(old), process)
        else:
            wait_for(lambda: any(manifest.is_sealed(path) for path in storage.candidates(checkpoints)), process)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        assert ("goes on from iteration" in said(process)) == (count > 0)
        assert process.returncode == -signal.SIGKILL
        if moment == "saving":
            assert half_written(old)
    fakes.train(workdir, **{"train.steps": 30})
    assert files_of(workdir)[1:] == files_of(finished)[1:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run_in_peace(finished, tmp_path, capsys, number):
    class Interrupting(fakes.Data):
        def __next__(self):
            if self.position == 7:
                os.kill(os.getpid(), number)
            return super().__next__()

    options, handler = {"train.steps": 30, "train.save_every": 1000}, signal.getsignal(number)
    now = fakes.train(tmp_path / "run", Interrupting(), **options)
    assert int(now.iteration) == 8  # the step under way was finished, no other begun
    assert "\ncrcm: stopping: finishing the step and saving\n" in capsys.readouterr().err
    assert signal.getsignal(number) == handler
    assert storage.newest_whole(tmp_path / "run" / storage.FOLDER).name == "000000008"
    fakes.train(tmp_path / "run", **options)
    assert [files_of(tmp_path / "run")[part] for part in (1, 2, 4)] == [files_of(finished)[part] for part in (1, 2, 4)]


def test_a_signal_during_the_last_save_lets_it_finish(tmp_path, monkeypatch):
    close, reached = Checkpoints.close, []

    def interrupted(checkpoints):
        os.kill(os.getpid(), signal.SIGTERM)
        close(checkpoints)

    monkeypatch.setattr(Checkpoints, "close", interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: reached.append("the process's own handler"))
    try:
        fakes.train(tmp_path / "run", **{"train.steps": 3, "train.save_every": 1000})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not reached and storage.newest_whole(tmp_path / "run" / storage.FOLDER).name == "000000003"


def test_three_iterations_without_a_finite_loss_end_the_run(tmp_path):
    words = r"^the .*'s loss was not finite for any sample in 3 iterations running, up to iteration 13: lower .*\.lr or"
    with pytest.raises(UserError, match=words) as caught:
        fakes.train(tmp_path / "run", fakes.Data(nan_from=10), **{"train.steps": 30})
    assert "\n" not in str(caught.value)
    kept = storage.newest_whole(tmp_path / "run" / storage.FOLDER)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_params(kept)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [3, 6, 9, 12]
    assert lines[-1]["student/bad_samples"] + lines[-1]["critic/bad_samples"] == 8
    assert lines[-1]["critic/loss"] is None  # both of the window's critic iterations were bad


def test_two_bad_iterations_do_not(tmp_path):
    class Brief(fakes.Data):
        def __next__(self):
            batch = super().__next__()
            if self.position in (5, 6):
                batch["latents"][:] = np.nan
            return batch

    now = fakes.train(tmp_path / "run", Brief())
    assert int(now.iteration) == 12 and int(now.skipped_updates) == 2 and int(now.bad_samples) == 8


def tmpfs(tmp_path):
    """Words that run a command where `tmp_path/small` is a file system of 900 kB; None where that is not allowed."""
    (tmp_path / "small").mkdir()
    mount = f"mount -t tmpfs -o size=900k none {tmp_path}/small"
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    works = shutil.which("unshare") and subprocess.run([*words, mount], capture_output=True).returncode == 0
    return (words, mount) if works else None


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint_before(tmp_path):
    found = tmpfs(tmp_path)
    if found is None:
        pytest.skip("no small file system may be mounted here")
    words, mount = found
    small, python = f"{tmp_path}/small", f"{sys.executable} {Path(__file__).with_name('train_fakes.py')}"
    fakes.train(tmp_path / "run", **{"train.steps": 8})
    # Checkpoints 4 and 8 are there, 60 kB are free, a checkpoint needs 190. What is left is copied out.
    script = (
        f"{mount} && cp -r {tmp_path}/run {small} && "
        f"dd if=/dev/zero of={small}/filler bs=1k count=$(($(df --output=avail -k {small} | tail -1) - 60)) && "
        f"{python} {small}/run train.steps=30; code=$?; cp -r {small}/run {tmp_path}/left; exit $code"
    )
    process = subprocess.Popen([*words, script], env=environment(), text=True, stderr=subprocess.PIPE)
    told = [line for line in said(process).splitlines() if "goes on from" not in line]
    assert process.returncode == 1 and len(told) == 1, told
    assert "000000012: the disk is full; the checkpoint before it, " in told[0] and "000000008, is intact" in told[0]
    left = tmp_path / "left"
    assert int(storage.newest_whole(left / storage.FOLDER).name) == 8
    # With space again, the same command goes on.
    assert int(fakes.train(left, **{"train.steps": 30}).iteration) == 30


def test_a_save_that_fails_names_what_is_left(tmp_path, monkeypatch):
    write = storage.write_trees

    def fail(folder, trees):
        if folder.name == "000000008":
            raise OSError(28, "No space left on device", str(folder))
        return write(folder, trees)

    monkeypatch.setattr(storage, "write_trees", fail)
    words = (
        r"cannot write checkpoint .*08: the disk is full; the checkpoint before it, .*04, is intact; free some space"
    )
    with pytest.raises(UserError, match=words) as caught:
        fakes.train(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert [path.name for path in storage.candidates(tmp_path / "run" / storage.FOLDER)] == ["000000004"]
    monkeypatch.undo()
    assert int(fakes.train(tmp_path / "run").iteration) == 12


def test_a_failure_in_the_background_is_raised_too(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "seal", lambda folder: (_ for _ in ()).throw(RuntimeError("disk on fire")))
    with pytest.raises(UserError, match=r"RuntimeError: disk on fire; there is no checkpoint before it; mend that"):
        fakes.train(tmp_path / "run")


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    seal, moments = manifest.seal, []

    def slow(folder):
        time.sleep(0.5)
        seal(folder)

    class Timed(fakes.Data):
        def __next__(self):
            moments.append(time.monotonic())
            return super().__next__()

    monkeypatch.setattr(manifest, "seal", slow)
    fakes.train(tmp_path / "run", Timed(), **{"train.steps": 8, "train.save_every": 5})
    assert moments[7] - moments[4] < 0.4  # iterations 5 to 7 went on while checkpoint 5 was being sealed


def test_sampler_is_called_with_the_ema(tmp_path):
    seen = []

    def sampler(params, iteration, folder):
        assert folder.is_dir()
        seen.append((iteration, np.asarray(params["layer"]["w"]).copy()))

    config = fakes.config(**{"train.sample_every": 5})
    parts = {"training": fakes.training(), "data": fakes.Data(), "init": fakes.initial()}
    now = loop.run(config, tmp_path / "run", **parts, sampler=sampler)
    assert [iteration for iteration, _ in seen] == [5, 10]
    ema = now.players["student"].averages["ema"]
    np.testing.assert_array_equal(seen[1][1], ema["layer"]["w"])  # the student's last update was at iteration 10


@pytest.mark.parametrize("lib", [np, jnp])
def test_an_accidental_transfer_is_an_error(tmp_path, lib):
    """A tree left on the host would be sent to the device again in every step."""

    def loss(nets, batch, key, progress):
        found = fakes.forward(nets["student"].params, batch["latents"])
        return jnp.sum(jnp.square(found - nets["teacher"].params), 1), {}

    options = {"training": fakes.training_of({"student": loss}, reads=("teacher",)), "data": fakes.Data()}
    frozen = Frozen({"teacher": lib.ones(fakes.DIM, np.float32)}, None)
    start = loop.Initial({"student": fakes.init_params()}, frozen)
    if lib is jnp:
        loop.run(fakes.config(), tmp_path / "run", **options, init=start)
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        # One player: nobody else's updates are counted.
        assert [line["student_updates"] for line in lines] == [3, 6, 9, 12] and "critic_updates" not in lines[0]
    else:
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            loop.run(fakes.config(), tmp_path / "run", **options, init=start)


def test_another_config_is_refused_before_anything_is_touched(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"holds another run: ema\.rate is 0\.1 there and 0\.2 here"):
        fakes.train(tmp_path / "run", **{"ema.rate": 0.2})
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
