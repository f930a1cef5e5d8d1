"""The policy that keeps everything: slot n is frame n, and a stream ends where the cache does.

A chunk pattern with a window and a sink limits what is *seen*, as it does in training; nothing is forgotten.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from crcm_jax.cache.base import Seen
from crcm_jax.chunks import ChunkPattern


@dataclasses.dataclass(frozen=True)
class Full:
    """Keeps every frame."""

    def slots(self, chunks: ChunkPattern, frames: int) -> int:
        """One a frame; ValueError where the clip does not split into chunks."""
        chunks.count(frames)
        return frames

    def limit(self, chunks: ChunkPattern, slots: int) -> int:
        """As many chunks as there are slots for."""
        return chunks.count(slots)

    def see(self, chunks: ChunkPattern, chunk: Any, slots: int) -> Seen:
        """Everything before the chunk, or its window and sink."""
        now = chunks.start(chunk)
        if not chunks.window:
            return Seen(start=0, stop=now, sink=0, now=now)
        least, most = (min, max) if isinstance(chunk, int) else (jnp.minimum, jnp.maximum)
        begin = chunks.start(most(chunk - (chunks.window - 1), 0))
        # The intervals must not overlap, or the sink's keys would count twice.
        return Seen(start=begin, stop=now, sink=least(chunks.start(chunks.sink), begin), now=now)

    def slot(self, chunks: ChunkPattern, chunk: Any, slots: int) -> Any:
        """The chunk's own first frame."""
        return chunks.start(chunk)


FULL = Full()
