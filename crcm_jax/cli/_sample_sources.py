"""What `crcm sample` makes clips of: a model, its prompts and its image, with every encoder used and let go of."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from crcm_jax import pipeline
from crcm_jax.chunks import ChunkPattern
from crcm_jax.cli import _memory
from crcm_jax.cli import _sample_solver as solvers
from crcm_jax.cli._sample_mesh import batch, choose
from crcm_jax.data import pictures
from crcm_jax.errors import UsageError, UserError
from crcm_jax.models import registry
from crcm_jax.models.base import Codec, Condition, Params
from crcm_jax.models.bound import Bound
from crcm_jax.models.vision import clip as vision
from crcm_jax.models.wan.image import condition_latents, size_of
from crcm_jax.models.wan.prompt import EXTRA
from crcm_jax.pipeline import Clip, Model
from crcm_jax.sampling import Solver, Whole


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything that makes clips but their noise.

    loaded: the model, with its chunks and its mesh. cond: one row a prompt; uncond: one row. image: latents of a given
    first frame `[1, 1, …]`, or None. batch: prompts that are sampled at once; together: whether all prompts go to one
    file, one above the other. seconds: what reading took, by part.
    """

    loaded: Model
    clip: Clip
    cond: Condition
    uncond: Condition
    image: jax.Array | None
    solver: Solver | Whole
    guidance: float
    batch: int
    together: bool
    seconds: dict[str, float]

    @property
    def model(self) -> Bound:
        return self.loaded.bound

    @property
    def codec(self) -> Codec:
        return self.loaded.codec

    @property
    def codec_params(self) -> Params:
        return self.loaded.codec_params

    @property
    def mesh(self) -> Mesh | None:
        """What the parameters lie on."""
        return self.loaded.mesh

    @property
    def chunks(self) -> ChunkPattern | None:
        """The model's own; None of a bidirectional one."""
        return self.loaded.chunks

    def latent_shape(self) -> tuple[int, int, int, int]:
        """Of one clip."""
        return self.loaded.latent_shape(self.clip.frames, self.clip.height, self.clip.width)


def prepare(options: argparse.Namespace, prompts: Sequence[str]) -> Source:
    """A model with everything read. Text and image encoder are read, used and freed before anything else is read.

    UserError, one sentence, for weights that are missing or do not fit, and for options that the model cannot follow,
    before anything large is read.
    """
    if options.model:
        registry.release(options.model)
    model = pipeline.load(options.model or options.checkpoint, weights=options.weights, which=options.which)
    sees = model.image is not None
    solver, guidance = solvers.choose(options, model.meta, whole=sees)
    if options.model:
        model = model.streaming(None if solvers.whole(options, model.meta) or sees else _chunks(options, model))
    elif model.recipe is None:
        # Converted weights of a published model say as little as its folder does.
        model = model.streaming(None if solvers.whole(options, model.meta) or sees else ChunkPattern(1, 1))
    if sees and not options.image:
        raise UsageError(f"--model={model.name} needs --image=FILE, the clip's first frame")
    if not sees and options.crop_image:
        raise UsageError("--crop-image belongs to image-to-video models, which see their image through CLIP")
    picture = _picture(options.image, model.chunks, sees)
    clip = _clip(options, model, picture)
    model.latent_shape(clip.frames, clip.height, clip.width)
    mesh = choose(options.mesh, len(prompts), model.network.heads[1], model.nbytes)
    if "vae" in model.parts:
        size = clip.frames, clip.height, clip.width
        _memory.plan(model, batch(mesh), *size, weights=model.nbytes, mesh=mesh)
    model = model.on(mesh)
    model.require()
    whole = model.chunks is None
    print(f"crcm: {model.name}, {solvers.describe(solver, guidance, model.meta, whole=whole)}", file=sys.stderr)
    if model.recipe is not None and (odd := model.recipe.mismatch(solver)):
        print(f"crcm: warning: {odd}", file=sys.stderr)
    seconds: dict[str, float] = {}

    def timed(part: str, function, *args):
        began = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        seconds[part] = time.perf_counter() - began
        return result

    encoder = timed("reading the text encoder", model.text_encoder)
    texts = timed("text", encoder, [*prompts, options.negative or ""])
    del encoder
    seen = image = extra = None
    if sees:
        seen = timed("reading and using the image encoder", _seen, model, picture, options.crop_image)
    params = timed("reading the VAE", lambda: model.codec_params)
    if picture is not None:
        pixels = _pixels(picture, clip.width, clip.height, clip.channels)
        if sees:
            extra = timed("first frame", condition_latents, model.codec, params, pixels, clip.frames)
        else:
            image = timed("first frame", model.codec.encode, params, pixels)
    timed("reading the transformer", lambda: model.bound.params)

    def condition(rows: slice) -> Condition:
        def spread(leaf):
            return jnp.broadcast_to(leaf, (len(jax.tree.leaves(tree)[0]), *leaf.shape[1:]))

        tree = jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), texts)
        told = tree if seen is None else {**tree, "image": spread(seen)}
        return Condition(told, {} if extra is None else {EXTRA: spread(extra)})

    # Clips of a few pixels are looked at together.
    together, cut = "vae" not in model.parts, batch(mesh)
    at_once = -(-len(prompts) // cut) * cut if together else cut
    return Source(
        model, clip, condition(slice(0, -1)), condition(slice(-1, None)), image, solver, guidance, at_once, together,
        {} if together else seconds,
    )  # fmt: skip


def _chunks(options: argparse.Namespace, model: Model) -> ChunkPattern:
    """Those asked for, or those that the weights were trained with, or frame by frame."""
    if options.chunks:
        return ChunkPattern(*options.chunks)
    recorded = (model.meta.get("config") or {}).get("chunks") or {}
    return ChunkPattern(**{"first": 1, "size": 1, **recorded})


def _clip(options: argparse.Namespace, model: Model, picture: Any) -> Clip:
    """The clip that is asked for: the model's own where nothing else is said, with the proportions of the image that a
    published model is given, at its own area."""
    own = model.clip
    width, height = options.size or (own.width, own.height)
    if picture is not None and options.model and not options.size:
        width, height = picture.size
        width, height = size_of(width, height, own.width * own.height, model.side)
    return dataclasses.replace(
        own, frames=options.frames or own.frames, width=width, height=height, fps=options.fps or own.fps
    )


def _picture(path: str | None, chunks: ChunkPattern | None, seen: bool = False):
    """The image, in colour. chunks: None of a bidirectional model; seen: whether the model is an image-to-video one.

    UserError for what is no image, a model that takes none, or chunks whose first it cannot be.
    """
    if path is None:
        return None
    if chunks is None and not seen:
        raise UsageError(
            "--image is for causal models and image-to-video ones: a bidirectional one has no place for it"
        )
    if chunks is not None and chunks.first != 1:
        raise UserError(f"--image needs a first chunk of one latent frame, not {chunks.first}: use --chunks=1-N")
    return pictures.read(path)


def _pixels(picture, width: int, height: int, channels: int = 3) -> jax.Array:
    """An image as a clip of one frame, `[1, 1, height, width, channel]` in [−1, 1]."""
    from PIL import Image

    picture = picture.convert("L") if channels == 1 else picture
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), np.float32)
    return jnp.asarray(pixels.reshape(1, 1, height, width, channels) / 127.5 - 1)


def _seen(model: Model, picture, crop: bool) -> jax.Array:
    """The image's CLIP tokens `[1, token, channel]`."""
    encoder, params = model.image_encoder()
    return encoder(params, vision.preprocess(np.asarray(picture), encoder.config, crop=crop))
