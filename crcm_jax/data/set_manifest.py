"""A set's `manifest.json`: how it was made, and of each finished shard the examples, bytes and checksum.

It is written anew after each shard, under a lock, so that several processes can build one set in a shared folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crcm_jax.errors import UserError
from crcm_jax.saving.files import visible, write_text

NAME = "manifest.json"
_LOCK = ".manifest.lock"
_FORMAT = 1


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest (`settings`, `shards`), or None where there is none. UserError if it cannot be read."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if content["format"] == _FORMAT and isinstance(content["settings"], dict) and _are_entries(content["shards"]):
            return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{folder / NAME} is damaged or of another program: remove it, or restore it from a copy")


def _are_entries(shards: Any) -> bool:
    types = {"examples": int, "bytes": int, "sha256": str}
    return all(isinstance(entry[name], kind) for entry in shards.values() for name, kind in types.items()) and all(
        isinstance(entry.get("left_out", {}), dict) for entry in shards.values()
    )


def empty_shards(folder: Path) -> set[str]:
    """Names of the shards that the manifest, if there is a readable one, says hold no example: all were left out."""
    try:
        found = read(folder) or {"shards": {}}
    except UserError:
        return set()
    return {name for name, entry in found["shards"].items() if not entry["examples"]}


def claim(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Makes the folder this build's, or finds that it is; returns the shards done so far.

    UserError if it was begun with other settings, or holds shards that no manifest speaks of.
    """
    settings = json.loads(json.dumps(settings))
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        found = read(folder)
        if found is None:
            if visible([*folder.glob("*.tar"), *folder.glob("*.array_record")]):
                raise UserError(f"{folder} holds a set that no {NAME} speaks of: write to a new folder")
            _write(folder, settings, {})
            return {}
    for key in sorted({*settings, *found["settings"]}):
        now, before = settings.get(key), found["settings"].get(key)
        if now != before:
            raise UserError(f"{folder} was begun with {key} {before!r} and not {now!r}: write to a new folder")
    return found["shards"]


def add(folder: Path, shard: Path, examples: int, left_out: dict[str, str]) -> None:
    """Enters a finished shard; `left_out` says of what is missing in it why, by key."""
    entry = {"examples": examples, "bytes": shard.stat().st_size, "sha256": digest(shard)}
    with _locked(folder):
        found = read(folder) or {"settings": {}, "shards": {}}
        shards = found["shards"] | {shard.name: entry | ({"left_out": left_out} if left_out else {})}
        _write(folder, found["settings"], dict(sorted(shards.items())))


def digest(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, settings: dict[str, Any], shards: dict[str, Any]) -> None:
    total = {name: sum(entry[name] for entry in shards.values()) for name in ("examples", "bytes")}
    content = {"format": _FORMAT, "settings": settings, "total": total, "shards": shards}
    write_text(folder / NAME, json.dumps(content, indent=1, ensure_ascii=False))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / _LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
