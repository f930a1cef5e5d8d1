"""A text encoder that only looks up: prompts over a fixed vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crcm_jax.errors import UserError

DIGITS_VOCABULARY = (
    *("a", "an", "moves", "and", "up", "down", "left", "right"),
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)
"""Every word of the moving digits' prompts. Their order fixes their vectors, so new words go at the end."""

WORD_WIDTH = 32
"""Channels of a word, where nothing else is said."""

_CACHED_PROMPTS = 10_000  # all that one and two digits can say, and some ten megabytes


class WordEncoder:
    """Prompts over a fixed vocabulary → float32 `[batch, length, dim]`: token i is word vector + position vector.

    The vectors are rows of random orthogonal matrices (all mutually orthogonal while words + length ≤ dim), fixed for
    ever by the vocabulary's order and `dim`, with a mean square of about 1 a channel in each token. Positions let a
    network tell which digit moves where. Past the prompt's end come zeros; the empty prompt, all zeros, is the
    unconditional one.
    """

    def __init__(self, length: int = 12, dim: int = WORD_WIDTH, vocabulary: Sequence[str] = DIGITS_VOCABULARY):
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
