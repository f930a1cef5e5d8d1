"""From a trained causal model to a producer of clips: prompts and seeds in, videos out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crcm_jax import build
from crcm_jax.errors import UserError
from crcm_jax.evaluate.run import Producer
from crcm_jax.models.base import Condition, Params
from crcm_jax.sampling import Few, Noise, Ode, draw_noise, generate
from crcm_jax.schedule import StepPlan
from crcm_jax.train.weights import load_meta, load_params


def load(checkpoint: str | Path, which: str = "ema") -> tuple[ConfigDict, Params, dict[str, Any]]:
    """(configuration, weights, what is known of its run) of a causal model's checkpoint.

    `which`: "ema" or "params". UserError if it is missing, damaged, of another architecture than it says, of the
    bidirectional stage, or says nothing of its configuration.
    """
    meta = load_meta(checkpoint)
    if not meta.get("config"):
        raise UserError(f"{checkpoint} does not say how it was configured: give a run's workdir or checkpoint")
    config = ConfigDict(meta["config"])
    if config.training == "bidirectional":
        raise UserError(f"{checkpoint} is bidirectional and cannot stream: evaluate a causal model trained from it")
    expect = jax.eval_shape(build.network(config).init, jax.random.key(0))
    dtype = jnp.dtype(config.get("param_dtype", "float32"))
    return config, load_params(checkpoint, which, expect=expect, dtype=dtype), meta


def few_step_solver(config: ConfigDict, steps: Sequence[int], mid: Sequence[float] | None = None) -> Few:
    """A student's solver: `steps[i]` steps for chunk i (the last entry for all later ones).

    mid: times between 1 and 0 at which every chunk stops, as many as its steps need; by default those of
    `config.rollout`, whose way of seeing context it also takes. UserError for impossible schedules.
    """
    rollout = config.rollout
    times = tuple(tuple(row) for row in rollout.times) if mid is None else (tuple(mid),)
    try:
        return Few(StepPlan(tuple(steps), times, rollout.noisy_context, rollout.context_start))
    except ValueError as error:
        raise UserError(str(error)) from error


def streaming(config: ConfigDict, params: Params, solver: Few | Ode, *, guidance: float = 1.0) -> Producer:
    """The producer of a causal model. A seed is all of a clip's randomness: models given one share their noise.

    `guidance` above 1 mixes in the empty prompt's velocity, for diffusion models. Videos are clipped to [−1, 1].
    """
    network, codec, text_encoder = build.network(config), build.codec(config), build.text_encoder(config)
    latents = codec.latent_shape(config.data.frames, config.data.height, config.data.width)
    chunks = build.chunk_pattern(config)
    uncond = Condition(text=jnp.asarray(text_encoder([""])))
    steps = solver.most if isinstance(solver, Few) else 0
    decode = jax.jit(lambda latents: jnp.clip(codec.decode(None, latents), -1, 1))

    def produce(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        clips = generate(
            network,
            params,
            Condition(text=jnp.asarray(text_encoder(prompts))),
            None,
            shape=(len(prompts), *latents),
            chunks=chunks,
            solver=solver,
            uncond=uncond,
            guidance=guidance,
            noise=clip_noise(np.asarray(seeds, np.uint32), latents, steps),
        )
        return np.asarray(decode(clips))

    return produce


@functools.partial(jax.jit, static_argnums=(1, 2))
def clip_noise(seeds: jax.Array, shape: tuple[int, int, int, int], steps: int) -> Noise:
    """The noise of clips of latents `shape` [frame, height, width, channel], each drawn from its own seed alone."""
    each = jax.vmap(lambda seed: draw_noise(jax.random.key(seed), (1, *shape), steps))(seeds)
    return Noise(each.initial[:, 0], each.steps[:, :, 0].swapaxes(0, 1), each.image[:, 0])
