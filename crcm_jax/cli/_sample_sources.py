"""What `crcm sample` can sample: a run's checkpoint, or a published model from a folder of weights.

Both become a `Source`, which is all that sampling itself looks at.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from crcm_jax import parts, recipes
from crcm_jax.chunks import ChunkPattern
from crcm_jax.cli import _memory
from crcm_jax.cli import _sample_solver as solvers
from crcm_jax.cli._sample_mesh import batch, choose
from crcm_jax.data import pictures
from crcm_jax.errors import UsageError, UserError
from crcm_jax.evaluate import producer
from crcm_jax.models.base import Codec, Condition, Params
from crcm_jax.models.bound import Bound
from crcm_jax.models.vision import clip
from crcm_jax.models.wan import library
from crcm_jax.models.wan.image import condition_latents, size_of
from crcm_jax.models.wan.prompt import EXTRA, prompt
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.parallel.mesh import everywhere
from crcm_jax.parallel.placement import Placement
from crcm_jax.parallel.rules import Layout
from crcm_jax.sampling import Solver, Whole
from crcm_jax.saving.weights import load_meta

SIZE = (832, 480)
"""Width and height of a published model's clip; with an image, its proportions at this area."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything that makes clips but their noise.

    cond: one row a prompt; uncond: one row. image: latents of a given first frame `[1, 1, …]`, or None.
    frames, height, width: of a clip, in pixels. batch: prompts that are sampled at once; together: whether all prompts
    go to one file, one above the other. mesh: what the parameters lie on. seconds: what reading took, by part.
    """

    model: Bound
    codec: Codec
    codec_params: Params
    cond: Condition
    uncond: Condition
    image: jax.Array | None
    solver: Solver | Whole
    guidance: float
    frames: int
    height: int
    width: int
    fps: float
    batch: int
    together: bool
    mesh: Mesh | None
    seconds: dict[str, float]

    @property
    def chunks(self) -> ChunkPattern | None:
        """The model's own; None of a bidirectional one."""
        return self.model.network.chunks

    def latent_shape(self) -> tuple[int, int, int, int]:
        """Of one clip."""
        return self.codec.latent_shape(self.frames, self.height, self.width)


def from_checkpoint(options: argparse.Namespace, prompts: Sequence[str]) -> Source:
    """A run's own model. UserError for a bad checkpoint or schedule, and a model whose codec has weights of its own."""
    if ((load_meta(options.checkpoint).get("config") or {}).get("codec") or {}).get("name") == "wan_vae":
        raise UserError(
            f"{options.checkpoint} is a Wan transformer alone: write it with crcm convert --layout=ours as "
            "transformer.safetensors beside the VAE and the text encoder, and use --model and --weights"
        )
    config, params, meta = producer.load(options.checkpoint, options.which, causal=False)
    solver, guidance = solvers.choose(options, {**meta, "training": config.training, "config": config})
    network = recipes.student(config)
    said = solvers.describe(solver, guidance, {"training": config.training}, whole=network.chunks is None)
    print(f"crcm: {said}", file=sys.stderr)
    picture = _picture(options.image, network.chunks)
    codec, data = parts.codec(config), config.data
    codec_params = codec.init(jax.random.key(0))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    mesh = choose(options.mesh, len(prompts), network.heads[1], weights)
    network = recipes.student(config, mesh)
    if mesh is not None:
        params = jax.device_put(params, Layout(mesh, network.rules).shardings(params))
    image = None
    if picture is not None:
        image = codec.encode(codec_params, _pixels(picture, data.width, data.height, config.codec.get("channels", 1)))
    text, cut = parts.text_encoder(config), batch(mesh)

    def condition(prompts: Sequence[str]) -> Condition:
        return Condition(jax.tree.map(jnp.asarray, text(prompts)))

    return Source(
        Bound(network, params), codec, codec_params, condition(prompts), condition([options.negative or ""]), image,
        solver, guidance, data.frames, data.height, data.width, 8.0 if options.fps is None else options.fps,
        -(-len(prompts) // cut) * cut, True,
        mesh, {},
    )  # fmt: skip


def from_release(options: argparse.Namespace, prompts: Sequence[str]) -> Source:
    """A published model. Text and image encoder are read, used and freed before anything else is read."""
    found, folder = library.release(options.model), Path(options.weights)
    meta = library.recorded(folder)
    solver, guidance = solvers.choose(options, meta, whole=found.image is not None)
    whole = solvers.whole(options, meta) or found.image is not None
    chunks = None if whole else _chunks(options, meta)
    if found.image is not None and not options.image:
        raise UsageError(f"--model={options.model} needs --image=FILE, the clip's first frame")
    if found.image is None and options.crop_image:
        raise UsageError("--crop-image belongs to image-to-video models, which see their image through CLIP")
    picture = _picture(options.image, chunks, found.image is not None)
    frames = 81 if options.frames is None else options.frames
    width, height = _size(found, picture) if options.size is None else options.size
    _check_shape(found, frames, height, width, chunks)
    shapes = jax.tree.leaves(library.transformer_shapes(WanTransformer(found.transformer, chunks)))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)
    mesh = choose(options.mesh, len(prompts), found.transformer.heads, weights)
    _memory.plan(found, batch(mesh), frames, height, width, weights=weights, mesh=mesh)
    network = WanTransformer(found.transformer, chunks, Placement(mesh))
    library.check(folder, found.files)
    print(f"crcm: {options.model}, {solvers.describe(solver, guidance, meta, whole=whole)}", file=sys.stderr)
    seconds: dict[str, float] = {}

    def timed(part: str, function, *args):
        began = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        seconds[part] = time.perf_counter() - began
        return result

    encoder = timed("reading the text encoder", library.load_text_encoder, found, folder)
    texts = timed("text", encoder, [*prompts, options.negative or ""])
    del encoder
    seen = None
    if found.image is not None:
        seen = timed("reading and using the image encoder", _seen, found, folder, picture, options.crop_image)
    vae, vae_params = timed("reading the VAE", library.load_vae, found, folder)
    image = latents = None
    if picture is not None:
        pixels = _pixels(picture, width, height)
        if found.image is None:
            image = timed("first frame", vae.encode, vae_params, pixels)
        else:
            latents = timed("first frame", condition_latents, vae, vae_params, pixels, frames)
    params = timed("reading the transformer", library.load_transformer, network, folder)

    def condition(rows: np.ndarray) -> Condition:
        def spread(leaf):
            return None if leaf is None else jnp.broadcast_to(leaf, (len(rows), *leaf.shape[1:]))

        frames = {} if latents is None else {EXTRA: spread(latents)}
        return Condition(prompt(jnp.asarray(rows), spread(seen)), frames)

    return Source(
        Bound(network, params), vae, everywhere(vae_params, mesh), condition(texts[:-1]), condition(texts[-1:]), image,
        solver, guidance, frames, height, width, 16.0 if options.fps is None else options.fps,
        batch(mesh), False, mesh, seconds,
    )  # fmt: skip


def _chunks(options: argparse.Namespace, meta: dict[str, Any]) -> ChunkPattern:
    """Those asked for, or those that the weights were trained with, or frame by frame."""
    if options.chunks:
        return ChunkPattern(*options.chunks)
    return ChunkPattern(**{"first": 1, "size": 1, **((meta.get("config") or {}).get("chunks") or {})})


def _check_shape(found: library.Release, frames: int, height: int, width: int, chunks: ChunkPattern | None) -> None:
    """UserError where frames, sides or chunks do not divide."""
    latents = library.latent_shape(found, frames, height, width)
    try:
        if chunks is not None:
            chunks.count(latents[0])
    except ValueError as error:
        raise UserError(str(error)) from error


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


def _size(found: library.Release, picture) -> tuple[int, int]:
    """Width and height of a clip that are not given: the usual ones, or the image's proportions at their area."""
    if picture is None:
        return SIZE
    width, height = picture.size
    return size_of(width, height, SIZE[0] * SIZE[1], found.vae.stride[1] * found.transformer.patch[1])


def _pixels(picture, width: int, height: int, channels: int = 3) -> jax.Array:
    """An image as a clip of one frame, `[1, 1, height, width, channel]` in [−1, 1]."""
    from PIL import Image

    picture = picture.convert("L") if channels == 1 else picture
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), np.float32)
    return jnp.asarray(pixels.reshape(1, 1, height, width, channels) / 127.5 - 1)


def _seen(found: library.Release, folder: Path, picture, crop: bool) -> jax.Array:
    """The image's CLIP tokens `[1, token, channel]`."""
    encoder, params = library.load_image_encoder(found, folder)
    return encoder(params, clip.preprocess(np.asarray(picture), encoder.config, crop=crop))
