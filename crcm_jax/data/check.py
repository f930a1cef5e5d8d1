"""Reading every byte of a set of latents, and naming what is damaged."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crcm_jax.data import set_manifest, shards
from crcm_jax.data.example import DamagedExample
from crcm_jax.data.shards import Shard


@dataclasses.dataclass(frozen=True)
class Report:
    """examples: whole ones; kinds: how many have each (latents, text) shape and type; damage: a sentence each; aside:
    how much else there is that is not read, by kind."""

    examples: int
    bytes: int
    shards: int
    kinds: dict[str, int]
    damage: list[str]
    aside: dict[str, int]

    def lines(self) -> list[str]:
        """The report as a user reads it."""
        kinds = [f"  {count} × {kind}" for kind, count in sorted(self.kinds.items(), key=lambda item: -item[1])]
        total = f"{self.examples} whole examples in {self.shards} shards, {self.bytes / 1e9:.3g} GB"
        verdict = f"{len(self.damage)} damaged:" if self.damage else "nothing is damaged"
        aside = shards.told_aside(self.aside)
        return [total, *kinds, *([f"  {aside}"] if aside else []), verdict, *(f"  {flaw}" for flaw in self.damage)]


def check(path: str | Path, *, threads: int = 4) -> Report:
    """Reads the set at `path` (a folder or one shard) whole: checksums of files, of members or records, and numbers.

    Every example must be whole, finite and of the shape that most have; shards must be those of the manifest, if there
    is one. UserError if there is no set.
    """
    found = shards.open_shards(path)
    folder = Path(path).expanduser()
    manifest = set_manifest.read(folder) if folder.is_dir() else None
    damage, kinds = list(found.flaws()), Counter[str]()
    odd: dict = {}
    if manifest:
        damage += _against(manifest["shards"], found.shards, folder)
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(found), unit="example", desc="checking") as bar:
        for shard in found.shards:
            if manifest and shard.path.name in manifest["shards"]:
                wanted = manifest["shards"][shard.path.name]["sha256"]
                if set_manifest.digest(shard.path) != wanted:
                    damage.append(f"{shard.path} does not have the checksum in {set_manifest.NAME}")
            for name, kind, flaw in pool.map(lambda i, shard=shard: _look(shard, i), range(len(shard))):
                if flaw:
                    damage.append(flaw)
                else:
                    kinds[kind] += 1
                    odd.setdefault(kind, name)
                bar.update(1)
    usual = max(kinds, key=kinds.__getitem__, default="")
    damage += [f"{odd[kind]} has {kind}, where most have {usual}" for kind in kinds if kind != usual]
    size = sum(shard.path.stat().st_size for shard in found.shards)
    return Report(sum(kinds.values()), size, len(found.shards), dict(kinds), damage, found.aside())


def _look(shard: Shard, index: int) -> tuple[str, str, str | None]:
    """(name, shapes and types, what is wrong)."""
    name = shard.name(index)
    try:
        example = shard.read(index)
    except DamagedExample as error:
        return name, "", str(error)
    flaw = example.flaw()
    latents, text = ("×".join(map(str, x.shape)) + f" {x.dtype}" for x in (example.latents, example.text))
    return name, f"latents {latents}, text {text}", f"{name} {flaw}" if flaw else None


def _against(entries: dict[str, Any], found: list[Shard], folder: Path) -> Iterator[str]:
    present = {shard.path.name: shard for shard in found}
    for name, entry in entries.items():
        if name not in present:
            yield f"{folder / name} is missing"
        elif len(present[name]) != entry["examples"]:
            yield f"{folder / name} has {len(present[name])} whole examples of {entry['examples']}"
    for name in present.keys() - entries.keys():
        yield f"{folder / name} is not in {set_manifest.NAME}: the build was stopped, run it again"
    if any(folder.glob(".*.tmp")):
        yield f"{folder} holds the draft of a shard: a build was stopped, run it again"
