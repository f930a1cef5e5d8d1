"""Named shapes: one list for tests, benchmark and autotuning.

Tokens per latent frame are 1,560 in Wan at 480p, which no tile size divides; the small cases are ragged alike.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pallas_kernels.attention.chunk_masks import BlockCausal, Captioned, TeacherForcing
from pallas_kernels.attention.mask import Cached, Full, Intervals, Mask


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and mask of one call. `context` is a length in tokens, None without a context."""

    name: str
    mask: Mask
    queries: int
    own: int
    context: int | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    dim: int = 64

    @property
    def segments(self) -> dict[str, int]:
        """Lengths by segment name."""
        return {"own": self.own} | ({} if self.context is None else {"context": self.context})

    def pairs(self) -> dict[str, int]:
        """Allowed query–key pairs per head and batch entry (their mean), by segment: what useful work is counted in."""
        visible = self.mask.visible(self.queries, self.own, self.context)

        def count(rows, length):
            if rows is None:
                return self.queries * length
            total = int((rows[..., 1::2, :] - rows[..., 0::2, :]).sum())
            return total if rows.ndim == 2 else total / len(rows)

        return {name: count(getattr(visible, name), length) for name, length in self.segments.items()}


def _lopsided(queries, own, context):
    """Intervals that no other mask makes: moving, overlapping, out of order, empty, beyond the end."""
    row = np.arange(queries, dtype=np.int32)
    return Intervals(
        own=((row // 2, row // 2 + 40), (row // 4, row // 4 + 9)),
        context=((np.where(row % 7 == 0, 5, 30), np.where(row % 7 == 0, 5, 55)), (context - 9, context + 5)),
    )


def _sparse(queries):
    """Some rows see nothing at all."""
    row = np.arange(queries, dtype=np.int32)
    return Intervals(own=((0, np.where(row % 3 == 0, 0, 1 + row // 2)),))


def _late(queries, first):
    """Whole tiles of queries see nothing."""
    return Intervals(own=((0, np.where(np.arange(queries) < first, 0, 70)),))


SMALL = (
    Case("full", Full(), 150, 150),
    Case("cross", Full(), 150, 77, batch=2),
    Case("full_context", Full(), 70, 130, 150),
    Case("one_query", Full(), 1, 200),
    Case("block_causal", BlockCausal(60, 60), 180, 180, batch=2, dim=128),
    Case("block_causal_window", BlockCausal(20, 40, window=2, sink=1), 180, 180, kv_heads=1),
    Case("block_causal_offset", BlockCausal(20, 40, offset=2), 80, 150),
    Case("teacher_forcing", TeacherForcing(60, 60), 180, 180, 180, dim=128),
    Case("teacher_forcing_ragged", TeacherForcing(13, 47), 201, 201, 201, batch=2, heads=4, kv_heads=2),
    Case("teacher_forcing_window", TeacherForcing(20, 40, window=2, sink=1), 180, 180, 180),
    Case("teacher_forcing_sink", TeacherForcing(20, 40, window=1, sink=2), 180, 180, 180),
    Case("cached", Cached(133), 60, 60, 200, dim=128),
    Case("cached_window", Cached(190, start=101, sink=33), 60, 60, 200, heads=4, kv_heads=1),
    Case("cached_empty", Cached(0), 60, 60, 200),
    Case("intervals", _lopsided(150, 150, 90), 150, 150, 90),
    Case("empty_rows", _sparse(150), 150, 150),
    Case("empty_tiles", _late(200, 140), 200, 150),
)


def _by_entry(queries, own):
    """Ends of every form: one a query, one a batch entry, one for each pair of them, one for all; three entries."""
    row, entry = np.arange(queries, dtype=np.int32), np.arange(3, dtype=np.int32)[:, None]
    return Intervals(
        own=((row // 2, row // 2 + 40 * entry), (np.array([[90], [140], [0]], np.int32), own + 5)),
        context=((0, np.array([[31], [0], [64]], np.int32)), (50 + 9 * entry, row // 3 + 20 * entry)),
    )


BY_ENTRY = (
    Case("captions", Captioned(TeacherForcing(20, 40), (29, 5, 0), 37), 140, 140, 177, batch=3, heads=4, kv_heads=2),
    Case("captions_alone", Captioned(BlockCausal(13, 47), (70, 133), 150), 107, 107, 150, batch=2, dim=128),
    Case("captions_window", Captioned(TeacherForcing(20, 40, window=2), (3, 21), 21), 180, 180, 201, batch=2),
    Case("captions_cached", Cached((67, 190, 150), 67, (5, 67, 31)), 60, 60, 200, batch=3, heads=6, kv_heads=2),
    Case("intervals_by_entry", _by_entry(150, 170), 150, 170, 90, batch=3),
)
"""Batch entries see different keys."""

FRAME, FRAMES = 1560, 21
_CLIP = FRAME * FRAMES
_WAN = {"heads": 12, "kv_heads": 12, "dim": 128}

WAN = (
    Case("full", Full(), _CLIP, _CLIP, **_WAN),
    Case("tf_target_1", TeacherForcing(FRAME, FRAME), _CLIP, _CLIP, _CLIP, **_WAN),
    Case("tf_context_1", BlockCausal(FRAME, FRAME), _CLIP, _CLIP, **_WAN),
    Case("tf_target_3", TeacherForcing(3 * FRAME, 3 * FRAME), _CLIP, _CLIP, _CLIP, **_WAN),
    Case("tf_context_3", BlockCausal(3 * FRAME, 3 * FRAME), _CLIP, _CLIP, **_WAN),
    Case("decode_1", Cached(_CLIP - FRAME), FRAME, FRAME, _CLIP - FRAME, **_WAN),
    Case("decode_3", Cached(_CLIP - 3 * FRAME), 3 * FRAME, 3 * FRAME, _CLIP - 3 * FRAME, **_WAN),
)

WAN_CAPTIONS = (
    Case(
        "tf_captions_3", Captioned(TeacherForcing(3 * FRAME, 3 * FRAME), (77, 512), 512),
        _CLIP, _CLIP, _CLIP + 512, batch=2, heads=16, kv_heads=8, dim=128,
    ),
    Case("decode_captions_3", Cached(_CLIP - 3 * FRAME, 512, (77, 512)), 3 * FRAME, 3 * FRAME, _CLIP - 3 * FRAME,
         batch=2, heads=16, kv_heads=8, dim=128),
)  # fmt: skip
"""Two captions of different lengths at the front of the context, and grouped heads."""


def case(name: str, cases=WAN) -> Case:
    """The case called `name`; ValueError lists those there are."""
    for candidate in cases:
        if candidate.name == name:
            return candidate
    raise ValueError(f"name: no case {name!r}: use one of {', '.join(c.name for c in cases)}")
