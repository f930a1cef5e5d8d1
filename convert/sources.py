"""What weights can be read from: a file, a folder of shards, one of our own checkpoints. Names and specs first, the
elements tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crcm_jax.convert import safetensors_file, torch_file
from crcm_jax.convert.arrays import FLOATS, Spec
from crcm_jax.data import texts
from crcm_jax.errors import UserError

ROLES = {
    "ema": ("generator_ema", "net_ema", "ema"),
    "params": ("generator", "net", "model", "state_dict", "module", ""),
    "critic": ("critic", "fake_score", "net_fake_score"),
}
"""Names under which files keep the averaged weights, the live ones, and the critic's."""

_PREFIXES = ("net_ema.", "net_fake_score.", "net.", "generator_ema.", "generator.")
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_LEADING = ("model.diffusion_model.", "model.", "net.", "module.")
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.\w+")
_SUBFOLDERS = ("transformer", "vae", "text_encoder", "image_encoder")


@dataclasses.dataclass
class Source:
    """Tensors by name. `read(name, rows)` gives raw elements: all, or rows (first, end) of the first axis.

    kind: what it is, in words. config: a folder's config.json. meta: what one of our files says of itself. notes: what
    was left aside, and why.
    """

    path: Path
    kind: str
    specs: dict[str, Spec]
    read: Callable[[str, tuple[int, int] | None], np.ndarray]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives tensors other names: old → new."""
        self.specs = {names.get(name, name): spec for name, spec in self.specs.items()}
        read, before = self.read, {new: old for old, new in names.items()}
        self.read = lambda name, rows: read(before.get(name, name), rows)


def open_source(path: str | Path, which: str | None = None) -> Source:
    """Finds out what lies at `path`. `which` picks "ema", "params" or "critic" where there are several; the default is
    the average where there is one. UserError, one sentence, for what cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, which)
    if not path.is_file():
        raise UserError(f"there is nothing at {path}: give a checkpoint file or folder")
    if path.suffix == ".safetensors":
        return _from_safetensors(path, [path], which)
    if path.suffix in _TORCH:
        return _from_torch(path, [path], which)
    raise UserError(f"{path} ends in {path.suffix or 'nothing'}: known are .safetensors, {', '.join(_TORCH)}")


def _folder(path: Path, which: str | None) -> Source:
    """What a folder holds: shards by their index or their numbers, or one file of weights; named where that is open."""
    found = _weights_of(path, which)
    if found is None:
        _refuse_what_is_no_checkpoint(path)
        return _from_checkpoint(path, which)
    config = path / "config.json"
    if config.is_file():
        found.config = _object(texts.read(config), config)
    return found


def _weights_of(path: Path, which: str | None) -> Source | None:
    """Foreign weights in a folder, .safetensors before PyTorch's; None where there is no such file."""
    for suffixes, opened in (((".safetensors",), _from_safetensors), (_TORCH, _from_torch)):
        files = [file for file in _visible(path) if file.is_file() and file.suffix in suffixes]
        indexes = [file for file in _visible(path) if file.name.endswith(tuple(f"{s}.index.json" for s in suffixes))]
        if len(indexes) > 1:
            raise UserError(f"{path} holds several sets of shards ({_names(indexes)}): give a folder with one of them")
        if indexes:
            return opened(path, _indexed(indexes[0]), which)
        if (len(files) == 1 and not _SHARD.fullmatch(files[0].name)) or _all_shards(files):
            return opened(path, files, which)
        if files and any(_SHARD.fullmatch(file.name) for file in files):
            raise UserError(f"{path} holds {_names(files)}, not all shards of one set: fetch the missing ones")
        if files:
            raise UserError(
                f"{path} holds {len(files)} files of weights ({_names(files)}) and no index.json: fetch the index, or "
                f"give one, --from={files[0]}"
            )
    if parts := [name for name in _SUBFOLDERS if (path / name).is_dir()]:
        raise UserError(
            f"{path} is a whole pipeline: convert its subfolders ({', '.join(parts)}) one by one, "
            f"--from={path / parts[0]}"
        )
    if list(path.glob("*.distcp")):
        raise UserError(f"{path} is a distributed PyTorch checkpoint: merge it with torch's dcp_to_torch first")
    return None


def _refuse_what_is_no_checkpoint(path: Path) -> None:
    """UserError that says what a folder holds, if it is neither a run's workdir nor one of our checkpoints."""
    from crcm_jax.saving import manifest, storage

    ours = path / storage.FOLDER
    if storage.candidates(ours) or storage.candidates(path) or (path / "meta.json").exists():
        return
    if (path / "state").exists() or manifest.is_sealed(path):
        return
    known = (".safetensors", *_TORCH)
    below = [file.parent for file in sorted(path.glob("*/[!.]*")) if file.suffix in known]
    if below:
        raise UserError(f"{path} holds no weights itself, but {below[0].name} in it does: --from={below[0]}")
    if ours.is_dir():
        return
    held = _names(_visible(path)) or "nothing"
    raise UserError(
        f"{path} is no checkpoint: it holds {held}; give a run's workdir, or weights that end in {', '.join(known)}"
    )


def _visible(path: Path) -> list[Path]:
    """What a folder holds, but for hidden files: a Mac's copy puts ._weights.pt beside weights.pt."""
    return sorted(file for file in path.iterdir() if not file.name.startswith("."))


def _all_shards(files: list[Path]) -> bool:
    """Whether `files` are those numbered 1 to n of n, of one name."""
    found = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if not files or len(found) < len(files):
        return False
    sets = {(m["stem"], int(m["count"])) for m in found}
    return len(sets) == 1 and sorted(int(m["number"]) for m in found) == list(range(1, next(iter(sets))[1] + 1))


def _names(files: list[Path], most: int = 4) -> str:
    more = f" … and {len(files) - most} more" if len(files) > most else ""
    return ", ".join(file.name for file in files[:most]) + more


def _object(text: str, where: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(text).items())
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{where} is not readable as JSON: fetch it again") from None


def _indexed(index: Path) -> list[Path]:
    """The shards of an index, which must agree with it tensor by tensor."""
    try:
        where = {name: str(file) for name, file in json.loads(texts.read(index))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index} is not a readable index of shards: fetch it again") from None
    shards = [index.parent / name for name in sorted(set(where.values()))]
    for shard in shards:
        if shard.parent != index.parent or not shard.is_file():
            raise UserError(f"{index.name} speaks of {shard.name}, which is not beside it: fetch the missing shard")
        stored = _stored(shard)
        told = {name for name, file in where.items() if file == shard.name}
        for name in sorted(told - stored):
            raise UserError(f"{index.name} places {name} in {shard.name}, which lacks it: fetch both again")
        for name in sorted(stored - told):
            there = f"places it in {where[name]}" if name in where else "does not know it"
            raise UserError(f"{shard.name} holds {name}, but {index.name} {there}: fetch both again")
    return shards


def _stored(shard: Path) -> set[str]:
    if shard.suffix == ".safetensors":
        return set(safetensors_file.Reader(shard).specs)
    content = torch_file.Reader(shard).content
    return set(map(str, content)) if isinstance(content, Mapping) else set()


def _from_safetensors(path: Path, files: list[Path], which: str | None) -> Source:
    readers = [safetensors_file.Reader(file) for file in files]
    where = {name: reader for reader in readers for name in reader.specs}
    if len(where) < sum(len(reader.specs) for reader in readers):
        raise UserError(f"{path} holds a tensor in two of {_names(files)}: fetch them again")
    meta = _object(readers[0].metadata.get("crcm", "{}"), f"what {files[0]} says of itself")
    groups: dict[str, dict[str, str]] = {}
    for name in where:
        prefix, rest = _split(name)
        groups.setdefault(prefix, {})[rest] = name
    names, notes = _choose(path, groups, which)
    specs = {name: where[stored].specs[stored] for name, stored in names.items()}
    kind = f"{len(files)} .safetensors file{'s' * (len(files) > 1)}"
    return Source(path, kind, specs, lambda name, rows: where[names[name]].read(names[name], rows), {}, meta, notes)


def _from_torch(path: Path, files: list[Path], which: str | None) -> Source:
    readers = [torch_file.Reader(file) for file in files]
    content: dict[Any, Any] = {}
    for file, reader in zip(files, readers):
        if not isinstance(reader.content, Mapping):
            raise UserError(f"{file} holds a {type(reader.content).__name__}, not named tensors")
        if twice := content.keys() & reader.content.keys():
            raise UserError(f"{file} holds {min(map(str, twice))}, which another shard holds too: fetch both again")
        content |= reader.content
    reader = readers[0]
    groups: dict[str, dict[str, Any]] = {}
    aside = []
    for key, value in content.items():
        if reader.is_tensor(value):
            prefix, rest = _split(str(key))
            groups.setdefault(prefix, {})[rest] = value
        elif isinstance(value, Mapping) and value and all(reader.is_tensor(v) for v in value.values()):
            for name, tensor in value.items():
                prefix, rest = _split(str(name))
                groups.setdefault(str(key) if prefix in ("", "net") else prefix, {})[rest] = tensor
        else:
            aside.append(str(key))
    tensors, notes = _choose(path, groups, which)
    if aside:
        notes.append(f"passed over {', '.join(sorted(aside)[:8])}: no weights")
    specs = {name: reader.spec(name, tensor) for name, tensor in tensors.items()}

    def read(name: str, rows: tuple[int, int] | None) -> np.ndarray:
        tensor = tensors[name]
        return reader.read(tensor if rows is None else tensor[slice(*rows)])

    return Source(path, f"{len(files)} PyTorch files" if len(files) > 1 else "PyTorch file", specs, read, notes=notes)


def _from_checkpoint(path: Path, which: str | None) -> Source:
    """A run's workdir or checkpoint folder. Its weights are held whole: orbax restores a tree at a time."""
    from crcm_jax.saving import storage
    from crcm_jax.saving.weights import load_meta, load_params

    meta = load_meta(path)
    arrays = {name: np.asarray(leaf) for name, leaf in storage.leaves(load_params(path, which or "ema"))}
    types = {np.dtype(kind): name for name, kind in FLOATS.items()}
    for name, array in arrays.items():
        if array.dtype not in types:
            raise UserError(f"{path}: {name} is of type {array.dtype}, no floating-point one: it cannot be converted")
    specs = {name: Spec(types[array.dtype], array.shape) for name, array in arrays.items()}

    def read(name: str, rows: tuple[int, int] | None) -> np.ndarray:
        array = arrays[name] if rows is None else arrays[name][slice(*rows)]
        return array.view(f"u{array.dtype.itemsize}")

    notes = [f"the {which or 'ema'} weights of iteration {meta.get('iteration', '?')}"]
    return Source(path, "causal-rcm-jax checkpoint", specs, read, {}, meta, notes)


def _split(name: str) -> tuple[str, str]:
    """(whose tensor, its name without that)."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return prefix[:-1], name[len(prefix) :]
    return "", name


def _choose(path: Path, groups: dict[str, dict[str, Any]], which: str | None) -> tuple[dict[str, Any], list[str]]:
    """The tensors asked for, by their bare names; and what was left aside."""
    by_role = {role: [name for name in names if name in groups] for role, names in ROLES.items()}
    order = {None: ("ema", "params"), "ema": ("ema", "params"), "params": ("params",), "critic": ("critic",)}[which]
    role = next((role for role in order if by_role[role]), None)
    if role is None:
        held = ", ".join(sorted(name or "bare names" for name in groups)) or "no tensors"
        raise UserError(f"{path} holds no {which or 'student'} weights, only {held}: choose another --which")
    chosen, *more = by_role[role]
    notes = [f"left aside {len(groups[name])} tensors of {name or 'bare name'}" for name in groups if name != chosen]
    if more:
        raise UserError(f"{path} holds several sets of weights ({chosen}, {', '.join(more)}): split it first")
    if which == "ema" and role == "params":
        notes.append("no averaged weights are told apart here: these are the only ones")
    bare: dict[str, Any] = {}
    for name, tensor in groups[chosen].items():
        short = _bare(name)
        if short in bare:
            raise UserError(f"{path} holds {short} twice, once as {name}: it mixes two sets of weights")
        bare[short] = tensor
    return bare, notes


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    leading = re.compile("|".join(re.escape(prefix) for prefix in _LEADING))
    while found := leading.match(name):
        name = name[found.end() :]
    return name
