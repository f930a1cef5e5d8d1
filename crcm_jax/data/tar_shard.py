"""WebDataset tars of latents, the field's sets as they are (spec causal_rcm 7.4): read at random, and written.

An example is three members of one key: `KEY.latent.pt`, a torch-saved tensor `[channel, frame, height, width]`;
`KEY.embed.pt`, one `[token, channel]`; `KEY.prompt.txt`, UTF-8. PyTorch's axes exist in this file alone.
"""

from __future__ import annotations

import fcntl
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from crcm_jax.data import tensor_file
from crcm_jax.data.example import DamagedExample, Example
from crcm_jax.errors import UserError

SUFFIX = ".tar"
_PARTS = ("latent.pt", "embed.pt", "prompt.txt")
_BLOCK = tarfile.BLOCKSIZE


class TarShard:
    """Random access to a tar's whole examples, by the table of contents that `scan` makes."""

    def __init__(self, path: Path, table: dict[str, Any]):
        self.path = path
        self.keys: list[str] = table["keys"]
        self.flaws: list[str] = table["flaws"]
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
            words = prompt.decode()
        except UnicodeDecodeError:
            raise DamagedExample(f"prompt.txt of {name} is not UTF-8") from None
        except UserError as error:
            raise DamagedExample(str(error)) from None
        return Example(self.keys[index], _channels_last(latents), text, words)


def scan(path: Path) -> dict[str, Any]:
    """A tar's table of contents, as JSON: `keys` of its whole examples, `spans`, offset and bytes of their members one
    after the other (flat: it is read at each start), and `flaws`, what else is wrong with the file, a few words each.
    Reads headers alone."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    flaws, size = [], path.stat().st_size
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    break
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                folder, _, file = member.name.rpartition("/")
                key, _, part = file.partition(".")
                if member.isreg() and part in _PARTS:
                    members.setdefault(f"{folder}/{key}" if folder else key, {})[part] = member.offset_data, member.size
    except tarfile.TarError:
        # Seen below: the file goes on, or ends, where a tar would not.
        pass
    with open(path, "rb") as file:
        if _read(file, end, 2 * _BLOCK) != bytes(2 * _BLOCK):
            flaws.append(f"is cut off or unreadable from byte {end} of {size} on")
    keys, spans = [], []
    for key, parts in members.items():
        lacking = [part for part in _PARTS[:2] if part not in parts]
        if lacking:
            flaws.append(f"has no {' and no '.join(lacking)} of {key}")
        else:
            keys.append(key)
            spans += [number for part in _PARTS for number in parts.get(part, (0, 0))]
    return {"keys": keys, "spans": spans, "flaws": flaws}


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

    def __init__(self, path: Path):
        """UserError if another process is writing it."""
        self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
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
            self._file.write(member.tobuf(tarfile.GNU_FORMAT))
            self._file.write(content)
            self._file.write(bytes(-len(content) % _BLOCK))
        self.keys.add(example.key)

    def sync(self) -> None:
        """Puts all that was written on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, *, whole: bool = True) -> None:
        """Closes the file; `whole` writes the mark of its end."""
        if whole:
            self._file.write(bytes(2 * _BLOCK))
            self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
        self.sync()
        self._file.close()
