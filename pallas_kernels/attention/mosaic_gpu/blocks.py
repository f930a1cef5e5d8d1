"""Block sizes: a measured table, `blocks.json`, by kernel and head dim. `autotune` measures and extends it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib

TABLE = pathlib.Path(__file__).with_name("blocks.json")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tokens per streamed tile, buffers in a ring of tiles, and whether heads are the fastest grid axis."""

    tile: int
    stages: int
    heads_first: bool = True


@functools.cache
def table() -> dict[tuple[str, int], Blocks]:
    """The measured choice for every (kernel, head dim)."""
    read = json.loads(TABLE.read_text())
    return {(kernel, int(dim)): Blocks(**fields) for kernel, dims in read.items() for dim, fields in dims.items()}


_tried: dict[tuple[str, int], Blocks] = {}


def blocks_for(kernel: str, dim: int) -> Blocks:
    """The choice for a kernel: `forward`, `forward_tangent`, `tangent`, `dq` or `dkv`."""
    return _tried.get((kernel, dim)) or table()[kernel, dim]


@contextlib.contextmanager
def trying(kernel: str, dim: int, blocks: Blocks):
    """Uses other block sizes for what is traced inside; jit caches do not know, so trace afresh."""
    _tried[kernel, dim] = blocks
    try:
        yield
    finally:
        del _tried[kernel, dim]
