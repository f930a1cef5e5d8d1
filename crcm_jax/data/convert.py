"""Sets of latents from tars to ArrayRecord files and back, shard by shard, every value as it was."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from crcm_jax.data import array_record_shard, set_manifest, shards
from crcm_jax.data.example import DamagedExample, Example
from crcm_jax.data.shards import SUFFIXES, Shard
from crcm_jax.data.tar_shard import TarWriter
from crcm_jax.errors import UserError


def convert(source: str | Path, folder: Path, kind: str, *, skip_damaged: bool = False) -> tuple[int, int]:
    """Writes the set at `source` as shards of `kind` into `folder`; (examples, damaged ones left out).

    Shards keep their names and appear whole or not at all; the same call goes on where one was stopped. UserError if an
    example is damaged and not to be skipped, or `folder` holds another set.
    """
    found = shards.open_shards(source)
    if not skip_damaged and found.flaws():
        raise UserError(f"{found.flaws()[0]}: mend it, or convert the rest with --skip-damaged")
    settings = {"converted": found.fingerprint(), "format": kind}
    done = set_manifest.claim(folder, settings)
    with tqdm(total=len(found), unit="example", desc=folder.name) as bar:
        for shard in found.shards:
            path = folder / f"{shard.path.stem}{SUFFIXES[kind]}"
            if path.name in done and path.is_file():
                bar.update(len(shard))
                continue
            left_out: dict[str, str] = {}
            draft = path.with_name(f".{path.name}.tmp")
            draft.unlink(missing_ok=True)
            count = _write(draft, kind, _whole(shard, left_out, skip_damaged, bar))
            os.replace(draft, path)
            set_manifest.add(folder, path, count, left_out)
    entries = set_manifest.claim(folder, settings).values()
    return sum(entry["examples"] for entry in entries), sum(len(entry.get("left_out", ())) for entry in entries)


def _whole(shard: Shard, left_out: dict[str, str], skip: bool, bar: tqdm) -> Iterator[Example]:
    for index in range(len(shard)):
        try:
            yield shard.read(index)
        except DamagedExample as error:
            if not skip:
                raise UserError(f"{error}: mend it, or convert the rest with --skip-damaged") from None
            left_out[shard.name(index)] = str(error)
            tqdm.write(f"crcm: left out: {error}", file=sys.stderr)
        bar.update(1)


def _write(path: Path, kind: str, examples: Iterator[Example]) -> int:
    if kind == "array_record":
        return array_record_shard.write(path, examples)
    writer, count = TarWriter(path), 0
    for count, example in enumerate(examples, 1):  # noqa: B007 (the last one is the number of all)
        writer.write(example)
    writer.close()
    return count
