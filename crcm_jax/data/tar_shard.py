"""WebDataset tars of latents, the field's sets as they are (spec causal_rcm 7.4): read at random, and written.

An example is three members of one key: `KEY.latent.pt`, a torch-saved tensor `[channel, frame, height, width]`;
`KEY.embed.pt`, one `[token, channel]`; `KEY.prompt.txt`, text. The endings are known, so a key may hold dots.
PyTorch's axes exist in this file alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from crcm_jax.data import tensor_file, texts
from crcm_jax.data.example import DamagedExample, Example
from crcm_jax.errors import UserError
from crcm_jax.saving.files import is_hidden, refusal
from crcm_jax.saving.reading import pointer_at

SUFFIX = ".tar"
_PARTS = ("latent.pt", "embed.pt", "prompt.txt")
_BLOCK = tarfile.BLOCKSIZE


class TarShard:
    """Random access to a tar's whole examples, by the table of contents that `scan` makes."""

    def __init__(self, path: Path, table: dict[str, Any]):
        self.path = path
        self.keys: list[str] = table["keys"]
        self.flaws: list[str] = table["flaws"]
        self.incomplete: dict[str, str] = table["incomplete"]
        self.aside: dict[str, int] = table["aside"]
        self._spans = np.asarray(table["spans"], np.int64).reshape(-1, len(_PARTS), 2)

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        """What messages call an example."""
        return f"{self.keys[index]} of {self.path}"

    def spans(self, index: int) -> list[tuple[int, int]]:
        """(offset, bytes) of an example's members."""
        return [(offset, length) for offset, length in self._spans[index].tolist()]

    def read(self, index: int) -> Example:
        """DamagedExample where a member is not what it should be."""
        name, spans = self.name(index), self.spans(index)
        try:
            with open(self.path, "rb", buffering=0) as file:
                latents, text, prompt = (_read(file, *span) for span in spans)
        except OSError as error:
            raise DamagedExample(f"{name} cannot be read: {error}") from None
        if sum(map(len, (latents, text, prompt))) != sum(length for _, length in spans):
            raise DamagedExample(f"{name} is cut off: the file became shorter")
        try:
            latents, text = (
                tensor_file.loads(content, f"{part} of {name}") for part, content in zip(_PARTS, (latents, text))
            )
            words = texts.decode(prompt, f"prompt.txt of {name}")
        except UserError as error:
            raise DamagedExample(str(error)) from None
        return Example(self.keys[index], _channels_last(latents), text, words)


def scan(path: Path) -> dict[str, Any]:
    """A tar's table of contents, as JSON. Reads headers alone; no member is left out without a word:

    keys: of its whole examples; spans: offset and bytes of their members one after the other (flat: it is read at each
    start); incomplete: what examples by these keys lack; flaws: what is wrong with the file itself, a few words each;
    aside: how many members of other kinds, by their endings, are not read.
    """
    told = pointer_at(path)
    if told:
        return {"keys": [], "spans": [], "incomplete": {}, "flaws": [told], "aside": {}}
    members, end = _members(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        cut = _read(file, end, 2 * _BLOCK) != bytes(2 * _BLOCK)
    # Seen so: the file goes on, or ends, where a tar would not.
    flaws = [f"is cut off or unreadable from byte {end} of {size} on"] if cut else []
    found: dict[str, dict[str, tuple[int, int] | None]] = {}
    incomplete: dict[str, str] = {}
    aside: Counter[str] = Counter()
    others = []
    for name, span in members:
        folder, _, file = name.rpartition("/")
        part = next((part for part in _PARTS if file.endswith(f".{part}")), None)
        if _is_passed_over(name):
            aside["hidden"] += 1
        elif part is None:
            others.append((folder, file))
        else:
            key = _in_folder(folder, file.removesuffix(f".{part}"))
            if part in found.setdefault(key, {}):
                incomplete[key] = f"has {part} of {key} more than once"
            found[key][part] = span
    for folder, file in others:
        words = file.split(".")
        starts = [".".join(words[:count]) for count in range(1, len(words) + 1)]
        known = [start for start in starts if _in_folder(folder, start) in found]
        if known:
            aside[file.removeprefix(f"{known[-1]}.")] += 1
        else:
            # By WebDataset's rule a key ends at the first dot.
            key = _in_folder(folder, words[0])
            incomplete.setdefault(key, f"has no {' and no '.join(_PARTS[:2])} of {key}, only {file}")
    keys, spans = [], []
    for key, parts in found.items():
        lacking = [part for part in _PARTS[:2] if part not in parts]
        strange = [part for part, span in parts.items() if span is None]
        if lacking or strange:
            told = f"has no {' and no '.join(lacking)} of {key}" if lacking else f"has {strange[0]} of {key} as no file"
            incomplete.setdefault(key, told)
        elif key not in incomplete:
            keys.append(key)
            spans += [number for part in _PARTS for number in parts.get(part) or (0, 0)]
    return {"keys": keys, "spans": spans, "incomplete": incomplete, "flaws": flaws, "aside": dict(aside)}


def _members(path: Path) -> tuple[list[tuple[str, tuple[int, int] | None]], int]:
    """((name, (offset, bytes)) of every member that is whole, and the byte at which they end.

    A hard link, by which tar stores a file that it has stored already, has that one's place. None for what has no bytes
    of its own in one piece: other links, devices, sparse files.
    """
    size, end, places, found = path.stat().st_size, 0, {}, []
    # What is no tar shows in where its members end; some damage is met by exceptions other than the library's own.
    strange = (tarfile.TarError, ValueError, LookupError, OverflowError, EOFError, AttributeError, MemoryError)
    with contextlib.suppress(*strange), tarfile.open(path, "r:") as tar:
        for member in tar:
            plain = member.isreg() and not member.issparse()
            # Sizes with flipped bits have been seen to lead backwards.
            if tar.offset < end or (member.offset_data + member.size if plain else tar.offset) > size:
                break
            end = tar.offset
            if member.isdir():
                continue
            places[member.name] = (member.offset_data, member.size) if plain else None
            if member.islnk():
                places[member.name] = places.get(member.linkname)
            found.append((member.name, places[member.name]))
    return found, end


def _in_folder(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _is_passed_over(name: str) -> bool:
    """Whether a member is hidden, or speaks of the tar itself (WebDataset's `__name__`)."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(map(is_hidden, parts)) or bool(re.fullmatch(r"__.+__(\..*)?", parts[-1] if parts else ""))


def _read(file, offset: int, length: int) -> bytes:
    file.seek(offset)
    content = file.read(length)
    if len(content) < length:
        content += file.read(length - len(content))
    return content


def _channels_last(latents: np.ndarray) -> np.ndarray:
    if latents.ndim != 4:
        return latents
    return np.ascontiguousarray(latents.reshape(len(latents), -1).T).reshape(*latents.shape[1:], -1)


class TarWriter:
    """A tar that grows by whole examples. What an interrupted writer left is gone on with: `keys` are in it already."""

    def __init__(self, path: Path, called: Path | None = None):
        """called: what messages call it, such as the file that it will become.

        UserError if another process is writing it, or it cannot be written; so of the other methods.
        """
        self._path = called or path
        try:
            self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise refusal(self._path, error, path) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {path}: give each a part of its own") from None
        self.keys: set[str] = set()
        end, table = 0, scan(path)
        shard = TarShard(path, table)
        for index, key in enumerate(shard.keys):
            try:
                shard.read(index)
            except DamagedExample:
                break
            self.keys.add(key)
            end = max(offset + -(-length // _BLOCK) * _BLOCK for offset, length in shard.spans(index))
        self._file.truncate(end)
        self._file.seek(end)

    def write(self, example: Example) -> None:
        """Appends an example; it is on the disk when `sync` returns."""
        latents = np.moveaxis(example.latents, -1, 0)
        contents = (tensor_file.dumps(latents), tensor_file.dumps(example.text), example.prompt.encode())
        # The prompt first: it may be missing in sets of others, so an example counts as whole without it.
        for part, content in reversed(list(zip(_PARTS, contents))):
            member = tarfile.TarInfo(f"{example.key}.{part}")
            member.size = len(content)
            self._put(member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % _BLOCK))
        self.keys.add(example.key)

    def sync(self) -> None:
        """Puts all that was written on the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise refusal(self._path, error) from error

    def close(self, *, whole: bool = True) -> None:
        """Closes the file; `whole` writes the mark of its end."""
        try:
            if whole:
                self._put(bytes(2 * _BLOCK))
                self._put(bytes(-self._file.tell() % tarfile.RECORDSIZE))
            self.sync()
        finally:
            # What a full disk has no room for is tried once more, and given up.
            with contextlib.suppress(OSError):
                self._file.close()

    def _put(self, content: bytes) -> None:
        try:
            self._file.write(content)
        except OSError as error:
            raise refusal(self._path, error) from error
