"""Tile sizes, as data: for each kernel and chip the largest query and key tile, cut down to what a call needs.

Chosen by counting, not by measuring. A forward tile of n queries does n FLOPs for each byte of keys and values, and a
chip wants about twice its FLOP/s over its bytes/s (v5e 240, v5p 187, v6e 561, tpu7x 312). Beyond that, larger tiles
only compute more pairs that the mask hides: in frame-wise teacher forcing 8% at 512×512, 13% at 1024×512, 18% at
1024×1024.
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
_LEAN = dict.fromkeys(KERNELS, Blocks(512, 512))
_WIDE = dict.fromkeys(KERNELS, Blocks(1024, 512)) | {"backward_kv": Blocks(512, 1024)}
_LARGEST = {
    "interpreter": dict.fromkeys(KERNELS, _SMALL),
    "v5e": _LEAN,
    "v5p": _LEAN,
    "v6e": _WIDE,
    "tpu7x": _WIDE,
}
_FEW_QUERIES = Blocks(1664, 512)  # a chunk against a cache: all queries see the same keys, so only the ends are wasted


def blocks_for(kernel: str, chip, q, segments) -> Blocks:
    """Tile sizes of one kernel (a name in `KERNELS`) on a chip for queries `[B, N, H, D]` and segments."""
    largest = _LARGEST[chip.name][kernel]
    if largest != _SMALL:
        keys = sum(s.k.shape[1] for s in segments)
        if kernel == "forward" and 4 * q.shape[1] <= keys:
            largest = _FEW_QUERIES
        if q.dtype.itemsize == 4 or q.shape[-1] > LANES:
            largest = Blocks(largest.q // 2, largest.k // 2)
    return Blocks(_even(q.shape[1], largest.q), _even(max(s.k.shape[1] for s in segments), largest.k))


def _even(tokens, block):
    """The size, at most `block`, at which as few tiles as possible cover `tokens` with the last one nearly full."""
    count = -(-tokens // block)
    return -(-tokens // (count * LANES)) * LANES
