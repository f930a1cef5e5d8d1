"""A folder of latents: its shards, tars or ArrayRecord files, as one sequence of examples.

Tars have no table of contents, so one is made of each, once, and kept in `.index.json` beside them (where that cannot
be written, in the user's cache). A tar whose size or time of change is another one than the index says is read anew.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import operator
import os
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from crcm_jax.data import array_record_shard, set_manifest, tar_shard
from crcm_jax.data.array_record_shard import ArrayRecordShard
from crcm_jax.data.example import Example
from crcm_jax.data.tar_shard import TarShard
from crcm_jax.errors import UserError
from crcm_jax.saving.files import is_hidden, visible, write_text

INDEX = ".index.json"
_INDEX_FORMAT = 2
SUFFIXES = {"tar": tar_shard.SUFFIX, "array_record": array_record_shard.SUFFIX}


class Shard(Protocol):
    """A file of examples. flaws: what is wrong with the file itself, a few words each; incomplete: what examples that
    are not counted lack, by their keys; aside: how much else in the file is not read, by kind."""

    path: Path
    flaws: list[str]
    incomplete: dict[str, str]
    aside: dict[str, int]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> Example: ...


class Shards(Sequence):
    """The examples of several shards, one after the other.

    hidden: files that were passed over; empty: names of shards that are known to hold no example.
    """

    def __init__(self, shards: Sequence[Shard], hidden: Sequence[Path] = (), empty: Collection[str] = ()):
        self.shards = list(shards)
        self.hidden, self._empty = list(hidden), empty
        self._ends = list(itertools.accumulate(map(len, self.shards)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # one at a time, never a slice
        """DamagedExample if it cannot be used."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return self.shards[shard].read(index - (self._ends[shard] - len(self.shards[shard])))

    def flaws(self) -> list[str]:
        """What is wrong with the files themselves, a sentence's beginning each: nothing that they hold is left out
        without one."""
        return [f"{shard.path} {flaw}" for shard in self.shards for flaw in self.flaws_of(shard)]

    def flaws_of(self, shard: Shard) -> list[str]:
        """`flaws` of one of the shards, without its name."""
        told = [*shard.flaws, *shard.incomplete.values()]
        if not told and not len(shard) and shard.path.name not in self._empty:
            told = ["holds no examples"]
        return told

    def aside(self) -> dict[str, int]:
        """How much besides examples is not read, by kind."""
        return dict(sum((Counter(shard.aside) for shard in self.shards), Counter({"hidden": len(self.hidden)})))

    def fingerprint(self) -> str:
        """The same for sets in which every index means the same example, wherever they lie."""
        lines = "\n".join(f"{shard.path.stem} {len(shard)}" for shard in self.shards)
        return hashlib.sha256(lines.encode()).hexdigest()[:16]


def told_aside(aside: dict[str, int]) -> str:
    """`Shards.aside` in a few words, "" for nothing."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(aside.items()) if count)
    return f"not read: {kinds}" if kinds else ""


def find(path: str | Path) -> list[Path]:
    """The shards that `path` means: a file, or those of a folder, in the order of their names.

    UserError if there are none, or of both kinds.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix in SUFFIXES.values():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no {path}: give a folder of .tar or .array_record files of latents")
    found = {kind: visible(path.glob(f"*{suffix}")) for kind, suffix in SUFFIXES.items()}
    kinds = [kind for kind, files in found.items() if files]
    if not kinds:
        raise UserError(f"{path} holds no .tar and no .array_record files: crcm data build makes them")
    if len(kinds) > 1:
        raise UserError(f"{path} holds both .tar and .array_record files: keep each kind in a folder of its own")
    return found[kinds[0]]


def open_shards(path: str | Path) -> Shards:
    """All the examples that `path` means (see `find`)."""
    files, folder = find(path), Path(path).expanduser()
    about: dict[str, Any] = {}
    if folder.is_dir():
        hidden = [file for suffix in SUFFIXES.values() for file in folder.glob(f"*{suffix}") if is_hidden(file)]
        about = {"hidden": hidden, "empty": set_manifest.empty_shards(folder)}
    if files[0].suffix == tar_shard.SUFFIX:
        return Shards([TarShard(file, table) for file, table in zip(files, _tables(files))], **about)
    return Shards([ArrayRecordShard(file) for file in files], **about)


def _tables(tars: list[Path]) -> list[dict[str, Any]]:
    """The table of contents of each tar, from the index where it still holds."""
    beside, cached = _index_files(tars[0].parent)
    known = _load(beside) or _load(cached) or {}
    tables: dict[str, Any] = {tar.name: known.get(tar.name) for tar in tars}
    stale = []
    for tar in tars:
        stamp, table = _stamp(tar), tables[tar.name]
        if table is None or (table["bytes"], table["changed"]) != stamp:
            stale.append(tar)
    if stale:
        with ThreadPoolExecutor(8) as pool:
            # Small sets are done before a bar could be read.
            bar = tqdm(stale, desc="indexing", unit="tar", disable=len(stale) < 8)
            for tar, table in zip(bar, pool.map(_table, stale)):
                tables[tar.name] = table
        text = _dump({**known, **tables})
        try:
            write_text(beside, text)
        except UserError:
            write_text(cached, text)
    return [tables[tar.name] for tar in tars]


def _table(tar: Path) -> dict[str, Any]:
    bytes_, changed = _stamp(tar)
    return {"bytes": bytes_, "changed": changed, **tar_shard.scan(tar)}


def _stamp(tar: Path) -> tuple[int, int]:
    stat = tar.stat()
    return stat.st_size, stat.st_mtime_ns


def _index_files(folder: Path) -> tuple[Path, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return folder / INDEX, cache / "crcm" / f"{name}.json"


def _load(index: Path) -> dict[str, Any] | None:
    """An index's tables; None for one that is missing, damaged or of another format: it is made anew."""
    try:
        head, _, tars = index.read_text(encoding="utf-8").partition("\n")
        about = json.loads(head)
        whole = about["format"] == _INDEX_FORMAT and about["sha256"] == _digest(tars)
        return json.loads(tars) if whole else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _dump(tables: dict[str, Any]) -> str:
    """An index: a line that says how to read the next one, and whether it is as it was written."""
    tars = json.dumps(tables)
    return json.dumps({"format": _INDEX_FORMAT, "sha256": _digest(tars)}) + "\n" + tars


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
