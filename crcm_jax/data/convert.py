"""Sets of latents from tars to ArrayRecord files and back, shard by shard, every value as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from crcm_jax.data import array_record_shard, set_manifest, shards
from crcm_jax.data.example import DamagedExample, Example
from crcm_jax.data.shards import SUFFIXES, Shard
from crcm_jax.data.tar_shard import TarWriter
from crcm_jax.errors import UserError
from crcm_jax.saving.files import atomic


def convert(source: str | Path, folder: Path, kind: str, *, skip_damaged: bool = False) -> tuple[int, int]:
    """Writes the set at `source` as shards of `kind` into `folder`; (examples, damaged or incomplete ones left out).

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
            left_out = _flawed(found, shard)
            with atomic(path, draft=f".{path.name}.tmp") as draft:
                count = _write(draft, path, kind, _whole(shard, left_out, skip_damaged, bar))
            set_manifest.add(folder, path, count, left_out)
    entries = set_manifest.claim(folder, settings).values()
    return sum(entry["examples"] for entry in entries), sum(len(entry.get("left_out", ())) for entry in entries)


def _flawed(found: shards.Shards, shard: Shard) -> dict[str, str]:
    """What a shard's table of contents knows to be lost, by key, each told; what cannot be counted under its name."""
    left_out = dict(shard.incomplete)
    if len(flaws := found.flaws_of(shard)) > len(left_out):
        left_out[shard.path.name] = flaws[0]
    for flaw in left_out.values():
        tqdm.write(f"crcm: left out: {shard.path} {flaw}", file=sys.stderr)
    return left_out


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


def _write(draft: Path, path: Path, kind: str, examples: Iterator[Example]) -> int:
    if kind == "array_record":
        return array_record_shard.write(draft, examples)
    writer, count, whole = TarWriter(draft, called=path), 0, False
    try:
        for count, example in enumerate(examples, 1):  # noqa: B007 (the last one is the number of all)
            writer.write(example)
        whole = True
    finally:
        writer.close(whole=whole)
    return count
