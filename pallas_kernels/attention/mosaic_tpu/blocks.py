"""Tile sizes, as data: for each kernel and chip the largest query and key tile, cut down to what a call needs.

Larger query tiles read keys fewer times: a tile of n queries does n FLOPs for each byte of keys, and a chip needs at
least its FLOP/s over its bytes/s (v5e 240, v5p 187, v6e 561, tpu7x 312). Beyond twice that, larger tiles only compute
more pairs that the mask hides.
"""

from __future__ import annotations

import dataclasses

LANES = 128  # of a vector register: tile sizes are multiples of it


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes in tokens, multiples of 128."""

    q: int
    k: int


KERNELS = ("forward", "forward_tangent", "tangent", "backward_q", "backward_kv")

_SMALL = Blocks(128, 128)  # several tiles even in small tests
_LARGEST = {
    "forward": Blocks(1024, 1024),
    "forward_tangent": Blocks(1024, 512),
    "tangent": Blocks(1024, 512),
    "backward_q": Blocks(1024, 512),
    "backward_kv": Blocks(512, 1024),
}


def blocks_for(kernel: str, chip, q, segments) -> Blocks:
    """Tile sizes of one kernel (a name in `KERNELS`) on a chip for queries `[B, N, H, D]` and segments."""
    largest = _LARGEST[kernel] if chip.flops else _SMALL
    if q.dtype.itemsize == 4 or q.shape[-1] > LANES:
        largest = Blocks(largest.q // 2, largest.k // 2) if chip.flops else largest
    return Blocks(_even(q.shape[1], largest.q), _even(max(s.k.shape[1] for s in segments), largest.k))


def _even(tokens, block):
    """The size, at most `block`, at which as few tiles as possible cover `tokens` with the last one nearly full."""
    count = -(-tokens // block)
    return -(-tokens // (count * LANES)) * LANES
