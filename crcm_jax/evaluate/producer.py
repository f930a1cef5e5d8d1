"""From a trained model to a producer of clips: prompts and seeds in, videos out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crcm_jax.errors import UserError
from crcm_jax.evaluate.run import Producer
from crcm_jax.models.base import Condition
from crcm_jax.pipeline import Model
from crcm_jax.recipes.options import rollout_plan
from crcm_jax.sampling import Few, Noise, Schedule, Solver, Whole, generate_with


def few_step_solver(config: ConfigDict, steps: Sequence[int], mid: Sequence[Any] | None = None) -> Few:
    """A student's solver: `steps[i]` steps for chunk i (the last entry for all later ones).

    mid: times between 1 and 0 at which every chunk stops, as many as its steps need, or a row of them for each entry of
    `steps`; by default those of `config.rollout`, whose way of seeing context it also takes. UserError for impossible
    schedules.
    """
    rows = config.rollout.times if mid is None else mid if any(isinstance(row, Sequence) for row in mid) else (mid,)
    times = tuple(tuple(row) for row in rows)
    try:
        return Few(Schedule(tuple(steps), times), rollout_plan(config).context)
    except ValueError as error:
        raise UserError(str(error)) from error


def producer(model: Model, solver: Solver | Whole | None = None, *, guidance: float | None = None) -> Producer:
    """The producer of a model: chunk by chunk if it is causal, the whole clip at once if it is bidirectional.

    solver, guidance: by default those that the model's recipe means it for; guidance above 1 mixes in the empty
    prompt's velocity, for diffusion models. A seed is all of a clip's randomness: models given one share their noise.
    Videos are clipped to [−1, 1]. UserError for few steps of a bidirectional model, and for a model that records no
    sampler and is given none.
    """
    if solver is None:
        if model.sampler is None:
            raise UserError(f"{model.name} does not say how it samples: give a solver")
        solver, usual = model.sampler
        guidance = usual if guidance is None else guidance
    whole = model.chunks is None
    if whole and solver.distilled:
        raise UserError("a bidirectional model is not distilled: sample it with many steps, --ode=N")
    text_encoder, latents = model.text_encoder(), model.latent_shape()

    def condition(prompts: Sequence[str]) -> Condition:
        return Condition(jax.tree.map(jnp.asarray, text_encoder(prompts)))

    bound, codec_params = model.bound, model.codec_params
    shared = {"uncond": condition([""]), "guidance": 1.0 if guidance is None else guidance}
    decode = jax.jit(lambda params, latents: jnp.clip(model.codec.decode(params, latents), -1, 1))

    def produce(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        cond, noise = condition(prompts), clip_noise(seeds, latents, solver.draws)
        clips = generate_with(solver, bound, cond, noise, **shared)
        return np.asarray(decode(codec_params, clips))

    return produce


def clip_noise(seeds: Sequence[int], shape: tuple[int, int, int, int], steps: int, given: int = 0) -> Noise:
    """The noise of clips of latents `shape` [frame, height, width, channel], each drawn from its own seed alone.

    given: how many of its first frames are given. More steps leave the earlier draws as they are. NumPy draws it: there
    is nothing to compile for each number of clips.
    """

    def draw(purpose: int, shape: tuple[int, ...]) -> jax.Array:
        draws = [np.random.default_rng((seed, purpose)).standard_normal(shape, np.float32) for seed in seeds]
        return jnp.asarray(np.stack(draws))

    renoised = [draw(2 + step, shape) for step in range(steps)]
    return Noise(
        initial=draw(0, (shape[0] - given, *shape[1:])),
        steps=jnp.stack(renoised) if renoised else jnp.zeros((0, len(seeds), *shape)),
        image=draw(1, (max(given, 1), *shape[1:])),
    )
