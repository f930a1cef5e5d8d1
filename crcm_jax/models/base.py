"""What objectives, rollouts and samplers may ask of a network, a codec and a text encoder, and with what they ask it.

Latents are channels-last `[batch, frame, height, width, channel]`; times are rectified-flow t in [0, 1] per frame,
`[batch, frame]`, with t = 1 pure noise; velocity is v = ε − x0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import numpy as np

from crcm_jax.cache import FULL, PLAIN, CachePolicy, KVCache, Storage
from crcm_jax.chunks import ChunkPattern
from crcm_jax.parallel.rules import Table
from crcm_jax.shapes import Params


class Condition(flax.struct.PyTreeNode):
    """What the video should show.

    prompt: the model family's own tree of arrays `[batch, …]`; of Wan `{"text": …}` (models/wan/prompt.py).
    frames: what accompanies each latent frame, by name, `[batch, frame, …]`: actions, cameras, extra input channels.
    given: `[batch, frame]` booleans of frames that are conditions themselves, clean and never generated; None for none.
    """

    prompt: Any
    frames: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    given: jax.Array | None = None

    def at(self, span: slice) -> Condition:
        """The condition of some of the frames alone."""
        given = None if self.given is None else self.given[:, span]
        return self.replace(frames={name: value[:, span] for name, value in self.frames.items()}, given=given)


class Prepared(flax.struct.PyTreeNode):
    """A condition whose prompt a network has worked through; frames and given as in `Condition`."""

    prompt: Any
    frames: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    given: jax.Array | None = None


class Itself(flax.struct.PyTreeNode):
    """The view in which x sees itself: all of it, or, if the network is causal, its own and earlier chunks."""


class TeacherForcing(flax.struct.PyTreeNode):
    """The view in which chunk i of x sees itself and the chunks before it of a context clip.

    context: latents like x. times: of the context, `[batch or 1, frame or 1]`.
    """

    context: jax.Array
    times: jax.Array


class OnCache(flax.struct.PyTreeNode):
    """The view in which x sees itself and what a cache holds of the chunks before it.

    chunk: which chunk of its clip x is, an int or a traced integer; None if x is the whole clip that the cache holds,
        of which each chunk then sees those before it.
    """

    cache: Any
    chunk: Any = None


View = Itself | TeacherForcing | OnCache
ITSELF = Itself()


class Network(Protocol):
    """A velocity network, whole: nothing that this protocol does not name is ever asked of one.

    It is hashable and equal to its like (a frozen dataclass), since compiled programs are kept by it. The views of
    context are one function: tests hold them equal. Every method raises ValueError, before anything is computed, for
    what does not fit it.
    """

    @property
    def chunks(self) -> ChunkPattern | None:
        """How frames form chunks, told here and nowhere else; None of a bidirectional network."""

    def init(self, key: jax.Array) -> Params:
        """Random parameters, float32."""

    def condition(self, params: Params, cond: Condition, *, many: bool = True) -> Prepared:
        """The condition as passes take it. many: whether work is worth doing here that each of many passes would
        otherwise repeat; the results are the same. ValueError for another family's prompt and for missing frames."""

    def velocity(
        self, params: Params, x: jax.Array, t: jax.Array, prepared: Prepared, view: View = ITSELF
    ) -> jax.Array:
        """Velocity of x `[batch, frame, height, width, channel]` at times t `[batch or 1, frame or 1]`."""

    def write(
        self, params: Params, x: jax.Array, t: jax.Array, prepared: Prepared, cache: Any, chunk: int | jax.Array
    ) -> tuple[jax.Array, Any]:
        """The velocity of chunk `chunk` on the cache, and the cache with that chunk in it: one pass for both."""

    def cache(
        self, batch: int, shape: tuple[int, int, int], policy: CachePolicy = FULL, storage: Storage = PLAIN
    ) -> Any:
        """An empty cache for clips of latent shape (frame, height, width)."""

    def features(
        self, params: Params, x: jax.Array, t: jax.Array, prepared: Prepared, layers: Sequence[int]
    ) -> list[jax.Array]:
        """The tokens `[batch, frame, token, channel]` that leave each of `layers` (numbers from 0) where x sees itself:
        for discriminator heads, and for looking at numerics. ValueError for a layer that does not exist."""

    def for_inference(self, params: Params, *, gather_once: bool = True) -> tuple[Network, Params]:
        """The same network in the form in which many short passes without gradients are fastest, with its parameters.

        gather_once: weights that are cut over devices may be put together now, instead of by every pass. Caches that
        one form has written the other reads.
        """

    @property
    def rules(self) -> Table:
        """How a mesh cuts its parameters."""

    @property
    def heads(self) -> tuple[int, int]:
        """Attention heads of queries, and of keys and values: what a mesh must divide."""


class Codec(Protocol):
    """Video in pixels ↔ latents. Pixels are `[batch, frame, height, width, channel]` in [−1, 1]."""

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(frame, height, width, channel) of the latents of such a clip; ValueError if it does not divide."""

    def init(self, key: jax.Array) -> Params:
        """Random parameters; an empty dict of a codec that has none."""

    @property
    def dtype(self) -> str:
        """The compute dtype, in which parameters are held for use."""

    def encode(self, params: Params, video: jax.Array) -> jax.Array: ...

    def decode(self, params: Params, latents: jax.Array) -> jax.Array: ...

    def decode_stream(self, params: Params, chunks: Iterator[jax.Array]) -> Iterator[jax.Array]:
        """Pixels of each latent chunk as it arrives; the concatenation equals `decode` of the whole clip."""


class TextEncoder(Protocol):
    """Prompts → the prompt tree of a `Condition`, leaves `[batch, …]`."""

    def __call__(self, prompts: Sequence[str]) -> Mapping[str, np.ndarray]: ...


__all__ = [
    "ITSELF", "Codec", "Condition", "Itself", "KVCache", "Network", "OnCache", "Params", "Prepared", "TeacherForcing",
    "TextEncoder", "View",
]  # fmt: skip
