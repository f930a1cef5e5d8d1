"""What `crcm sample` can stream: a run's checkpoint, or a published model from a folder of weights.

Both become a `Source`, which is all that sampling itself looks at.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import build
from crcm_jax.chunks import ChunkPattern
from crcm_jax.errors import UsageError, UserError
from crcm_jax.evaluate import clips, producer
from crcm_jax.models.base import Codec, Condition, Network, Params
from crcm_jax.models.wan import library
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.models.wan.vae import WanVAE
from crcm_jax.sampling import Few, Ode
from crcm_jax.schedule import MID_TIMES, StepPlan


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything a stream needs but its noise.

    cond: one row a prompt; uncond: one row. height, width: pixels; channels: 1 for grey.
    batch: prompts that are streamed at once, one above the other in one file.
    seconds: what reading and text took, by part.
    """

    network: Network
    params: Params
    codec: Codec
    codec_params: Params
    cond: Condition
    uncond: Condition | None
    chunks: ChunkPattern
    solver: Few | Ode
    guidance: float
    frames: int
    height: int
    width: int
    channels: int
    fps: float
    batch: int
    seconds: dict[str, float]

    def latent_shape(self) -> tuple[int, int, int, int]:
        """Of one clip."""
        return self.codec.latent_shape(self.frames, self.height, self.width)


def from_checkpoint(options: argparse.Namespace, prompts: Sequence[str]) -> Source:
    """A run's own model. UserError for a bad checkpoint or schedule."""
    config, params, _ = producer.load(options.checkpoint, options.which)
    rollout = config.rollout
    rollout.noisy_context |= options.noisy_context
    if options.context_start is not None:
        rollout.context_start = options.context_start
    solver, guidance = clips.own_solver(config)
    if options.steps:
        mid = options.mid or rollout.times
        solver, guidance = Few(step_plan(options.steps, mid, rollout.noisy_context, rollout.context_start)), 1.0
    elif options.ode:
        solver = ode(options)
    text = build.text_encoder(config)
    return Source(
        build.network(config), params, build.codec(config), None, Condition(text=jnp.asarray(text(prompts))),
        Condition(text=jnp.asarray(text([options.negative or ""]))), build.chunk_pattern(config), solver,
        guidance if options.guidance is None else options.guidance, config.data.frames, config.data.height,
        config.data.width, config.codec.get("channels", 1), options.fps or 8.0, len(prompts), {},
    )  # fmt: skip


def from_release(options: argparse.Namespace, prompts: Sequence[str]) -> Source:
    """A published model. The text encoder is read, used and freed before anything else is read."""
    found, folder = library.release(options.model), Path(options.weights)
    if found.transformer.image_dim is not None:
        raise UsageError(
            f"--model={options.model} looks at its image through CLIP, which is not part of this program: "
            "use --image with a causal text-to-video model"
        )
    width, height = options.size or (832, 480)
    frames, chunks = options.frames or 81, ChunkPattern(*(options.chunks or (1, 1)))
    _check_shape(found, frames, height, width, chunks)
    start = 1 if options.context_start is None else options.context_start
    if options.ode:
        solver, guidance = ode(options), 3.0 if options.guidance is None else options.guidance
    else:
        steps = options.steps or (4,)
        mid = options.mid or usual_times(steps, options.noisy_context)
        solver, guidance = Few(step_plan(steps, mid, options.noisy_context, start)), 1.0
        if options.guidance not in (None, 1.0):
            raise UsageError("--guidance belongs to --ode: a few-step student carries its guidance within")
    library.check(folder)
    seconds: dict[str, float] = {}

    def timed(part: str, function, *args):
        began = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        seconds[part] = time.perf_counter() - began
        return result

    encoder = timed("reading the text encoder", library.load_text_encoder, found, folder)
    texts = timed("text", encoder, [*prompts, options.negative or ""])
    del encoder
    vae, vae_params = timed("reading the VAE", library.load_vae, found, folder)
    params = timed("reading the transformer", library.load_transformer, found, folder)
    cond, uncond = (Condition(text=jnp.asarray(rows)) for rows in (texts[:-1], texts[-1:]))
    return Source(
        WanTransformer(found.transformer, chunks), params, vae, vae_params, cond, uncond, chunks, solver, guidance,
        frames, height, width, 3, options.fps or 16.0, 1, seconds,
    )  # fmt: skip


def _check_shape(found: library.Release, frames: int, height: int, width: int, chunks: ChunkPattern) -> None:
    """UserError where frames, sides or chunks do not divide."""
    try:
        latents = WanVAE(found.vae).latent_shape(frames, height, width)
        chunks.count(latents[0])
        _, ph, pw = found.transformer.patch
        if latents[1] % ph or latents[2] % pw:
            side = found.vae.stride[1]
            raise ValueError(f"--size={width}x{height} does not divide into patches of {side * pw}x{side * ph} pixels")
    except ValueError as error:
        raise UserError(str(error)) from error


def ode(options: argparse.Namespace) -> Ode:
    """The sampler of a diffusion model; UsageError for fewer than one step."""
    if options.ode < 1:
        raise UsageError(f"--ode={options.ode}: use at least 1 step")
    plan = StepPlan(noisy_context=options.noisy_context, context_start=options.context_start or 0)
    return Ode(options.ode, options.shift or 3.0, plan=plan)


def step_plan(steps: Sequence[int], mid: Sequence[Sequence[float]], noisy: bool, start: int) -> StepPlan:
    """`StepPlan`, its complaints the user's."""
    try:
        return StepPlan(tuple(steps), tuple(tuple(row) for row in mid), noisy, start)
    except ValueError as error:
        raise UserError(str(error)) from error


def usual_times(steps: Sequence[int], noisy: bool) -> tuple[tuple[float, ...], ...]:
    """Where published students stop on their way, for each entry of `steps` (spec causal_rcm 6.1)."""
    two = (5 / 8,) if noisy else (5 / 6,)
    return tuple(two if n == 2 else MID_TIMES[: max(n - 1, 0)] for n in steps)


def first_frame(path: str, source: Source) -> jax.Array:
    """Latents `[1, 1, height, width, channel]` of an image, resized to the clip. UserError for what is no image."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture = picture.convert("L" if source.channels == 1 else "RGB")
            pixels = np.asarray(picture.resize((source.width, source.height), Image.Resampling.LANCZOS))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    pixels = pixels.reshape(1, 1, source.height, source.width, -1).astype(np.float32) / 127.5 - 1
    return source.codec.encode(source.codec_params, jnp.asarray(pixels))
