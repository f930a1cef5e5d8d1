"""The data source `latents`: a folder of tars or ArrayRecord files, so that training needs neither VAE nor UMT5."""

from __future__ import annotations

import operator
import sys
from typing import Any

import ml_collections
import numpy as np

from crcm_jax.data import shards
from crcm_jax.data.example import DamagedExample, Example
from crcm_jax.errors import UserError

_SPLITS = ("train",)
_SHOWN = 5  # flaws told one by one


def default_config() -> ml_collections.ConfigDict:
    """The keys of `config.data` that this source reads."""
    return ml_collections.ConfigDict(dict(path=""))


class LatentSource:
    """Random access: `source[i]` has `latents` `[frame, height, width, channel]` and `text` `[token, channel]`, both
    float32, and `prompt`; DamagedExample if it cannot be used.
    """

    def __init__(self, config: Any, split: str = "train"):
        """`config` is `config.data`. UserError if there is no such folder, or nothing whole in it."""
        config = ml_collections.ConfigDict({**default_config(), **config})
        if split not in _SPLITS:
            raise UserError(f'latents have no split "{split}": give another data.path')
        if not config.path:
            raise UserError("--config.data.path is missing: a folder of .tar or .array_record files of latents")
        self._path = config.path
        self._examples = shards.open_shards(config.path)
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        flaws = self._examples.flaws()
        for flaw in flaws[:_SHOWN]:
            print(f"crcm: {flaw}: going on without what is damaged", file=sys.stderr)
        if len(flaws) > _SHOWN:
            print(f"crcm: {config.path} has {len(flaws) - _SHOWN} more flaws: see crcm data check", file=sys.stderr)
        aside = shards.told_aside(self._examples.aside())
        if aside:
            print(f"crcm: {config.path}: {aside}", file=sys.stderr)
        if not len(self):
            raise UserError(f"{config.path} holds no whole example: see what is wrong with crcm data check")

    def __len__(self) -> int:
        return len(self._examples)

    def __repr__(self) -> str:
        return f"LatentSource({self._path!r})"

    def fingerprint(self) -> str:
        """The same as long as every index means the same example."""
        return self._examples.fingerprint()

    def require(self, latents: tuple[int, int, int, int], text: tuple[int, int]) -> None:
        """From now on, examples are of these shapes: later frames are cut off, short texts filled up with zeros
        (spec causal_rcm 7.4), and others count as damaged. UserError if already the first whole example does not fit.
        """
        self._shapes = latents, text
        for index in range(len(self)):
            try:
                example = self._examples[index]
            except DamagedExample:
                continue
            misfit = self._misfit(example)
            if misfit:
                raise UserError(f"the examples in {self._path} do not fit the configuration: {misfit}")
            return

    def _misfit(self, example: Example) -> str | None:
        if self._shapes is None:
            return None
        (frames, *canvas), (tokens, channels) = self._shapes
        has, text = example.latents.shape, example.text.shape
        if list(has[1:]) != canvas or has[0] < frames:
            return (
                f"latents of {_times(has)} (frame, height, width, channel) where {_times((frames, *canvas))} are needed"
                ": change data.frames, data.height, data.width or the codec"
            )
        if text[1] != channels or text[0] > tokens:
            return (
                f"text of {_times(text)} (token, channel) where {_times((tokens, channels))} is needed: "
                "change text.length or model.text_dim"
            )
        return None

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples[operator.index(index)]
        flaw = example.flaw() or self._misfit(example)
        if flaw:
            raise DamagedExample(f"{example.key} in {self._path}: {flaw}")
        (frames, *_), (tokens, _) = self._shapes or (example.latents.shape, example.text.shape)
        text = np.zeros((tokens, example.text.shape[1]), np.float32)
        text[: len(example.text)] = example.text
        return dict(latents=example.latents[:frames].astype(np.float32), text=text, prompt=example.prompt)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
