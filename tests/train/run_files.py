"""What a run of its own process needs, and leaves behind to compare runs by; and waiting for it."""

import json
import os
import time
from pathlib import Path

import numpy as np

from crcm_jax.saving import storage

ROOT = Path(__file__).parents[2]


def environment(devices: int = 1) -> dict[str, str]:
    """Of a process with so many CPU devices, which compiles in a hurry and spares itself torch."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).with_name("without_torch")), str(ROOT))),
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def arrays_of(workdir):
    """Every array of the newest whole checkpoint, by name."""
    folder = storage.newest_whole(workdir / storage.FOLDER)
    trees = storage.read_trees(folder, storage.abstract(storage.stored_shapes(folder)))
    return {name: np.asarray(leaf) for name, leaf in storage.leaves(trees)}


def files_of(workdir):
    """Everything that must not depend on how often a run was interrupted: arrays, data position, log."""
    config = json.loads((workdir / "config.json").read_text())
    folder = storage.newest_whole(workdir / storage.FOLDER)
    flat = {name: array.tobytes() for name, array in arrays_of(workdir).items()}
    meta = json.loads((folder / "meta.json").read_text())
    return config, flat, (folder / "data.json").read_text(), meta, (workdir / "metrics.jsonl").read_text()


def wait_for(condition, process=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
