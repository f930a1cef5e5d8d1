"""Safetensors files, read by slices and written in place, with every flaw named.

The format: eight bytes of header length, a JSON header of names, types, shapes and byte ranges, then the bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crcm_jax.convert.arrays import WIDTHS, Spec, raw
from crcm_jax.errors import UserError
from crcm_jax.saving.reading import refuse_pointer

_LONGEST_HEADER = 100 << 20
PLACEHOLDER = "0" * 64
"""What `metadata` holds in place of the digest until `Writer.seal`."""


class Reader:
    """A file's tensors. `specs` and `metadata` come from the header; UserError if the file is not whole."""

    def __init__(self, path: Path):
        self.path = path
        refuse_pointer(path)
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise self._flaw("its header is cut off or was never one")
            text = file.read(length)
        try:
            header = json.loads(text, object_pairs_hook=self._unique)
            self.metadata = dict(header.pop("__metadata__", {}))
            self.specs = {name: self._spec(name, entry) for name, entry in header.items()}
            spans = {name: self._span(entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise self._flaw("its header is not readable") from None
        self._start = {name: 8 + length + begin for name, (begin, _) in spans.items()}
        reached = 0
        for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
            if end - begin != self.specs[name].nbytes:
                raise self._flaw(f"{name} has {end - begin} bytes for {self.specs[name].nbytes}")
            if begin != reached:
                raise self._flaw(f"the bytes of {name} overlap others or leave a gap")
            reached = end
        if 8 + length + reached != size:
            raise self._flaw(f"it has {size} bytes of {8 + length + reached}")

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The raw elements of a tensor, or of `rows` (first, end) of its first axis."""
        dtype, shape = self.specs[name]
        start = self._start[name]
        if rows is not None:
            start += Spec(dtype, (rows[0], *shape[1:])).nbytes
            shape = (rows[1] - rows[0], *shape[1:])
        count = int(np.prod(shape, dtype=np.int64))
        array = np.fromfile(self.path, raw(dtype), count, offset=start)
        if array.size != count:
            raise self._flaw("it became shorter while it was read")
        return array.reshape(shape)

    def _spec(self, name: str, entry: dict[str, Any]) -> Spec:
        if entry["dtype"] not in WIDTHS:
            raise UserError(
                f"{self.path} holds {name} as {entry['dtype']!r}, a type that cannot be read: get the weights as "
                "bfloat16, float16 or float32"
            )
        return Spec(entry["dtype"], tuple(int(n) for n in entry["shape"]))

    @staticmethod
    def _span(entry: dict[str, Any]) -> tuple[int, int]:
        begin, end = entry["data_offsets"]
        return int(begin), int(end)

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise self._flaw(f"it names {twice} twice")
        return dict(pairs)

    def _flaw(self, what: str) -> UserError:
        return UserError(f"{self.path} is not a whole .safetensors file ({what}): fetch it again or restore it")


class Writer:
    """A file of known tensors whose slices arrive in any order; every byte is on disk after `close`."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]):
        self.path, self.specs = path, dict(specs)
        # Widest elements first: every tensor then lies at a multiple of its element's width.
        names = sorted(specs, key=lambda name: (-WIDTHS[specs[name].dtype], name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end, starts = 0, {}
        for name in names:
            starts[name], end = end, end + specs[name].nbytes
            header[name] = {"dtype": specs[name].dtype, "shape": specs[name].shape, "data_offsets": [starts[name], end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.starts = {name: 8 + len(text) + start for name, start in starts.items()}
        self._header = text
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        # All of it now, so that a full disk is found before the work.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file, 0, 8 + len(text) + end)
        else:
            os.truncate(self._file, 8 + len(text) + end)
        os.pwrite(self._file, struct.pack("<Q", len(text)) + text, 0)

    def write(self, name: str, block: np.ndarray, offset: int) -> None:
        """Contiguous raw elements, at `offset` bytes from the tensor's start."""
        view = block.data.cast("B") if block.size else memoryview(b"")
        place = self.starts[name] + offset
        while view:
            done = os.pwrite(self._file, view, place)
            view, place = view[done:], place + done

    def seal(self) -> None:
        """Replaces `PLACEHOLDER` in the header by the SHA-256 of the tensors' bytes in the order of names."""
        digest = hashlib.sha256()
        for name in sorted(self.specs):
            place, left = self.starts[name], self.specs[name].nbytes
            while left:
                piece = os.pread(self._file, min(left, 1 << 20), place)
                digest.update(piece)
                place, left = place + len(piece), left - len(piece)
        at = self._header.index(PLACEHOLDER.encode())
        os.pwrite(self._file, digest.hexdigest().encode(), 8 + at)

    def close(self) -> None:
        """Flushes to disk."""
        if self._file >= 0:
            os.fsync(self._file)
            self.discard()

    def discard(self) -> None:
        """Closes the file as it is."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
