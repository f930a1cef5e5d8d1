"""Clips of a run in training: what the averaged weights make of a few held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from crcm_jax.evaluate import producer
from crcm_jax.evaluate.run import heldout_prompts
from crcm_jax.evaluate.video import frame_grid, write_video
from crcm_jax.models.base import Params

DIFFUSION = ("tf", "df")


def training_clips(config) -> Callable[[Params, int, Path], None] | None:
    """`(weights, iteration, folder)`: writes a frame grid and a GIF of `config.sample.prompts` prompts, same noise each time.

    None for a run that has no causal model to stream, or asks for no clips.
    """
    if config.training == "bidirectional" or not config.sample.prompts:
        return None
    prompts = heldout_prompts(config, config.sample.prompts)

    def write(params: Params, iteration: int, folder: Path) -> None:
        make = producer.streaming(config, params, *solver_of(config))
        videos = make(prompts, range(len(prompts)))
        write_video(folder / f"{iteration:07d}.gif", np.concatenate(list(videos), axis=2))
        write_video(folder / f"{iteration:07d}.png", frame_grid(videos))

    return write


def solver_of(config):
    """(solver, guidance) that the run's own model is meant for: many guided steps, or its few-step schedule."""
    from crcm_jax.sampling import Ode

    if config.training in DIFFUSION:
        return Ode(config.sample.ode_steps), config.sample.guidance
    return producer.few_step_solver(config, config.rollout.steps), 1.0
