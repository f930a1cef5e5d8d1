"""Kills a run with SIGKILL at random moments, again and again, and compares what it leaves with an unbroken run.

    python tests/train/random_kills.py --kills 20

A fifth of the kills meet a run that is starting or reading its checkpoint, the others one that steps or saves. Nothing
may be lost: every array, the data's position and every line of the log are the same, bit for bit. Exit code 1 if not.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from run_files import ROOT, environment, files_of, wait_for

from crcm_jax.saving import manifest, storage

SIZES = {
    **{"model.dim": 16, "model.ffn_dim": 16, "model.heads": 2, "model.layers": 1, "model.freq_dim": 8},
    **{"data.batch_size": 4, "data.frames": 2, "data.straight": 0},
    **{"train.log_every": 1, "train.save_every": 5, "train.sample_every": 0},
}
ITERATIONS_A_KILL = 12


def real(workdir: Path, cache: Path, steps: int) -> list[str]:
    """The command of the tiny configuration."""
    settings = SIZES | {"train.steps": steps}
    command = [sys.executable, "-m", "crcm_jax", "train", f"--config={cache}/digits.py:tf", f"--workdir={workdir}"]
    return command + [f"--config.{key}={value}" for key, value in settings.items()]


def fake(workdir: Path, cache: Path, steps: int) -> list[str]:
    """The command of the world of `train_fakes`, which starts sooner."""
    settings = {"train.log_every": 1, "train.save_every": 5, "train.steps": steps, "delay": 0.1}
    command = [sys.executable, str(Path(__file__).with_name("train_fakes.py")), str(workdir)]
    return command + [f"{key}={value}" for key, value in settings.items()]


def start(command: list[str], cache: Path) -> subprocess.Popen:
    """Runs it; what it compiles is kept in `cache`, so that the next one starts sooner."""
    kept = environment() | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    return subprocess.Popen(command, env=kept, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def iteration(workdir: Path) -> int:
    """How far the run in `workdir` has come, by its log."""
    log = workdir / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def half_written(workdir: Path) -> set[int]:
    """The checkpoints whose save was never finished, by inode: a name can come again."""
    found = storage.candidates(workdir / storage.FOLDER)
    return {path.stat().st_ino for path in found if not manifest.is_sealed(path)}


def trial(folder: Path, kills: int, seed: int, command: Callable[..., list[str]] = real) -> tuple[str, bool]:
    """(what happened, in a sentence; whether nothing was lost) of a run that is killed so often."""
    rng = np.random.default_rng(seed)
    steps = ITERATIONS_A_KILL * kills
    whole, broken, cache = folder / "whole", folder / "broken", folder / "cache"
    cache.mkdir()
    shutil.copy(ROOT / "configs" / "digits.py", cache)  # whatever happens to it meanwhile
    first = start(command(whole, cache, steps), cache)
    assert first.wait() == 0, first.stderr.read()
    killed, starting, saving = 0, 0, 0
    for moment in np.sort(rng.integers(0, int(0.8 * steps), kills)):
        before = half_written(broken)
        process = start(command(broken, cache, steps), cache)
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, 5))
            starting += 1
        else:
            wait_for(lambda at=moment: iteration(broken) > at, process, 300)
            time.sleep(rng.uniform(0, 0.3))
        process.kill()
        code = process.wait()
        assert code in (0, -signal.SIGKILL), process.stderr.read()
        killed += code != 0  # a fast machine may have come to the end before
        saving += not half_written(broken) <= before
    last = start(command(broken, cache, steps), cache)
    assert last.wait() == 0, last.stderr.read()
    same = files_of(whole)[1:] == files_of(broken)[1:]
    count = len(files_of(whole)[1])
    return (
        f"{killed} kills, {starting} at any moment of starting, {saving} during a save; after {steps} iterations "
        f"{count} arrays, the data's position and the log are {'identical' if same else 'NOT THE SAME'}",
        same and killed > 0,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        sentence, same = trial(Path(folder), given.kills, given.seed)
    print(sentence)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
