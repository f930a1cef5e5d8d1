"""What makes a folder trustworthy: a list of its files with sizes and checksums, written last.

A folder without a manifest was never finished; one whose files differ from it was damaged afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from crcm_jax.saving.files import write_text

NAME = "manifest.json"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)


def _digest(path: Path, *, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(paths: list[Path], *, sync: bool = False) -> list[str]:
    # Hashing releases the interpreter lock: a few threads keep up with a disk.
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda path: _digest(path, sync=sync), paths))


def seal(folder: Path) -> None:
    """Declares `folder` whole: flushes every file to disk, then writes the manifest."""
    paths = _files(folder)
    digests = _digests(paths, sync=True)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests)
    }
    write_text(folder / NAME, json.dumps({"files": files}, indent=1))


def is_sealed(folder: Path) -> bool:
    """Whether `folder` was finished once (it may have been damaged since)."""
    return (folder / NAME).is_file()


def damage(folder: Path) -> str | None:
    """None if every byte is as it was sealed, else what is wrong, in a few words. Reads every file."""
    try:
        files = _entries(json.loads((folder / NAME).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return "was never finished"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"has an unreadable {NAME}"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != entry["bytes"]:
            return f"has {path.stat().st_size} of {entry['bytes']} bytes in {name}"
    for (name, entry), digest in zip(files.items(), _digests([folder / name for name in files])):
        if digest != entry["sha256"]:
            return f"has altered bytes in {name}"
    return None


def _entries(content: Any) -> dict[str, dict[str, Any]]:
    """The manifest's files; an exception of any kind where they are not what `seal` has written."""
    found = {}
    for name, entry in content["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(entry["bytes"], int):
            raise ValueError(name)
        found[name] = {"bytes": entry["bytes"], "sha256": str(entry["sha256"])}
    return found


def discard(folder: Path) -> None:
    """Deletes a folder; first its manifest, so that what a crash leaves behind does not pass for whole."""
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)
