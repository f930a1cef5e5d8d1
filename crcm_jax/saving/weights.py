"""Weights from a finished (or packaged) run, for the next stage, a teacher, or sampling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from crcm_jax.errors import UserError
from crcm_jax.parallel import processes
from crcm_jax.saving import manifest, storage
from crcm_jax.saving.files import atomic
from crcm_jax.saving.tensors import TensorFile, digest_of
from crcm_jax.shapes import Params


def find(path: str | Path) -> Path:
    """The checkpoint folder or `.safetensors` file that `path` means: itself, or a workdir's newest whole checkpoint.

    UserError, one sentence, if there is nothing there, nothing finished, or nothing undamaged.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        return path
    if not path.is_dir():
        raise UserError(
            f"there is no checkpoint at {path}: give a run's workdir, a checkpoint folder or a .safetensors file"
        )
    if manifest.is_sealed(path):
        flaw = manifest.damage(path)
        if flaw:
            raise UserError(f"checkpoint {path} {flaw}: restore it from a copy or use another one")
        return path
    if (path / "state").exists() or (path / "meta.json").exists():
        raise UserError(f"checkpoint {path} is half-written (its save was interrupted): use another one")
    parent = path / storage.FOLDER if (path / storage.FOLDER).is_dir() else path
    found = storage.newest_whole(parent)
    if found is None:
        half = storage.candidates(parent)
        why = f"only {half[0].name}, half-written, is" if half else "none is"
        raise UserError(f"there is no whole checkpoint in {parent}: {why} there; train it first, or give another path")
    return found


def load_meta(path: str | Path) -> dict[str, Any]:
    """What is known of the run behind `path`: `training`, `model`, `config`, `iteration` …; of a foreign `.safetensors`
    file, nothing."""
    return _meta(find(path))


def _meta(found: Path) -> dict[str, Any]:
    if found.is_dir():
        return storage.read_meta(found)
    return TensorFile(found).meta


def load_params(
    path: str | Path,
    which: str = "ema",
    expect: Params | None = None,
    dtype: Any = None,
    training: Sequence[str] | None = None,
) -> Params:
    """Weights from a run's workdir (its newest whole checkpoint), a checkpoint folder or a `.safetensors` file.

    which: "ema", "params" (the student's live weights) or "critic", or any tree of the checkpoint by its name; a
      checkpoint of weights alone gives those it has.
    expect: a tree of anything with `shape` and `dtype` (arrays, `jax.eval_shape`), optionally `sharding`, that the
      weights must fit; without it they come as they are stored, on the first device.
    dtype: the type to load into; default `expect`'s, else the stored one.
    training: the training types whose weights will do here, if that matters.
    UserError, one sentence, if the checkpoint is missing, half-written, damaged, of another architecture (naming the
    first leaf that differs, with shapes) or of another stage.
    """
    found = Path(processes.decided_by_first(lambda: str(find(path))))
    meta = _meta(found)
    if training and meta.get("training") and meta["training"] not in training:
        raise UserError(
            f"{found} is of another stage: it was trained as {meta['training']!r}, "
            f"needed here is {' or '.join(training)}"
        )
    if found.is_dir():
        return _load_folder(found, which, expect, dtype)
    return _load_safetensors(found, expect, dtype)


def _targets(found: Path, stored: Params, expect: Params | None, dtype: Any) -> Params:
    if expect is not None:
        flaw = storage.first_difference(stored, expect)
        if flaw:
            raise UserError(f"{found} is of another architecture: {flaw}")
        for (name, has), (_, wanted) in zip(storage.leaves(stored), storage.leaves(expect)):
            if jnp.issubdtype(wanted.dtype, jnp.inexact) and not jnp.issubdtype(has.dtype, jnp.inexact):
                raise UserError(f"{found} holds {name} as {has.dtype}, which are no weights: use another file")
    targets = storage.abstract(stored if expect is None else expect)
    return jax.tree.map(lambda x: x.update(dtype=dtype or x.dtype), targets)


_NAMES = {"ema": "student.ema", "params": "student.params", "critic": "critic.params"}
"""What users call a tree → what a run's checkpoint does; in format 1, and in one of weights alone, the former too."""


def _load_folder(found: Path, which: str, expect: Params | None, dtype: Any) -> Params:
    shapes = storage.stored_shapes(found)
    name = next((name for name in (_NAMES.get(which, which), which) if name in shapes), None)
    if name is None and which in ("ema", "params") and "counters" not in shapes:
        name = next((name for name in ("ema", "params") if name in shapes), None)
    if name is None:
        raise UserError(f"{found} holds no {which!r} weights, only {', '.join(sorted(shapes))}")
    return storage.read_trees(found, {name: _targets(found, shapes[name], expect, dtype)})[name]


def _load_safetensors(found: Path, expect: Params | None, dtype: Any) -> Params:
    file = TensorFile(found)
    processes.decided_by_first(file.require_unaltered)
    stored: dict[str, Any] = {}
    for name, tensor in file.tensors.items():
        *parents, last = name.split("/")
        node = stored
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{found} names {name}, and a tensor above it: it is of no layout known here")
        if last in node:
            raise UserError(f"{found} names {name}, and tensors below it: it is of no layout known here")
        node[last] = jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
    targets = _targets(found, stored, expect, dtype)

    def place(path: Any, to: jax.ShapeDtypeStruct) -> jax.Array:
        # By pieces: each process reads only its own.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.make_array_from_callback(to.shape, to.sharding, lambda piece: file.read(name, piece, to.dtype))

    return jax.tree_util.tree_map_with_path(place, targets)


def save_params(path: str | Path, params: Params, meta: dict[str, Any], dtype: Any = None) -> None:
    """Writes weights alone, in `dtype` (default: their own), as a checkpoint folder or, by its suffix, a `.safetensors`
    file, whole or not at all. `meta` is what `load_meta` gives back; `training`, `model` and `config` are the keys
    others look for.

    UserError if something is there already, or it cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already: remove it or write elsewhere")
    meta = {"format": storage.FORMAT} | meta
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    with atomic(path) as draft:
        if path.suffix == ".safetensors":
            flat = {name: np.asarray(jax.device_get(leaf)) for name, leaf in storage.leaves(params)}
            save_file(flat, draft, metadata={"crcm": json.dumps(meta | {"sha256": digest_of(flat.items())})})
            return
        draft.mkdir()
        storage.write_trees(draft, {"params": params}).result()
        manifest.write_text(draft / "meta.json", json.dumps(meta, indent=1))
        manifest.seal(draft)
