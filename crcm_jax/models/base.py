"""What objectives, rollouts and samplers may ask of a network, a codec and a text encoder.

Latents are channels-last `[batch, frame, height, width, channel]`; times are rectified-flow t in [0, 1] per frame,
`[batch, frame]`, with t = 1 pure noise; velocity is v = ε − x0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import numpy as np

Params = Any
"""A nested dict of arrays."""

Cache = Any
"""Keys and values of earlier chunks, a value that goes in and comes out; stacked over layers."""


@flax.struct.dataclass
class Condition:
    """What the video should show.

    text: `[batch, token, channel]` text embeddings, zeros past the prompt's end (they are attended,
        spec causal_rcm 7.4).
    image: `[batch, token, channel]` image embeddings (Wan2.1 I2V), or None.
    latents: `[batch, frame, height, width, channel]` extra input channels (Wan I2V), or None.
    """

    text: jax.Array
    image: jax.Array | None = None
    latents: jax.Array | None = None


class Network(Protocol):
    """A velocity network. The three ways of seeing context are one function (tests hold them equal)."""

    def init(self, key: jax.Array) -> Params: ...

    def velocity(
        self,
        params: Params,
        x: jax.Array,
        t: jax.Array,
        cond: Condition,
        *,
        context: tuple[jax.Array, jax.Array] | None = None,
        cache: Cache | None = None,
        chunk: int | jax.Array | None = None,
    ) -> jax.Array:
        """Velocity of `x` at per-frame times `t`.

        * neither `context` nor `cache`: x attends to itself, bidirectionally or, if the network is causal, to its own
          and earlier chunks.
        * `context=(c, t_c)`: teacher forcing; chunk i of x attends to itself and to chunks < i of c.
        * `cache, chunk`: x is chunk `chunk` of a clip and attends to itself and to the cached chunks before it.
        * `cache` alone: x is a whole clip; each of its chunks attends to itself and to the cached chunks before it.
        """

    def append(
        self, params: Params, x: jax.Array, t: jax.Array, cond: Condition, cache: Cache, *, chunk: int | jax.Array
    ) -> Cache:
        """The cache with chunk `chunk`'s keys and values written into it."""

    def init_cache(self, batch: int, latent_shape: tuple[int, int, int], dtype: Any = None) -> Cache:
        """An empty cache for clips of latent shape (frames, height, width)."""


class Codec(Protocol):
    """Video in pixels ↔ latents. Pixels are `[batch, frame, height, width, channel]` in [−1, 1]."""

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(frame, height, width, channel) of the latents of such a clip; ValueError if it does not divide."""

    def encode(self, params: Params, video: jax.Array) -> jax.Array: ...

    def decode(self, params: Params, latents: jax.Array) -> jax.Array: ...

    def decode_stream(self, params: Params, chunks: Iterator[jax.Array]) -> Iterator[jax.Array]:
        """Pixels of each latent chunk as it arrives; the concatenation equals `decode` of the whole clip."""


class TextEncoder(Protocol):
    """Prompts → embeddings `[batch, token, channel]` float32, zeros past each prompt's end."""

    def __call__(self, prompts: Sequence[str]) -> np.ndarray: ...
