"""Clips of a run in training: what the averaged weights make of a few held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from crcm_jax import pipeline
from crcm_jax.evaluate import producer
from crcm_jax.evaluate.run import heldout_prompts
from crcm_jax.evaluate.video import write_video
from crcm_jax.models.base import Params


def training_clips(config) -> Callable[[Params, int, Path], None] | None:
    """`(weights, iteration, folder)`: writes a GIF and a frame grid of a few prompts, always from the same noise.

    None for a run that asks for no clips, or whose data set has no prompts of its own.
    """
    if not config.sample.prompts or config.data.name != "digits":
        return None
    prompts = heldout_prompts(config, config.sample.prompts)

    def write(params: Params, iteration: int, folder: Path) -> None:
        videos = producer.producer(pipeline.of_run(config, params))(prompts, range(len(prompts)))
        stacked = np.concatenate(list(videos), axis=1)
        for suffix in ("gif", "png"):
            write_video(folder / f"{iteration:07d}.{suffix}", stacked, scale=4)

    return write
