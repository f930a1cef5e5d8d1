"""Safetensors files read by slices, so that nobody holds more of one than needed, and held against their checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import safe_open

from crcm_jax.errors import UserError
from crcm_jax.saving.reading import refuse_pointer, words

TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
    "U8": np.uint8, "BOOL": np.bool_, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
"""The format's names of element types."""

_AT_ONCE = 16 << 20


class Stored(NamedTuple):
    """Where a tensor lies in its file. start: the byte at which it begins."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile:
    """What a file holds, by name, and what it says of itself. Opened, nothing but its header is read.

    UserError, one sentence, for a file that is not whole, a large-file pointer, or element types unknown here.
    """

    def __init__(self, path: Path):
        self.path = path
        refuse_pointer(path)
        try:
            with safe_open(path, framework="numpy") as file:  # finds every flaw of the header
                metadata = file.metadata() or {}
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self.meta: dict[str, Any] = dict(json.loads(metadata.get("crcm", "{}")).items())
            self.tensors = {name: self._stored(name, entry, 8 + length) for name, entry in header.items()}
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{path} is not a whole .safetensors file ({words(error, path)}): restore it from a copy"
            ) from error

    def _stored(self, name: str, entry: dict[str, Any], data: int) -> Stored:
        if entry["dtype"] not in TYPES:
            raise UserError(f"{name} in {self.path} is of type {entry['dtype']}: only {', '.join(TYPES)} are read")
        begin, end = entry["data_offsets"]
        return Stored(np.dtype(TYPES[entry["dtype"]]), tuple(entry["shape"]), data + begin, end - begin)

    def read(self, name: str, piece: Any = ..., dtype: Any = None) -> np.ndarray:
        """A copy of a tensor's `piece` (an index), in `dtype` (default: its own); no other part of it is read."""
        stored = self.tensors[name]
        if not stored.nbytes:
            return np.zeros(stored.shape, dtype or stored.dtype)[piece]
        mapped = np.memmap(self.path, stored.dtype, "r", stored.start, stored.shape)
        return np.array(mapped[piece], dtype or stored.dtype)

    def digest(self) -> str:
        """SHA-256 of all tensors' bytes in the order of their names, read piece by piece."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            for name in sorted(self.tensors):
                stored = self.tensors[name]
                file.seek(stored.start)
                for left in range(stored.nbytes, 0, -_AT_ONCE):
                    digest.update(file.read(min(left, _AT_ONCE)))
        return digest.hexdigest()

    def require_unaltered(self) -> None:
        """UserError if the file names a checksum and has another one."""
        if self.meta.get("sha256") not in (None, self.digest()):
            raise UserError(f"{self.path} has altered bytes: restore it from a copy or use another one")


def digest_of(named: Iterable[tuple[str, np.ndarray]]) -> str:
    """What `TensorFile.digest` is of a file with these tensors."""
    digest = hashlib.sha256()
    for _, value in sorted(named, key=lambda item: item[0]):
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
