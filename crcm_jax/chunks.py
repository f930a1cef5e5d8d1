"""How latent frames form chunks (blocks): the causal structure of a clip.

Chunk 0 has `first` frames, every other chunk `size` frames; a network may look at its own chunk and at earlier ones
(spec causal_rcm 3.1). Everything here is host-side arithmetic on small integers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int

from crcm_jax.shapes import Array

Integers: TypeAlias = int | np.integer | Int[Array, " ..."]
"""A host's, or what a program computes."""


@dataclasses.dataclass(frozen=True)
class ChunkPattern:
    """`first` frames, then chunks of `size` frames. `window` and `sink` limit attention, in chunks; 0 is off.

    With a window K, chunk c sees chunks c−K+1 … c; with a sink S also chunks 0 … S−1 (spec causal_rcm 3.2).
    """

    first: int
    size: int
    window: int = 0
    sink: int = 0

    def __post_init__(self):
        if self.first < 1 or self.size < 1:
            raise ValueError(f"chunk pattern ({self.first}, {self.size}): both lengths must be at least one frame")
        if self.window < 0 or self.sink < 0:
            raise ValueError(f"window {self.window} and sink {self.sink} are counts of chunks: use 0 to switch one off")

    def count(self, frames: int) -> int:
        """Number of chunks in a clip of `frames` latent frames; ValueError where the pattern does not divide it."""
        rest = frames - self.first
        if rest < 0 or rest % self.size:
            raise ValueError(
                f"{frames} latent frames do not split into a first chunk of {self.first} and chunks of {self.size}: "
                f"use {self.first} + n·{self.size} frames, or change chunks.first / chunks.size"
            )
        return 1 + rest // self.size

    def start(self, chunk: Integers) -> Any:
        """First frame of `chunk` (≥ 0; or of each, where they are several)."""
        return (chunk > 0) * (self.first + (chunk - 1) * self.size)

    def length(self, chunk: int) -> int:
        """Frames in `chunk`."""
        return self.first if chunk == 0 else self.size

    def span(self, chunk: int) -> slice:
        """The frames of `chunk`, as a slice."""
        return slice(self.start(chunk), self.start(chunk) + self.length(chunk))

    def spans(self, frames: int) -> list[slice]:
        """One slice of frames per chunk."""
        return [self.span(chunk) for chunk in range(self.count(frames))]

    def index(self, frames: int) -> Int[np.ndarray, " {frames}"]:
        """Chunk index of every frame, int array `[frame]`."""
        return np.repeat(np.arange(self.count(frames)), [self.length(c) for c in range(self.count(frames))])
