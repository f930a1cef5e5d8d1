"""The pixel-space family that ships with the demo: a codec that only rearranges, a text encoder that only looks up.

Both stand behind the interfaces that a learned video VAE and a large text encoder implement (`models/base.py`), so
nothing downstream knows which of them it talks to. The network of this family is the ordinary causal video transformer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from crcm_jax.errors import UserError
from crcm_jax.models.base import Params

DIGITS_VOCABULARY = (
    *("a", "an", "moves", "and", "up", "down", "left", "right"),
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)
"""Every word of the moving digits' prompts. Their order fixes their vectors, so new words go at the end."""

_CACHED_PROMPTS = 10_000  # all that one and two digits can say, and some ten megabytes


@dataclasses.dataclass(frozen=True)
class PixelCodec:
    """Space to depth: `patch`×`patch` pixels become channels, frames stay frames; then (x − mean)/std.

    `mean` and `std` are those of the data's pixels in [−1, 1]. They bring latents to about zero mean and unit variance,
    which the noise schedules assume; a mostly empty canvas is far from it. Works on NumPy and JAX arrays alike, and
    gives back the kind it was given. It has no parameters: pass None.
    """

    patch: int = 2
    mean: float = 0.0
    std: float = 1.0
    channels: int = 1
    """Of the video: 1 grey, 3 colour."""

    def __post_init__(self):
        if self.patch < 1:
            raise UserError(f"codec.patch is {self.patch}, it must be at least one pixel")
        if not self.std > 0:
            raise UserError(f"codec.std is {self.std}, it must be positive")

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(frame, height, width, channel) of the latents of such a clip; UserError if the patch does not divide it."""
        if height % self.patch or width % self.patch:
            raise UserError(
                f"a canvas of {height}×{width} pixels does not split into patches of {self.patch}×{self.patch}: "
                "change data.height, data.width or codec.patch"
            )
        return frames, height // self.patch, width // self.patch, self.channels * self.patch**2

    def encode(self, params: Params, video: jax.Array) -> jax.Array:
        """Pixels `[batch, frame, height, width, channel]` → latents `[…, height/p, width/p, channel·p²]`."""
        del params
        batch, frames, height, width, channels = video.shape
        if channels != self.channels:
            raise UserError(f"the video has {channels} channels and codec.channels is {self.channels}: make them agree")
        shape = self.latent_shape(frames, height, width)
        p = self.patch
        blocks = video.reshape(batch, frames, shape[1], p, shape[2], p, channels).transpose(0, 1, 2, 4, 3, 5, 6)
        return (blocks.reshape(batch, *shape) - self.mean) / self.std

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """The inverse of `encode`. Values outside [−1, 1] are left as they are."""
        del params
        batch, frames, height, width, _ = latents.shape
        p = self.patch
        blocks = (latents * self.std + self.mean).reshape(batch, frames, height, width, p, p, self.channels)
        return blocks.transpose(0, 1, 2, 4, 3, 5, 6).reshape(batch, frames, height * p, width * p, self.channels)

    def decode_stream(self, params: Params, chunks: Iterator[jax.Array]) -> Iterator[jax.Array]:
        """Pixels of each latent chunk as it arrives; frames are independent, so nothing is carried over."""
        for chunk in chunks:
            yield self.decode(params, chunk)


class WordEncoder:
    """Prompts over a fixed vocabulary → float32 `[batch, length, dim]`: token i is word vector + position vector.

    The vectors are rows of random orthogonal matrices (all mutually orthogonal while words + length ≤ dim), fixed for
    ever by the vocabulary's order and `dim`, with a mean square of about 1 a channel in each token. Positions let a
    network tell which digit moves where. Past the prompt's end come zeros; the empty prompt, all zeros, is the
    unconditional one.
    """

    def __init__(self, length: int = 12, dim: int = 32, vocabulary: Sequence[str] = DIGITS_VOCABULARY):
        self.vocabulary = tuple(vocabulary)
        self.length, self.dim = length, dim
        vectors = _orthogonal_rows(len(self.vocabulary) + length, dim) / np.sqrt(2)
        self._words = dict(zip(self.vocabulary, vectors))
        self._positions = vectors[len(self.vocabulary) :]
        self._cache: dict[str, np.ndarray] = {}

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeddings of `prompts`. UserError for an unknown word or more than `length` words."""
        if isinstance(prompts, str):
            raise TypeError(f'prompts are a sequence of strings: pass ["{prompts}"]')
        return np.stack([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> np.ndarray:
        tokens = self._cache.get(prompt)
        if tokens is not None:
            return tokens
        words = prompt.split()
        if len(words) > self.length:
            raise UserError(f'"{prompt}" has {len(words)} words, the text encoder takes {self.length}: set text.length')
        unknown = next((word for word in words if word not in self._words), None)
        if unknown is not None:
            raise UserError(f'the word "{unknown}" is not in the vocabulary: {", ".join(self.vocabulary)}')
        tokens = np.zeros((self.length, self.dim), np.float32)
        for i, word in enumerate(words):
            tokens[i] = self._words[word] + self._positions[i]
        if len(self._cache) >= _CACHED_PROMPTS:
            self._cache.clear()
        self._cache[prompt] = tokens
        return tokens


def _orthogonal_rows(count: int, dim: int) -> np.ndarray:
    """`count` vectors with a mean square of 1, in blocks of `dim` mutually orthogonal ones; float32 `[count, dim]`."""
    rng = np.random.default_rng(0)
    blocks = []
    for _ in range(-(-count // dim)):
        q, r = np.linalg.qr(rng.standard_normal((dim, dim)))
        # LAPACKs differ in the signs they choose; a positive diagonal of R makes the factorisation unique.
        blocks.append(q.T * np.sign(np.diag(r))[:, None])
    return (np.concatenate(blocks)[:count] * np.sqrt(dim)).astype(np.float32)
