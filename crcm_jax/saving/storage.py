"""How trees of arrays lie on disk. The one place that knows orbax.

A stored folder:

    state/         orbax, one named tree each
    meta.json      format, iteration, training type, architecture, configuration
    manifest.json  sizes and checksums of everything; written last, so it is what makes a folder whole
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from crcm_jax.errors import UserError
from crcm_jax.saving import manifest

FORMAT = 2
READABLE = (1, 2)
"""Of format 1, `train.old_checkpoints` and `weights` know the trees' names."""
FOLDER = "checkpoints"
"""Where a workdir keeps them."""

# Orbax logs every phase of every save, and each failure once a thread, before raising it. Runs have their own words.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def warn(message: str) -> None:
    """One line to the user that does not stop the run."""
    print(f"crcm: {message}", file=sys.stderr, flush=True)


def here() -> jax.sharding.Sharding:
    """Where arrays go when nobody says: the first local device."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def abstract(tree: Any) -> Any:
    """Shapes, types and shardings of a tree of arrays (or of shapes, which then go `here`): what to restore into."""

    def describe(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here())

    return jax.tree.map(describe, tree)


def read_meta(folder: Path) -> dict[str, Any]:
    """A checkpoint's meta.json; UserError if it is of a format this version does not know."""
    try:
        meta = dict(json.loads((folder / "meta.json").read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(
            f"{folder} has no meta.json that can be read: restore it from a copy or use another one"
        ) from None
    if meta.get("format") not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise UserError(f"{folder} has checkpoint format {meta.get('format')}, this version reads {known}")
    return meta


def candidates(parent: Path) -> list[Path]:
    """Folders of `parent` named like checkpoints, newest first, whole or not."""
    if not parent.is_dir():
        return []
    return sorted((path for path in parent.iterdir() if re.fullmatch(r"\d{9}", path.name)), reverse=True)


def newest_whole(parent: Path) -> Path | None:
    """The newest checkpoint of `parent` whose every byte is right, warning of damaged newer ones. None if no save was
    ever finished; UserError if some were and all are damaged."""
    sealed = [folder for folder in candidates(parent) if manifest.is_sealed(folder)]
    for folder in sealed:
        flaw = manifest.damage(folder)
        if flaw is None:
            return folder
        warn(f"checkpoint {folder} {flaw}; going back to the one before it")
    if sealed:
        raise UserError(
            f"none of the {len(sealed)} checkpoints in {parent} is undamaged: restore one from a copy, or start again "
            "in another --workdir"
        )
    return None


def _arrays(folder: Path) -> Path:
    return folder.absolute() / "state"  # orbax takes no relative path


def write_trees(folder: Path, trees: dict[str, Any]) -> ocp.AsyncResponse:
    """Starts writing; returns once the arrays may be overwritten. `.result()` waits and raises what went wrong."""
    return ocp.save_checkpointables_async(_arrays(folder), trees)


def read_trees(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    """The trees named by `like`, in its shapes, types and shardings."""
    return ocp.load_checkpointables(_arrays(folder), like)


def stored_shapes(folder: Path) -> dict[str, Any]:
    """Every tree of a checkpoint as `jax.ShapeDtypeStruct`s, without reading the arrays."""
    stored = ocp.checkpointables_metadata(_arrays(folder)).metadata
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype)), stored)


def leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """(name like `blocks/attn/q`, leaf) of every leaf."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def first_difference(stored: Any, expected: Any) -> str | None:
    """What first keeps `stored` from filling `expected`, names and shapes; None if it fits."""
    stored, expected = dict(leaves(stored)), dict(leaves(expected))
    for name in expected:
        if name not in stored:
            return f"it lacks {name}, which this model has with shape {list(expected[name].shape)}"
        if tuple(stored[name].shape) != tuple(expected[name].shape):
            return f"{name} has shape {list(stored[name].shape)} there and {list(expected[name].shape)} in this model"
    for name in stored:
        if name not in expected:
            return f"{name} of shape {list(np.shape(stored[name]))} has no place in this model"
    return None
