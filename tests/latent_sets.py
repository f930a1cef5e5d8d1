"""Small sets of latents, written as the field writes them, for tests."""

import ml_dtypes
import numpy as np

from crcm_jax.data import array_record_shard
from crcm_jax.data.example import Example
from crcm_jax.data.tar_shard import TarWriter

LATENTS, TEXT = (3, 2, 4, 5), (6, 8)
"""Channels-last latents and text; no two axes of latents alike."""


def example(index: int, latents=LATENTS, text=TEXT, dtype=ml_dtypes.bfloat16) -> Example:
    rng = np.random.default_rng(index)
    draw = lambda shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    return Example(f"{index:09d}", draw(latents), draw(text), f"prompt number {index}, ünïcode")


def write(folder, count=12, shard=4, kind="tar", **shapes):
    """`count` examples in shards of `shard`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, shard):
        examples = [example(i, **shapes) for i in range(start, min(start + shard, count))]
        path = folder / f"shard_{start // shard:06d}.{kind}"
        if kind == "array_record":
            array_record_shard.write(path, examples)
            continue
        path.unlink(missing_ok=True)
        writer = TarWriter(path)
        for one in examples:
            writer.write(one)
        writer.close()
    return folder


def same(a: Example, b: Example, key=True) -> bool:
    arrays = all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in ((a.latents, b.latents), (a.text, b.text))
    )
    return arrays and a.prompt == b.prompt and (not key or a.key == b.key)


def flip(path, needle: bytes):
    """Flips a bit in the middle of the first occurrence of `needle`."""
    content = bytearray(path.read_bytes())
    at = content.index(needle) + len(needle) // 2
    content[at] ^= 1
    path.write_bytes(content)
