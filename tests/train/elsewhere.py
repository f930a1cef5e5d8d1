"""Takes a run from one mesh to others: `python tests/train/elsewhere.py`.

Two of four iterations of `tf` on `fsdp` 8, the other two on each of several meshes of fake CPU devices; and all four on
`tensor` 4 across two processes, which both read every row. Prints the largest difference of any array of the final
checkpoint from four iterations on one device, against that array's largest entry.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import together
from run_files import ROOT, arrays_of, environment, files_of

MESHES = {
    "one device": {},
    "data 2 × tensor 2": {"mesh.data": 2, "mesh.tensor": 2},
    "fsdp 8": {"mesh.fsdp": 8},
}
SIZES = {"data.batch_size": 8, "model.heads": 4, "model.dim": 32}


def train(workdir: Path, cache: Path, settings: dict[str, object], steps: int) -> None:
    """`crcm train` in one process with as many devices as the mesh wants."""
    devices = 1
    for key in together.MESH | {"mesh.tensor": 1}:
        devices *= settings.get(key, 1)
    kept = environment(devices) | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "crcm_jax", "train", f"--config={ROOT}/configs/digits.py:tf"]
    command += [f"--workdir={workdir}", f"--config.train.steps={steps}", *words]
    done = subprocess.run(command, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    together.SIZES.update(SIZES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache, settings = folder / "cache", together.starting_weights("tf", folder)
        train(folder / "alone", cache, settings, 4)
        train(folder / "start", cache, settings | MESHES["fsdp 8"], 2)
        train(folder / "whole", cache, settings | MESHES["fsdp 8"], 4)

        def report(title, workdir):
            found = together.difference(arrays_of(workdir), arrays_of(folder / "alone"))
            print(f"{title}: {found:.1e}", flush=True)

        for title, mesh in MESHES.items():
            shutil.copytree(folder / "start", folder / title)
            train(folder / title, cache, settings | mesh, 4)
            report(f"fsdp 8, then {title}", folder / title)
        same = files_of(folder / "fsdp 8")[1:] == files_of(folder / "whole")[1:]
        print(f"fsdp 8, stopped and gone on with: {'bit for bit' if same else 'NOT'} the unbroken run")
        started = together.train("tf", folder / "tensor", settings | {"mesh.tensor": 4, "train.steps": 4})
        told = together.end(started, 1200)
        assert not any(told), told
        report("tensor 4 across two processes", folder / "tensor")


if __name__ == "__main__":
    main()
