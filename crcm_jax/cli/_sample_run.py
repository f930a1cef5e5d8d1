"""The sampling of `crcm sample`: from a source and seeds to videos, with progress and speed for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from crcm_jax.cli._sample_sources import Source
from crcm_jax.evaluate.producer import clip_noise
from crcm_jax.evaluate.video import require_finite
from crcm_jax.parallel.mesh import everywhere
from crcm_jax.sampling import Solver, Whole, denoise_whole, stream


def videos(source: Source, seed: int) -> Iterator[tuple[range, np.ndarray]]:
    """(numbers of prompts, their videos `[clip, frame, height, width, channel]`), `source.batch` of them at a time.

    Clip i takes seed `seed` + i, however many there are and whatever they are made with.
    """
    count = jax.tree.leaves(source.cond.prompt)[0].shape[0]
    make = _whole if source.chunks is None else _stream
    for start in range(0, count, source.batch):
        # A last group that is not full is filled up with its last prompt, so that one program serves all groups.
        rows = np.minimum(np.arange(start, start + source.batch), count - 1)
        cond = everywhere(jax.tree.map(lambda leaf, rows=rows: leaf[rows], source.cond), source.mesh)
        video = require_finite(make(source, [seed + int(row) for row in rows], cond, start == 0), "the clip")
        yield range(start, min(start + source.batch, count)), video[: count - start]


def _whole(source: Source, seeds: Sequence[int], cond, first: bool) -> np.ndarray:
    noise = everywhere(clip_noise(seeds, source.latent_shape(), 0).initial, source.mesh)
    sampler = cast(Whole, source.solver)
    times = sampler.times
    if first:
        print("crcm: compiling", file=sys.stderr)
    steps = denoise_whole(
        source.model, cond, noise, times=times, solver=sampler.solver,
        uncond=everywhere(source.uncond, source.mesh), guidance=source.guidance,
    )  # fmt: skip
    ends = []
    with tqdm(total=len(times) - 1, unit="step", desc="denoising") as bar:
        for latents in steps:
            jax.block_until_ready(latents)
            ends.append(time.perf_counter())
            bar.update()
    began = time.perf_counter()
    video = require_finite(np.asarray(source.codec.decode(source.codec_params, latents)), "the clip")
    # The first step has compiled the program.
    each = f" of {(ends[-1] - ends[0]) / (len(ends) - 1):.2f} s" if len(ends) > 1 else ""
    print(f"{len(ends)} steps{each}, decoded in {time.perf_counter() - began:.1f} s")
    return video


def _stream(source: Source, seeds: Sequence[int], cond, first: bool) -> np.ndarray:
    latents, image, solver = source.latent_shape(), source.image, cast(Solver, source.solver)
    noise = clip_noise(seeds, latents, solver.draws, given=0 if image is None else 1)
    if image is not None:
        image = everywhere(jnp.broadcast_to(image, (len(seeds), *image.shape[1:])), source.mesh)
    noise, uncond = everywhere(noise, source.mesh), everywhere(source.uncond, source.mesh)

    def run():
        chunks = stream(
            source.model, cond, shape=(len(seeds), *latents), solver=solver, uncond=uncond,
            guidance=source.guidance, first=image, noise=noise,
        )  # fmt: skip
        return source.codec.decode_stream(source.codec_params, chunks)

    if first:
        print("crcm: compiling", file=sys.stderr)
        # A first chunk of another length, and the first one that keeps a noisy context, are programs of their own.
        for _, pixels in zip(range(max(solver.context.start, image is not None) + 2), run()):
            jax.block_until_ready(pixels)
    parts, latency, began = [], 0.0, time.perf_counter()
    with tqdm(total=source.clip.frames, unit="frame", desc="streaming") as bar:
        for pixels in run():
            # Here already: nobody need wait for the rest.
            parts.append(require_finite(np.asarray(pixels), "the clip"))
            latency = latency or time.perf_counter() - began
            bar.update(pixels.shape[1])
    seconds = time.perf_counter() - began
    video = np.concatenate(parts, 1)
    rate = video.shape[0] * video.shape[1] / seconds
    print(f"{rate:.1f} frames/s, first chunk after {1000 * latency:.0f} ms")
    return video
