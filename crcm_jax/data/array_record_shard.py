"""ArrayRecord files of latents: each record an example as `example.to_record` writes it.

The container gives random access and checks what it reads, so a flipped bit is found. Records are neither compressed
(latents and embeddings hardly get smaller) nor grouped.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

import grain

from crcm_jax.data.example import DamagedExample, Example, from_record, to_record
from crcm_jax.errors import need
from crcm_jax.saving.reading import pointer_at

SUFFIX = ".array_record"
_OPTIONS = "group_size:1,uncompressed"


class ArrayRecordShard:
    """Random access to a file's examples. One that cannot be opened has none, and says so in `flaws`."""

    def __init__(self, path: Path):
        self.path = path
        self.flaws: list[str] = []
        self.incomplete: dict[str, str] = {}
        self.aside: dict[str, int] = {}
        self._records = []
        told = pointer_at(path)
        if told:
            self._count = 0
            self.flaws.append(told)
            return
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(path)])
            self._count = len(self._records)
        except (RuntimeError, ValueError, OSError) as error:
            self._count = 0
            self.flaws.append(f"cannot be opened as ArrayRecord ({_first_line(error)})")

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """What messages call an example."""
        return f"record {index} of {self.path}"

    def read(self, index: int) -> Example:
        """DamagedExample where the record is not what it should be."""
        try:
            record = self._records[index]
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            raise DamagedExample(f"{self.name(index)} cannot be read ({_first_line(error)})") from None
        return from_record(record, self.name(index))


def write(path: Path, examples: Iterable[Example]) -> int:
    """Writes a new file, all of it on the disk when this returns; returns the number of examples. OSError if the disk
    is full, or gives back something else."""
    module = need("array_record.python.array_record_module", extra="data")
    count = 0
    try:
        with contextlib.closing(module.ArrayRecordWriter(str(path), _OPTIONS)) as writer:
            for example in examples:
                writer.write(to_record(example))
                count += 1
    except RuntimeError as error:
        full = "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, _first_line(error), str(path)) from None
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    if len(ArrayRecordShard(path)) != count:
        raise OSError(errno.EIO, "it does not hold what was written", str(path))
    return count


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
