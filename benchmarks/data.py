"""How fast latents are loaded, and how long a training step would wait for them.

    python -m benchmarks.data --path=latents --frames=81 --size=832x480
    python -m benchmarks.data --format=tar,array_record --examples=64 --step=1.0 --batch=8

Without --path it writes a set of random latents of the given size first. It runs the very pipeline that trains, first
as fast as it goes, then with a step of the given length between batches, and says how much of the time the step waited.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from crcm_jax.data import array_record_shard, pipeline, shards
from crcm_jax.data.example import Example
from crcm_jax.data.tar_shard import TarWriter
from crcm_jax.models.vae.config import WanVAEConfig
from crcm_jax.models.vae.wan import WanVAE
from crcm_jax.models.wan.family import COMMON, TOKENS

TEXT = (TOKENS, COMMON["text_dim"])
SHARD = 16


def write_random(folder: Path, kind: str, count: int, latents: tuple[int, ...]) -> None:
    """A set of `count` examples of random numbers, in shards of 16."""
    rng = np.random.default_rng(0)

    def example(index: int) -> Example:
        arrays = (rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for shape in (latents, TEXT))
        return Example(f"{index:09d}", *arrays, f"prompt {index}")

    for start in range(0, count, SHARD):
        examples = map(example, range(start, min(start + SHARD, count)))
        path = folder / f"shard_{start // SHARD:06d}{shards.SUFFIXES[kind]}"
        if kind == "array_record":
            array_record_shard.write(path, examples)
            continue
        writer = TarWriter(path)
        for one in examples:
            writer.write(one)
        writer.close()


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What `main` prints, of one set.

    examples_per_second, mb_per_second (of stored bytes), cpu_ms (of all cores, an example; other work on the machine
    leaves it as it is): at full speed. waiting: the share of the time that steps of `step` seconds waited.
    index_seconds: to open the set.
    """
    began = time.perf_counter()
    found = shards.open_shards(path)
    index_seconds = time.perf_counter() - began
    stored = sum(shard.path.stat().st_size for shard in found.shards) / len(found)
    width, height = options.size
    data = {"name": "latents", "path": str(path), "batch_size": options.batch, "seed": 0, "frames": options.frames,
            "height": height, "width": width, "threads": options.threads, "prefetch": options.prefetch}  # fmt: skip
    text = found[0].text.shape
    config = ConfigDict({"data": data, "text": {"length": text[0]}, "model": {"text_dim": text[1]}})
    codec = WanVAE(WanVAEConfig.wan21())

    stream = iter(pipeline.make(config, codec=codec))
    for _ in range(options.prefetch + 1):
        next(stream)
    began, batches, cpu = time.perf_counter(), 0, time.process_time()
    while time.perf_counter() - began < options.seconds:
        next(stream)
        batches += 1
    rate = batches * options.batch / (time.perf_counter() - began)
    cpu_ms = 1000 * (time.process_time() - cpu) / (batches * options.batch)

    stream, waits = iter(pipeline.make(config, codec=codec)), []
    next(stream)
    for _ in range(max(3, round(options.seconds / options.step))):
        time.sleep(options.step)
        began = time.perf_counter()
        next(stream)
        waits.append(time.perf_counter() - began)
    share = sum(waits) / (sum(waits) + options.step * len(waits))
    return {
        "examples_per_second": rate, "mb_per_second": rate * stored / 1e6, "mb_per_example": stored / 1e6,
        "cpu_ms": cpu_ms, "step": options.step, "waiting": share, "longest_wait": max(waits),
        "index_seconds": index_seconds,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        "python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--path", type=Path, help="a set of latents [write one of random numbers]")
    add("--format", default="tar,array_record", help="of the random sets [%(default)s]")
    add("--examples", type=int, default=64, help="of a random set [%(default)s]")
    add("--frames", type=int, default=81, help="[%(default)s]")
    add("--size", type=lambda text: tuple(map(int, text.split("x"))), default=(832, 480), help="pixels [832x480]")
    add("--batch", type=int, default=1, help="[%(default)s]")
    add("--threads", type=int, default=2, help="data.threads [%(default)s]")
    add("--prefetch", type=int, default=4, help="data.prefetch [%(default)s]")
    add("--step", type=float, default=1.0, help="seconds that a training step takes [%(default)s]")
    add("--seconds", type=float, default=10.0, help="of each measurement [%(default)s]")
    options = p.parse_args(argv)
    print(f"{platform.machine()}, {os.cpu_count()} cores; batch {options.batch}, {options.threads} threads")
    print("| set | MB/example | examples/s | MB/s | CPU ms/example | step s | waiting | longest wait s | opening s |")
    print("|---|---|---|---|---|---|---|---|---|")

    def row(name: str, path: Path) -> None:
        m = measure(path, options)
        print(
            f"| {name} | {m['mb_per_example']:.2f} | {m['examples_per_second']:.1f} | {m['mb_per_second']:.0f} | "
            f"{m['cpu_ms']:.1f} | "
            f"{m['step']:g} | {m['waiting']:.2%} | {m['longest_wait']:.4f} | {m['index_seconds']:.2f} |",
            flush=True,
        )

    if options.path:
        row(str(options.path), options.path)
        return
    latents = WanVAE(WanVAEConfig.wan21()).latent_shape(options.frames, *reversed(options.size))
    for kind in tqdm(options.format.split(","), desc="sets", disable=None):
        with tempfile.TemporaryDirectory() as folder:
            write_random(Path(folder), kind, options.examples, latents)
            row(kind, Path(folder))


if __name__ == "__main__":
    main()
