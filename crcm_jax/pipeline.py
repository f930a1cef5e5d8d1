"""From a path or a name to a model that makes clips: what sampling, judging, data and notebooks call.

    load("out/sf_dmd")                                      a run's workdir, checkpoint folder or .safetensors file
    load("out/wan_sf_dmd", weights="weights/wan2.1")        the same of a Wan model, whose other parts lie elsewhere
    load("weights/transformer.safetensors")                 converted weights, the other parts beside them
    load("wan2.1-t2v-1.3b", weights="weights/wan2.1")       a published model by name

Loading only describes. Each part is read when it is asked for, so that an encoder can be used and let go of before the
transformer is read:

    model = load("wan2.1-t2v-1.3b", weights="weights/wan2.1").streaming(ChunkPattern(1, 1))
    cond = Condition(model.text_encoder()(["a cat in the rain"]))
    chunks = stream(model.bound, cond, shape=(1, *model.latent_shape()), solver=Few(), noise=noise)
    for pixels in model.codec.decode_stream(model.codec_params, chunks): …

A folder of weights holds what `crcm convert --layout=ours` writes, `transformer.safetensors`, `vae.safetensors`,
`text_encoder.safetensors` and, for image-to-video, `image_encoder.safetensors`, and the text encoder's tokenizer as it
was published (`tokenizer.json` or a sentencepiece `*.model`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crcm_jax import parts, recipes
from crcm_jax.chunks import ChunkPattern
from crcm_jax.errors import UsageError, UserError, blame_config
from crcm_jax.models import registry
from crcm_jax.models.base import Codec, Network, Params, TextEncoder
from crcm_jax.models.bound import Bound
from crcm_jax.models.family import Family, Fields
from crcm_jax.models.published import FPS
from crcm_jax.models.vision.clip import CLIPVision, CLIPVisionConfig
from crcm_jax.parallel.mesh import everywhere
from crcm_jax.recipes import Recipe
from crcm_jax.sampling import Solver, Whole
from crcm_jax.saving.weights import load_meta, load_params


@dataclasses.dataclass(frozen=True)
class Clip:
    """A model's usual clip: pixel frames, their height and width in pixels, frames per second, colour channels."""

    frames: int
    height: int
    width: int
    fps: float
    channels: int = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model as its files describe it, and their readers.

    name: as it was asked for. fields: of its network. text: as in `config.text`. image: fields of the image encoder
    that it sees a first frame with, or None. files: part → its file. chunks: how it streams; None of a bidirectional
    model, and of published weights, which do not say (`streaming`). recipe, config, meta: of the run behind it; None
    and empty where the files record none. params: weights that are used in place of those on file. mesh: what its
    arrays will lie on.
    """

    name: str
    family: Family
    fields: Fields
    codec: Codec
    text: Fields
    clip: Clip
    files: Mapping[str, Path]
    which: str = "ema"
    image: Fields | None = None
    chunks: ChunkPattern | None = None
    recipe: Recipe | None = None
    config: ConfigDict | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    params: Params | None = None
    mesh: Mesh | None = None

    def on(self, mesh: Mesh | None) -> Model:
        """The same, read onto a mesh."""
        return dataclasses.replace(self, mesh=mesh)

    def streaming(self, chunks: ChunkPattern | None) -> Model:
        """The same with other chunks; bidirectional with None."""
        return dataclasses.replace(self, chunks=chunks)

    @property
    def network(self) -> Network:
        """Described, not read. ValueError where the mesh does not divide its heads."""
        return self.family.network(self.fields, self.chunks, self.mesh)

    @property
    def sampler(self) -> tuple[Solver | Whole, float] | None:
        """(sampler, guidance) that its recipe means it for; None where nothing is recorded."""
        return None if self.config is None else recipes.own_sampler(self.config)

    @property
    def parts(self) -> tuple[str, ...]:
        """Its parts that have weights, by the stems of their files in a folder."""
        codec = ("vae",) if self._codec_shapes else ()
        text = ("text_encoder",) if self.text["name"] == "umt5" else ()
        return ("transformer", *codec, *text, *(("image_encoder",) if self.image else ()))

    @property
    def nbytes(self) -> int:
        """Of the transformer's weights, in the types that they are read in."""
        leaves = jax.tree.leaves(self.family.stored(self.on(None).network))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    @property
    def codec_nbytes(self) -> int:
        """Of the codec's weights, in the type that they are read in."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self._codec_shapes))
        return size * jnp.dtype(self.codec.dtype).itemsize if size else 0

    @property
    def side(self) -> int:
        """Pixels along the side of a token: what a clip's height and width must be multiples of."""
        latents = self.codec.latent_shape(self.clip.frames, self.clip.height, self.clip.width)
        return self.clip.height // latents[1] * self.family.patch(self.fields)[0]

    def latent_shape(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """(frame, height, width, channel) of the latents of a clip, by default of its usual one. UserError where
        frames, sides or chunks do not divide."""
        frames, height, width = frames or self.clip.frames, height or self.clip.height, width or self.clip.width
        try:
            shape = self.codec.latent_shape(frames, height, width)
            if self.chunks is not None:
                self.chunks.count(shape[0])
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error
        patch = self.family.patch(self.fields)
        if shape[1] % patch[0] or shape[2] % patch[1]:
            sides = f"{width // shape[2] * patch[1]}x{height // shape[1] * patch[0]}"
            raise UserError(f"--size={width}x{height} does not divide into patches of {sides} pixels")
        return shape

    def require(self, *names: str) -> None:
        """UserError, one sentence, where the weights of a part (by default of any) are missing: known before minutes
        are spent on reading another."""
        for name in names or self.parts:
            path = self.files.get(name)
            if path is None:
                raise UserError(
                    f"{self.name} is a transformer alone: --weights=DIR must name a folder with its {name}.safetensors"
                )
            if not path.parent.is_dir():
                raise UserError(
                    f"there is no folder of weights at {path.parent}: make one with crcm convert --layout=ours"
                )
            if not path.exists():
                raise UserError(
                    f"{path.parent} holds no {path.name}: write it with crcm convert --to={path} --layout=ours"
                )

    @functools.cached_property
    def bound(self) -> Bound:
        """The network with its weights, which are read now: the layers' matrices in the compute dtype."""
        network = self.network
        if self.params is not None:
            return Bound(network, self.params)
        self.require("transformer")
        return Bound(network, load_params(self.files["transformer"], self.which, expect=self.family.stored(network)))

    @functools.cached_property
    def codec_params(self) -> Params:
        """The codec's weights, which are read now, in its compute dtype, whole on each device."""
        if not self._codec_shapes:
            return self.codec.init(jax.random.key(0))
        self.require("vae")
        dtype = jnp.dtype(self.codec.dtype)
        return everywhere(load_params(self.files["vae"], expect=self._codec_shapes, dtype=dtype), self.mesh)

    def text_encoder(self) -> TextEncoder:
        """The text encoder, which is read now and not kept: it is gone when its caller lets go of it."""
        wanted, width = self.family.prompt_shape(self.fields, 1)["text"][-1], parts.text_width(self.text)
        if width != wanted:
            raise UserError(f"text of {width} channels is not for {self.name}, which takes {wanted}: change text.dim")
        section = dict(self.text)
        if "text_encoder" in self.parts:
            self.require("text_encoder")
            section |= {"weights": str(self.files["text_encoder"]), "tokenizer": str(self.files.get("tokenizer", ""))}
        return parts.text_encoder_of(section)

    def image_encoder(self) -> tuple[CLIPVision, Params]:
        """The image encoder and its weights, read now and not kept. Files with and without the projection, which is
        not used, will do. UserError of a model that sees no image."""
        if self.image is None:
            raise UserError(f"{self.name} sees no image: it has no image encoder")
        self.require("image_encoder")
        path, config = self.files["image_encoder"], CLIPVisionConfig(**self.image)
        projection = (load_meta(path).get("model") or {}).get("projection", config.projection)
        encoder = CLIPVision(dataclasses.replace(config, projection=projection))
        shapes = jax.eval_shape(encoder.init, jax.random.key(0))
        return encoder, load_params(path, expect=shapes, dtype=jnp.dtype(config.dtype))

    @functools.cached_property
    def _codec_shapes(self) -> Params:
        return jax.eval_shape(self.codec.init, jax.random.key(0))


def load(
    path_or_name: str | Path, *, weights: str | Path | None = None, which: str = "ema", mesh: Mesh | None = None
) -> Model:
    """The model that a path or the name of a published one stands for; nothing large is read yet.

    weights: the folder of a published model's weights, or of the parts that a run has not of its own; by default those
    that its configuration names, or beside converted weights. which: a run's "ema" or "params". mesh: what its arrays
    will lie on. UserError, one sentence, for what is missing, damaged, or does not say what it is.
    """
    name = str(path_or_name)
    folder = None if weights is None else Path(weights)
    if name in registry.RELEASES:
        if folder is None:
            raise UsageError(f"--model={name} needs --weights=DIR, a folder that crcm convert has written")
        return _release(name, folder / "transformer.safetensors", folder).on(mesh)
    meta = load_meta(path_or_name)
    if set(meta.get("config") or {}) >= _SECTIONS:
        return _run(name, ConfigDict(meta["config"]), meta, folder, which).on(mesh)
    if meta.get("name") in registry.RELEASES:
        path = Path(path_or_name)
        return _release(meta["name"], path, folder or path.parent).on(mesh)
    raise UserError(
        f"{name} does not say how it was configured: give a run's workdir or checkpoint, or the folder of a published "
        f"model's weights with its name, one of {', '.join(registry.RELEASES)}"
    )


def of_run(config, params: Params) -> Model:
    """The model of a run that is going on, with the weights that it has now."""
    return dataclasses.replace(_run("the run", config, {"training": config.training}, None, "ema"), params=params)


_SECTIONS = {"training", "model", "chunks", "codec", "text", "data"}
"""Of a configuration, what makes clips."""


def _run(name: str, config: ConfigDict, meta: Mapping[str, Any], folder: Path | None, which: str) -> Model:
    recipe, meta = recipes.of(config), {**meta, "training": config.training}
    with blame_config():
        family, fields = registry.fields(config.model, config.get("sizes", {}).get("student", {}))
        codec, chunks = parts.codec(config), parts.chunk_pattern(config) if recipe.causal else None
    if folder is None:
        init = config.get("init", {})
        found = {"vae": init.get("codec"), "text_encoder": config.text.get("weights")}
        found |= {"tokenizer": config.text.get("tokenizer")}
        files = {part: Path(path) for part, path in found.items() if path}
    else:
        files = _beside(folder)
    kind, data = config.codec.name, config.data
    clip = Clip(
        data.frames, data.height, data.width, FPS[kind], config.codec.get("channels", 1) if kind == "pixels" else 3
    )
    return Model(
        name, family, fields, codec, dict(config.text), clip, {**files, "transformer": Path(name)}, which,
        chunks=chunks, recipe=recipe, config=config, meta=meta,
    )  # fmt: skip


def _release(name: str, transformer: Path, folder: Path) -> Model:
    found = registry.release(name)
    family, fields = registry.fields(found.model)
    meta = load_meta(transformer) if transformer.is_file() else {}
    recipe = recipes.named(meta["training"]) if meta.get("training") else None
    recorded = meta.get("config") or {}
    chunks = ChunkPattern(**{"first": 1, "size": 1, **(recorded.get("chunks") or {})})
    return Model(
        name, family, fields, parts.codec_of(found.codec), found.text,
        Clip(found.frames, found.height, found.width, found.fps), {**_beside(folder), "transformer": transformer},
        image=found.image, chunks=chunks if recipe is not None and recipe.causal else None, recipe=recipe,
        config=ConfigDict(recorded) if set(recorded) >= _SECTIONS else None, meta=meta,
    )  # fmt: skip


def _beside(folder: Path) -> dict[str, Path]:
    """The parts in a folder of weights."""
    names = ("vae", "text_encoder", "image_encoder")
    return {**{name: folder / f"{name}.safetensors" for name in names}, "tokenizer": folder}
