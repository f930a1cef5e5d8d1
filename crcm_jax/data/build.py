"""Building a set of latents: shards that appear whole or not at all, by any number of processes, stopped at any moment.

What makes the examples (videos through an autoencoder, a teacher's samples) is a `Maker`; this file only knows jobs,
shards and the manifest. A shard grows in a hidden draft, a tar whatever the format, because a tar can be gone on with.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from crcm_jax.data import array_record_shard, set_manifest, tar_shard
from crcm_jax.data.array_record_shard import ArrayRecordShard
from crcm_jax.data.example import Example
from crcm_jax.data.shards import SUFFIXES
from crcm_jax.data.tar_shard import TarShard, TarWriter
from crcm_jax.saving.files import atomic


@dataclasses.dataclass(frozen=True)
class Job:
    """One example to be made. index: its place in the whole set; video, clip: where its frames come from, if any."""

    index: int
    prompt: str
    video: Path | None = None
    clip: int = 0

    @property
    def key(self) -> str:
        return f"{self.index:09d}"


Made = Example | str
"""An example, or why there is none, in a few words."""


class Maker(Protocol):
    """batch: jobs that are made together."""

    batch: int

    def prepare(self, jobs: Sequence[Job]) -> Any:
        """What can be done beforehand, in another thread, while the batch before is made."""

    def make(self, jobs: Sequence[Job], prepared: Any) -> list[Made]: ...


def build(
    folder: Path,
    jobs: Sequence[Job],
    maker: Callable[[], Maker],
    *,
    settings: dict[str, Any],
    kind: str = "tar",
    shard_size: int = 256,
    part: tuple[int, int] = (0, 1),
) -> tuple[int, int]:
    """Makes the examples of `jobs`, `shard_size` a shard, in `folder`; (made, left out), counted over the whole set.

    What is there already is kept: the same call goes on where one was stopped. `part` (i, n): of every n shards this
    process makes one. `maker` is called once there is something to do. `settings` describe the set; UserError if the
    folder was begun with others.
    """
    settings = settings | {"format": kind, "shard_size": shard_size, "jobs": len(jobs)}
    done = set_manifest.claim(folder, settings)
    mine = range(part[0], -(-len(jobs) // shard_size), part[1])
    made: Maker | None = None
    with tqdm(total=sum(len(_jobs_of(jobs, s, shard_size)) for s in mine), unit="clip", desc=folder.name) as bar:
        for number in mine:
            todo = _jobs_of(jobs, number, shard_size)
            path = folder / f"shard_{number:06d}{SUFFIXES[kind]}"
            left_out: dict[str, str] = {}
            if path.is_file():
                bar.update(len(todo))
                # Of a build that was stopped between the shard's last byte and its entry in the manifest.
                for draft in _drafts(path):
                    draft.unlink(missing_ok=True)
                if path.name in done:
                    continue
            else:
                made = made or maker()
                left_out = _fill(path, todo, made, bar)
                _finish(path, kind)
            shard = ArrayRecordShard(path) if kind == "array_record" else TarShard(path, tar_shard.scan(path))
            if not left_out and len(shard) < len(todo):
                keys = {shard.read(i).key for i in range(len(shard))}
                left_out = {job.key: "not known" for job in todo if job.key not in keys}
            set_manifest.add(folder, path, len(shard), left_out)
    shards = set_manifest.claim(folder, settings).values()
    return sum(entry["examples"] for entry in shards), sum(len(entry.get("left_out", ())) for entry in shards)


def _jobs_of(jobs: Sequence[Job], shard: int, size: int) -> Sequence[Job]:
    return jobs[shard * size : (shard + 1) * size]


def _drafts(path: Path) -> tuple[Path, Path]:
    """The tar in which a shard's examples gather, and the shard itself in another format before it is whole."""
    return path.with_name(f".{path.stem}.tar.tmp"), path.with_name(f".{path.name}.half.tmp")


def _fill(path: Path, jobs: Sequence[Job], maker: Maker, bar: tqdm) -> dict[str, str]:
    """Makes what the draft of shard `path` lacks, and finishes it; what could not be made and why, by key."""
    writer, left_out = TarWriter(_drafts(path)[0], called=path), {}
    todo = [job for job in jobs if job.key not in writer.keys]
    bar.update(len(jobs) - len(todo))
    whole = False
    try:
        batches = [todo[start : start + maker.batch] for start in range(0, len(todo), maker.batch)]
        for batch, prepared in zip(batches, _ahead(maker.prepare, batches)):
            for job, made in zip(batch, maker.make(batch, prepared)):
                if isinstance(made, Example):
                    writer.write(made)
                else:
                    left_out[job.key] = made
                    tqdm.write(f"crcm: left out {job.key} ({job.video or job.prompt}): {made}", file=sys.stderr)
            writer.sync()
            bar.update(len(batch))
        whole = True
    finally:
        writer.close(whole=whole)
    return left_out


def _finish(path: Path, kind: str) -> None:
    """The draft's examples as the shard `path`, whole or not at all."""
    draft, half = _drafts(path)
    if kind == "tar":
        os.replace(draft, path)
        return
    shard = TarShard(draft, tar_shard.scan(draft))
    with atomic(path, draft=half.name) as whole:
        array_record_shard.write(whole, (shard.read(i) for i in range(len(shard))))
    draft.unlink()


def _ahead(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`map`, one item ahead in another thread."""
    with ThreadPoolExecutor(1) as pool:
        futures = [pool.submit(function, item) for item in items[:1]]
        for item in items[1:]:
            futures.append(pool.submit(function, item))
            yield futures.pop(0).result()
        for future in futures:
            yield future.result()
