"""What a run leaves behind, to compare runs by; and waiting for it."""

import json
import time

import numpy as np

from crcm_jax.saving import storage


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
