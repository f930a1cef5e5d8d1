"""What weights can be written as: a .safetensors file, a .pth file, a diffusers folder. All of it or nothing."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crcm_jax.convert import card, foreign_configs, safetensors_file, torch_file
from crcm_jax.convert.arrays import Spec
from crcm_jax.convert.models import CLIP, UMT5, Model
from crcm_jax.convert.sources import Source
from crcm_jax.convert.tables.wan_transformer import RCM_PREFIX
from crcm_jax.errors import UsageError, UserError
from crcm_jax.saving.files import atomic, write_text

_SUFFIXES = {
    "native": (".pth", ".pt", ".safetensors"),
    "rcm": (".pt", ".pth", ".safetensors"),
    "ours": (".safetensors",),
    "diffusers": ("",),
}
_SHARD = 5_000_000_000
"""Bytes of a shard at most, unless one tensor is larger."""


class Output(NamedTuple):
    """Where to write, and as what: "safetensors", "torch" or "folder"."""

    path: Path
    kind: str


def choose(path: Path, layout: str) -> Output:
    """The form that a layout takes at `path`, by its suffix. UserError if that is not one, or something is there."""
    allowed = _SUFFIXES[layout]
    if path.suffix not in allowed and not (allowed == ("",) and path.suffix not in (".pth", ".pt", ".safetensors")):
        wanted = "name a folder" if allowed == ("",) else f"end it in {' or '.join(allowed)}"
        raise UsageError(f"--to={path} is not for --layout={layout}: {wanted}")
    if path.exists():
        raise UserError(f"{path} exists already: remove it or write elsewhere")
    if allowed == ("",):
        return Output(path, "folder")
    return Output(path, "safetensors" if path.suffix == ".safetensors" else "torch")


@contextlib.contextmanager
def draft(output: Output, specs: Mapping[str, Spec], model: Model, layout: str, source: Source) -> Iterator[Draft]:
    """The output under way: left without an exception it is completed and put in its place, otherwise nothing is left.

    UserError where there is too little room, or the place cannot be written.
    """
    if output.kind == "torch":
        torch_file.require(specs)
    _require_room(output, specs)
    with atomic(output.path) as path:
        under_way = Draft(path, output, specs, model, layout, source)
        try:
            under_way.begin()
            yield under_way
            text = under_way.complete()
        finally:
            under_way.discard()
    if output.kind != "folder" and layout != "ours":
        write_text(output.path.with_name(output.path.name + ".md"), text)


def _require_room(output: Output, specs: Mapping[str, Spec]) -> None:
    folder = next(parent for parent in output.path.absolute().parents if parent.is_dir())
    need = sum(spec.nbytes for spec in specs.values()) * (2 if output.kind == "torch" else 1)
    free = shutil.disk_usage(folder).free
    if free < need + (64 << 20):
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free and this needs {need / 1e9:.1f}: free some space or write elsewhere"
        )


class Draft:
    """What is written before it takes its place; see `draft`."""

    def __init__(
        self, path: Path, output: Output, specs: Mapping[str, Spec], model: Model, layout: str, source: Source
    ):
        self.output, self.model, self.layout, self.source = output, model, layout, source
        prefix = RCM_PREFIX if layout == "rcm" else ""
        self._names = {name: prefix + name for name in specs}
        self._specs = {prefix + name: spec for name, spec in specs.items()}
        self._draft, self._parts = path, path.with_name(path.name + ".parts")
        self._writers: list[safetensors_file.Writer] = []
        self._where: dict[str, safetensors_file.Writer] = {}

    def begin(self) -> None:
        """Takes all the room that the tensors need."""
        if self.output.kind == "folder":
            self._draft.mkdir()
            for file, names in self._shards().items():
                self._open(self._draft / file, names, {"format": "pt"})
        elif self.output.kind == "torch":
            self._open(self._parts, list(self._specs), {})
        else:
            metadata = {"crcm": json.dumps(self._meta())} if self.layout == "ours" else {"format": "pt"}
            self._open(self._draft, list(self._specs), metadata)

    def discard(self) -> None:
        """Closes what is open, as it is."""
        for writer in self._writers:
            writer.discard()
        self._parts.unlink(missing_ok=True)

    def write(self, name: str, block: np.ndarray, offset: int) -> None:
        """Contiguous raw elements of tensor `name`, at `offset` bytes from its start."""
        name = self._names[name]
        self._where[name].write(name, block, offset)

    def complete(self) -> str:
        """Writes what the draft still lacks; the model's card."""
        text = card.text(self.model, self.layout, self.source, self.output.path.name)
        if self.layout == "ours":
            self._writers[0].seal()
        for writer in self._writers:
            writer.close()
        if self.output.kind == "folder":
            config = foreign_configs.of(self.model)
            (self._draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (self._draft / "README.md").write_text(text, encoding="utf-8")
            self._write_index()
        elif self.output.kind == "torch":
            writer = self._writers[0]
            torch_file.write(self._draft, self._parts, writer.starts, self._specs)
        return text

    def _open(self, path: Path, names: list[str], metadata: Mapping[str, str]) -> None:
        writer = safetensors_file.Writer(path, {name: self._specs[name] for name in names}, metadata)
        self._writers.append(writer)
        self._where |= dict.fromkeys(names, writer)

    def _shards(self) -> dict[str, list[str]]:
        groups: list[list[str]] = [[]]
        size = 0
        for name, spec in self._specs.items():
            if groups[-1] and size + spec.nbytes > _SHARD:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += spec.nbytes
        stem = "model" if self.model.family in (UMT5, CLIP) else "diffusion_pytorch_model"
        if len(groups) == 1:
            return {f"{stem}.safetensors": groups[0]}
        return {f"{stem}-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}

    def _write_index(self) -> None:
        if len(self._writers) == 1:
            return
        stem = self._writers[0].path.name.split("-")[0]
        total = sum(spec.nbytes for spec in self._specs.values())
        where = {name: writer.path.name for name, writer in sorted(self._where.items())}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        text = json.dumps(index, indent=2) + "\n"
        (self._draft / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def _meta(self) -> dict[str, Any]:
        """What our files say of themselves; what the source said of its run is handed on."""
        from crcm_jax.saving import storage

        sizes = {name: getattr(self.model.config, name) for name in self.model.family.sizes}
        if not self.model.layers:
            sizes |= {name: getattr(self.model.config, name) for name in ("mean", "std")}
        run = {key: self.source.meta[key] for key in ("training", "config", "iteration") if self.source.meta.get(key)}
        made = {"model": sizes, "name": self.model.name, "converted_from": self.source.kind}
        return {"format": storage.FORMAT, **run, **made, "sha256": safetensors_file.PLACEHOLDER}
