"""Two real processes of two CPU devices each, that train together on this machine.

    python tests/train/together.py tf tf_scm sf_dmd

trains each type for three iterations in two processes and in one, from the same random weights, and prints the largest
difference of any array of the final checkpoints (weights, averages, both optimisers), against that array's largest
entry.
"""

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from run_files import ROOT, arrays_of, environment

from crcm_jax import recipes
from crcm_jax.configs.digits import get_config
from crcm_jax.saving.weights import save_params
from crcm_jax.train import assemble

MESH = {"mesh.data": 2, "mesh.fsdp": 2}
"""`data` goes across the two processes, `fsdp` stays within one."""

SIZES = {
    **{"model.dim": 16, "model.ffn_dim": 16, "model.heads": 2, "model.layers": 1, "model.freq_dim": 8},
    **{"data.batch_size": 4, "data.frames": 2, "data.straight": 0, "optim.warmup": 0, "critic_optim.warmup": 0},
    **{"train.log_every": 1, "train.save_every": 0, "train.sample_every": 0},
}


def start(command, *words, cache=None, which=(0, 1), wait=120) -> list[subprocess.Popen]:
    """Those of two processes. cache: a folder for what they compile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--wait={wait}"]
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {}
    return [
        subprocess.Popen(
            [*command, *map(str, words), *options, f"--process={index}"],
            **{"env": environment(2) | kept, "text": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE},
        )
        for index in which
    ]


def end(started, seconds=240) -> list[str]:
    """What each told the user, without its progress bar; all must end in that time."""
    told = [process.communicate(timeout=seconds)[1].replace("\r", "\n").splitlines() for process in started]
    return ["\n".join(line for line in lines if line.startswith(("crcm", "Traceback", "F1"))) for lines in told]


def starting_weights(training: str, folder: Path) -> dict[str, object]:
    """Settings of a tiny run of that type from random weights, written into `folder`: zero heads would hide much."""
    roles = {"student": "bidirectional" if training in ("bidirectional", "tf", "df") else "tf"}
    roles |= {"teacher": "tf"} if "cm" in training else {}
    roles |= {"real": "bidirectional"} if "dmd" in training else {}
    settings = dict(SIZES)
    for seed, (role, stage) in enumerate(roles.items()):
        c = get_config(stage)
        c.update_from_flattened_dict(SIZES)
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(recipes.student(c).init, jax.random.key(0))
        params = jax.tree.map(lambda x, rng=rng: (0.3 * rng.normal(size=x.shape)).astype(np.float32), shapes)
        save_params(folder / role, params, {"training": stage})
        settings[f"init.{role}"] = str(folder / role)
    if "dmd" in training:
        settings |= {"rollout.steps": (2,), "rollout.times": ((5 / 6,),)}
    return settings


def train(training: str, workdir: Path, settings: dict[str, object]) -> list[subprocess.Popen]:
    """`crcm train` in two processes."""
    command = [sys.executable, "-m", "crcm_jax", "train", f"--config={ROOT}/configs/digits.py:{training}"]
    return start(command, f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in settings.items()))


def difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest difference of two runs' arrays, each against its own largest entry."""
    assert found.keys() == expected.keys()
    return max(
        float(np.abs(found[name].astype(np.float64) - array).max() / max(np.abs(array).max(), 1e-6))
        for name, array in expected.items()
    )


def main(types: list[str]) -> None:
    """Prints a line a type."""
    jax.config.update("jax_platforms", "cpu")
    for training in types:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            settings = starting_weights(training, folder) | {"train.steps": 3}
            started = train(training, folder / "many", settings | MESH)
            told = end(started, 1200)
            assert not any(told), told
            c = get_config(training)
            c.update_from_flattened_dict(settings)
            assemble.train(c, folder / "one")
            found = difference(arrays_of(folder / "many"), arrays_of(folder / "one"))
            print(f"{training}: {found:.1e} after 3 iterations", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
