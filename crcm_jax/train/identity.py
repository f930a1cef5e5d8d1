"""Which run a workdir belongs to: its configuration beside its checkpoints, and a lock while one process trains."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from crcm_jax.errors import UserError
from crcm_jax.parallel import processes
from crcm_jax.saving import manifest

HARMLESS = (
    *("train.", "sample."),  # how long, how often it saves, logs and samples
    *("mesh.", "model.remat", "model.attention", "dmd.gather_once"),  # the same numbers to rounding
    *("data.threads", "data.prefetch"),  # the same examples in the same order
    *("data.path",),  # a set that was moved; the data's own state tells whether it is the same
)
"""What may change in the configuration of a run that goes on. Not `optim.accumulate`: each microbatch has draws of its
own."""

NAME = "config.json"


def as_json(config) -> dict[str, Any]:
    """A ConfigDict (or dict) as it reads back from JSON: tuples become lists."""
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.loads(json.dumps(plain, default=str))


def flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def difference(old: dict[str, Any], new: dict[str, Any], harmless: tuple[str, ...] = HARMLESS) -> str | None:
    """The first configuration key that matters and differs, as "key is A there and B here"; None if there is none."""
    old, new = dict(flatten(old)), dict(flatten(new))
    for key in sorted(old.keys() | new.keys(), key=lambda key: (key != "training", key)):
        if key.startswith(harmless):
            continue
        if key not in old:
            return f"{key} is {new[key]!r} here and unknown there"
        if key not in new:
            return f"{key} is {old[key]!r} there and unknown here"
        if old[key] != new[key]:
            return f"{key} is {old[key]!r} there and {new[key]!r} here"
    return None


def require_same(config) -> None:
    """UserError unless every process of the run has this configuration, to the last key."""
    mine = as_json(config)
    for index, text in enumerate(processes.gather(json.dumps(mine))):
        changed = difference(json.loads(text), mine, harmless=())
        if changed:
            raise UserError(f"process {index} was started with another configuration: {changed}; start all alike")


def claim(workdir: Path, config, ours: tuple[str, ...]) -> IO:
    """Makes `workdir` this run's and returns the open lock file, which holds it until closed or the process ends.

    `ours` names what a run's work lies in: where there is none yet, any configuration may take over. UserError if the
    work is another run's, or another process trains there now.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file: --workdir must name a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / ".lock", "a")  # noqa: SIM115 (it stays open as long as the run)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(
            f"another process is training in {workdir} now: wait for it or choose another --workdir"
        ) from None
    path, new = workdir / NAME, as_json(config)
    work = [name for name in ours if _holds_something(workdir / name)]
    try:
        if work:
            _compare(path, new, work[0])
        manifest.write_text(path, json.dumps(new, indent=1))
    except BaseException:
        lock.close()
        raise
    return lock


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0


def _compare(path: Path, new: dict[str, Any], work: str) -> None:
    workdir = path.parent
    if not path.exists():
        raise UserError(
            f"{workdir} holds {work} but no {NAME} that says which run it is from: choose another --workdir"
        )
    try:
        old = dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path} is not readable as JSON: restore it, or choose another --workdir") from None
    changed = difference(old, new)
    if changed:
        raise UserError(
            f"{workdir} holds another run: {changed}; choose another --workdir, or the old value to go on with it"
        )
