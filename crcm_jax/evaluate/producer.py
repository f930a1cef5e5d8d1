"""From a trained model to a producer of clips: prompts and seeds in, videos out."""

from __future__ import annotations

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
from crcm_jax.sampling import Few, Noise, Ode, generate, generate_whole
from crcm_jax.sampling.schedule import StepPlan
from crcm_jax.saving.weights import load_meta, load_params


def load(checkpoint: str | Path, which: str = "ema", causal: bool = True) -> tuple[ConfigDict, Params, dict[str, Any]]:
    """(configuration, weights, what is known of its run) of a model's checkpoint.

    `which`: "ema" or "params". UserError if it is missing, damaged, of another architecture than it says, of the
    bidirectional stage although it must be `causal`, or says nothing of its configuration.
    """
    meta = load_meta(checkpoint)
    if not meta.get("config"):
        raise UserError(f"{checkpoint} does not say how it was configured: give a run's workdir or checkpoint")
    config = ConfigDict(meta["config"])
    if causal and config.training == "bidirectional":
        raise UserError(f"{checkpoint} is bidirectional and cannot stream: give a causal model trained from it")
    expect = jax.eval_shape(build.network(config).init, jax.random.key(0))
    dtype = jnp.dtype(config.get("param_dtype", "float32"))
    return config, load_params(checkpoint, which, expect=expect, dtype=dtype), meta


def few_step_solver(config: ConfigDict, steps: Sequence[int], mid: Sequence[Any] | None = None) -> Few:
    """A student's solver: `steps[i]` steps for chunk i (the last entry for all later ones).

    mid: times between 1 and 0 at which every chunk stops, as many as its steps need, or a row of them for each entry of
    `steps`; by default those of `config.rollout`, whose way of seeing context it also takes. UserError for impossible
    schedules.
    """
    rollout = config.rollout
    rows = rollout.times if mid is None else mid if any(isinstance(row, Sequence) for row in mid) else (mid,)
    times = tuple(tuple(row) for row in rows)
    try:
        return Few(StepPlan(tuple(steps), times, rollout.noisy_context, rollout.context_start))
    except ValueError as error:
        raise UserError(str(error)) from error


def producer(config: ConfigDict, params: Params, solver: Few | Ode, *, guidance: float = 1.0) -> Producer:
    """The producer of a model: chunk by chunk if it is causal, the whole clip at once if it is bidirectional.

    A seed is all of a clip's randomness: models given one share their noise. `guidance` above 1 mixes in the empty
    prompt's velocity, for diffusion models. Videos are clipped to [−1, 1]. UserError for few steps of a bidirectional
    model.
    """
    network, codec, text_encoder = build.network(config), build.codec(config), build.text_encoder(config)
    latents = codec.latent_shape(config.data.frames, config.data.height, config.data.width)
    shared = {"uncond": Condition(text=jnp.asarray(text_encoder([""]))), "guidance": guidance}
    bidirectional = config.training == "bidirectional"
    if bidirectional and not isinstance(solver, Ode):
        raise UserError("a bidirectional model is not distilled: sample it with many steps, --ode=N")
    steps = 0 if isinstance(solver, Ode) else solver.most
    decode = jax.jit(lambda latents: jnp.clip(codec.decode(None, latents), -1, 1))

    def produce(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        cond, noise = Condition(text=jnp.asarray(text_encoder(prompts))), clip_noise(seeds, latents, steps)
        if bidirectional:
            clips = generate_whole(
                network, params, cond, noise.initial, times=solver.times(0), solver="euler", **shared
            )
        else:
            view = {"shape": noise.initial.shape, "chunks": build.chunk_pattern(config), "solver": solver}
            clips = generate(network, params, cond, None, noise=noise, **view, **shared)
        return np.asarray(decode(clips))

    return produce


def clip_noise(seeds: Sequence[int], shape: tuple[int, int, int, int], steps: int, image: bool = False) -> Noise:
    """The noise of clips of latents `shape` [frame, height, width, channel], each drawn from its own seed alone.

    More steps leave the earlier draws as they are. NumPy draws it: nothing to compile for each number of clips.
    """

    def draw(purpose: int, shape: tuple[int, ...]) -> jax.Array:
        draws = [np.random.default_rng((seed, purpose)).standard_normal(shape, np.float32) for seed in seeds]
        return jnp.asarray(np.stack(draws))

    renoised = [draw(2 + step, shape) for step in range(steps)]
    return Noise(
        initial=draw(0, (shape[0] - image, *shape[1:])),
        steps=jnp.stack(renoised) if renoised else jnp.zeros((0, len(seeds), *shape)),
        image=draw(1, (1, *shape[1:])),
    )
