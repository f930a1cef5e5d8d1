"""How many floating-point operations the parts of a train step cannot do without, for networks of the Wan family.

Counted are matrix products alone: 2 operations per multiply–add, and in attention only the query–key pairs that the
mask allows, 4 operations per pair and channel. What the program does beyond that (recomputation, parts of tiles, a
kernel that builds its scores twice) is not useful and not counted; nor is the last layer of a clean context
after its keys and values, which nobody reads.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.wan.config import WanConfig
from pallas_kernels.attention import BlockCausal, Cached, Full, Mask, TeacherForcing


@dataclasses.dataclass(frozen=True)
class Pass:
    """Operations of one forward pass, by what becomes of them in its derivatives.

    products: the linear layers. moving: those of them that the noisy tokens run through, not context and text.
    own: attention of the noisy tokens to each other, whose queries, keys and values all have tangents.
    across: their attention to context and text, whose keys and values have none.
    frozen: the part of `across` whose keys and values take no gradient either (a cache).
    still: attention of the clean context.
    """

    products: float
    moving: float = 0.0
    own: float = 0.0
    across: float = 0.0
    frozen: float = 0.0
    still: float = 0.0

    @property
    def forward(self) -> float:
        return self.products + self.own + self.across + self.still

    @property
    def tangent(self) -> float:
        """A directional derivative in latents and time, beyond the forward pass: products once more; attention
        q̇kᵀ, qk̇ᵀ, ṗv and pv̇ where keys move, and half of these where they do not."""
        return self.moving + 2 * self.own + self.across

    @property
    def backward(self) -> float:
        """Gradients in parameters: two products for each; of attention the scores again and four more products, of
        which two are the keys' and values' own."""
        return 2 * self.products + 2.5 * (self.own + self.across + self.still) - self.frozen

    def __mul__(self, times: float) -> Pass:
        return Pass(*(times * value for value in dataclasses.astuple(self)))

    def __add__(self, other: Pass) -> Pass:
        return Pass(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a network of `config` sees: latents (frame, height, width) with `text` tokens of text."""

    config: WanConfig
    shape: tuple[int, int, int]
    text: int

    @property
    def tokens(self) -> int:
        """Of one frame."""
        return math.prod(self.shape[1:]) // math.prod(self.config.patch)

    def bidirectional(self) -> Pass:
        """Every frame sees every frame."""
        n = self.shape[0] * self.tokens
        return self._noisy(n, self._attention(Full(), n, n)[0])

    def teacher_forcing(self, chunks: ChunkPattern) -> Pass:
        """Two streams: the clean context, and the noisy target that sees its earlier chunks."""
        c, n = self.config, self.shape[0] * self.tokens
        units = {"first": chunks.first * self.tokens, "chunk": chunks.size * self.tokens}
        units |= {"window": chunks.window, "sink": chunks.sink}
        own, context = self._attention(TeacherForcing(**units), n, n, n)
        target = self._noisy(n, own)
        last = c.layers - 1
        clean = c.layers * 4 * c.dim**2 + last * (8 * c.dim**2 + 4 * c.dim * c.ffn_dim)
        products = n * (clean + 2 * c.in_channels * math.prod(c.patch) * c.dim)
        seen = self._attention(BlockCausal(**units), n, n)[0]
        still = (seen + self._cross(n)) * last / c.layers
        return dataclasses.replace(
            target, products=target.products + products, across=target.across + context, still=still
        )

    def prompt(self) -> Pass:
        """The text's embedding, and its keys and values in every layer."""
        c = self.config
        return Pass(self.text * (c.layers * 4 * c.dim**2 + 2 * c.text_dim * c.dim + 2 * c.dim**2))

    def cached(self, chunks: ChunkPattern, chunk: int) -> Pass:
        """One chunk against the cache of earlier ones, with the text's keys and values already there."""
        n = (chunks.start(chunk + 1) - chunks.start(chunk)) * self.tokens
        stop = chunks.start(chunk) * self.tokens
        start, sink = 0, 0
        if chunks.window:
            start = chunks.start(max(chunk - chunks.window + 1, 0)) * self.tokens
            sink = min(chunks.start(chunks.sink) * self.tokens, start)
        mask = Cached(stop=stop, start=start, sink=sink)
        own, context = self._attention(mask, n, n, max(stop, 1))
        noisy = self._noisy(n, own)
        return dataclasses.replace(noisy, products=noisy.moving, across=noisy.across + context, frozen=context)

    def _noisy(self, n: int, own: float) -> Pass:
        """The linear layers of n noisy tokens and of the text, and cross-attention."""
        c = self.config
        patch = math.prod(c.patch)
        moving = n * (c.layers * (12 * c.dim**2 + 4 * c.dim * c.ffn_dim))
        moving += 2 * n * c.dim * patch * (c.in_channels + c.out_channels)
        return Pass(products=moving + self.prompt().products, moving=moving, own=own, across=self._cross(n))

    def _cross(self, n: int) -> float:
        return 4.0 * self.config.dim * self.config.layers * n * self.text

    def _attention(self, mask: Mask, queries: int, own: int, context: int | None = None) -> tuple[float, float]:
        """Operations over (own, context) keys, of all heads and layers."""
        visible = mask.visible(queries, own, context)
        rate = 4.0 * self.config.dim * self.config.layers
        lengths = own, 0 if context is None else context
        return tuple(rate * _pairs(rows, queries, length) for rows, length in zip(visible, lengths))


def _pairs(rows, queries: int, keys: int) -> int:
    if rows is None:
        return queries * keys
    low1, high1, low2, high2 = np.asarray(rows, np.int64)
    return int((high1 - low1 + high2 - low2).sum())
