"""What `crcm data build` makes examples with: a model's autoencoder on videos, or its transformer's own samples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from crcm_jax import pipeline
from crcm_jax.cli import _memory
from crcm_jax.data import video_files
from crcm_jax.data.build import Job, Made
from crcm_jax.data.example import Example
from crcm_jax.models.base import Condition
from crcm_jax.parallel import mesh as meshes
from crcm_jax.pipeline import Model
from crcm_jax.sampling import denoise_whole, teacher_times

STORED = ml_dtypes.bfloat16
"""The type of what is written (spec causal_rcm 7.4)."""


def refuse_what_cannot_fit(model: Model, options: argparse.Namespace, height: int, width: int) -> None:
    """UserError, before anything is read, for clips of `crcm data build` or weights that this machine cannot hold."""
    weights = model.codec_nbytes if options.videos else model.nbytes
    clips = options.batch * len(jax.local_devices())
    _memory.plan(model, clips, options.frames, height, width, weights=weights, mesh=None)


class _Maker:
    """What both share: the text encoder, and a batch cut over this process's devices, weights on each."""

    parts: tuple[str, ...]

    def __init__(self, model: str, weights: Path, *, frames: int, height: int, width: int, per_device: int = 1):
        devices = jax.local_devices()
        self.mesh = meshes.over((len(devices), 1, 1, 1), devices)
        self.batch = per_device * len(devices)
        self.frames, self.height, self.width = frames, height, width
        self.model = pipeline.load(model, weights=weights, mesh=self.mesh).streaming(None)
        self.model.require(*self.parts)
        self.encoder = self.model.text_encoder()

    def _cut(self, rows: np.ndarray):
        """Rows on the devices; those that a full batch lacks repeat the last, so that one program serves all."""
        rows = np.concatenate([rows, np.repeat(rows[-1:], self.batch - len(rows), 0)])
        return jax.device_put(rows, meshes.samples(self.mesh))

    def _examples(self, jobs: Sequence[Job], latents: jax.Array, text: np.ndarray) -> list[Made]:
        arrays = np.asarray(latents[: len(jobs)]).astype(STORED), text.astype(STORED)
        examples = [Example(job.key, z, e, job.prompt) for job, z, e in zip(jobs, *arrays)]
        return [example if example.flaw() is None else f"it {example.flaw()}" for example in examples]


class FromVideos(_Maker):
    """Videos → latents (the posterior's mean)."""

    parts = ("vae", "text_encoder")

    def __init__(self, model: str, weights: Path, *, fps: float, **shape):
        super().__init__(model, weights, **shape)
        self.fps = fps
        self.vae, self.params = self.model.codec, self.model.codec_params

    def prepare(self, jobs: Sequence[Job]) -> list[np.ndarray | str]:
        shape: dict[str, Any] = {"frames": self.frames, "height": self.height, "width": self.width, "fps": self.fps}
        return [video_files.read_clip(_video(job), clip=job.clip, **shape) for job in jobs]

    def make(self, jobs: Sequence[Job], prepared: list[np.ndarray | str]) -> list[Made]:
        good = [i for i, clip in enumerate(prepared) if not isinstance(clip, str)]
        made: list[Any] = list(prepared)  # the clips among them give way to examples
        if good:
            video = self._cut(np.stack([prepared[i] for i in good])).astype(jnp.float32) / 127.5 - 1
            kept = [jobs[i] for i in good]
            text = self.encoder([job.prompt for job in kept])
            for i, example in zip(good, self._examples(kept, self.vae.encode(self.params, video), text["text"])):
                made[i] = example
        return made


def _video(job: Job) -> Path:
    assert job.video is not None, "a job of a list of videos has one"
    return job.video


class FromTeacher(_Maker):
    """Prompts → a bidirectional model's samples, each from its own seed: `seed` plus its place in the list."""

    parts = ("transformer", "text_encoder")

    def __init__(
        self, model: str, weights: Path, *, steps: int, shift: float, sigma_max: float, guidance: float, solver: str,
        seed: int, negative: str, **shape,
    ):  # fmt: skip
        super().__init__(model, weights, **shape)
        self.shape = self.model.latent_shape(self.frames, self.height, self.width)
        self.times, self.seed = teacher_times(steps, shift, sigma_max), seed
        self.options: dict[str, Any] = {"times": self.times, "guidance": guidance, "solver": solver}
        self.uncond = Condition(meshes.everywhere(self.encoder([negative]), self.mesh))
        self.network = self.model.bound

    def prepare(self, jobs: Sequence[Job]) -> np.ndarray:
        return np.stack(
            [np.random.default_rng(self.seed + job.index).standard_normal(self.shape, np.float32) for job in jobs]
        )

    def make(self, jobs: Sequence[Job], prepared: np.ndarray) -> list[Made]:
        text = self.encoder([job.prompt for job in jobs])
        cond, noise = Condition(jax.tree.map(self._cut, text)), self._cut(prepared)
        for latents in denoise_whole(self.network, cond, noise, uncond=self.uncond, **self.options):
            # Waits for each step, so that it can be stopped between two.
            latents.block_until_ready()
        return self._examples(jobs, latents, text["text"])
