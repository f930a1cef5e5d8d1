"""Weights from a finished (or packaged) run, for the next stage, a teacher, or sampling."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from crcm_jax.errors import UserError
from crcm_jax.parallel import processes
from crcm_jax.saving import manifest, storage
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
    with _opened(found) as file:
        return _safetensors_meta(file)


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


@contextlib.contextmanager
def _opened(found: Path) -> Iterator[Any]:
    try:
        with safe_open(found, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{found} is not a whole .safetensors file ({error}): restore it from a copy") from error


def _safetensors_meta(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {}).get("crcm", "{}"))


def _digest(flat: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(flat):
        digest.update(flat[name].tobytes())
    return digest.hexdigest()


def _load_safetensors(found: Path, expect: Params | None, dtype: Any) -> Params:
    with _opened(found) as file:
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        sealed = _safetensors_meta(file).get("sha256")
    if sealed not in (None, _digest(flat)):
        raise UserError(f"{found} has altered bytes: restore it from a copy or use another one")
    stored: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = stored
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    targets = _targets(found, stored, expect, dtype)

    def place(value, to):
        # By pieces, so that each process takes only its own.
        return jax.make_array_from_callback(value.shape, to.sharding, lambda piece: value[piece].astype(to.dtype))

    return jax.tree.map(place, stored, targets)


def save_params(path: str | Path, params: Params, meta: dict[str, Any], dtype: Any = None) -> None:
    """Writes weights alone, in `dtype` (default: their own), as a checkpoint folder or, by its suffix, a `.safetensors`
    file. `meta` is what `load_meta` gives back; `training`, `model` and `config` are the keys others look for.

    UserError if something is there already.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already: remove it or write elsewhere")
    meta = {"format": storage.FORMAT} | meta
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        flat = {name: np.asarray(jax.device_get(leaf)) for name, leaf in storage.leaves(params)}
        save_file(flat, path, metadata={"crcm": json.dumps(meta | {"sha256": _digest(flat)})})
        return
    path.mkdir(parents=True)
    storage.write_trees(path, {"params": params}).result()
    manifest.write_text(path / "meta.json", json.dumps(meta, indent=1))
    manifest.seal(path)
