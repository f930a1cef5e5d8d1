"""Text embeddings as the prompt of a condition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A `TextEncoder` whose prompt is one array, `{"text": [batch, token, channel]}`. embed: prompts → that array."""

    embed: Callable[[Sequence[str]], np.ndarray]

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"text": self.embed(prompts)}
