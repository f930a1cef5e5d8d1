"""The published Wan2.1 models by name: their sizes, and their weights from a folder of files in this project's layout.

A folder holds what `crcm convert --layout=ours` writes, `transformer.safetensors`, `vae.safetensors`,
`text_encoder.safetensors` and, for image-to-video, `image_encoder.safetensors`, and the text encoder's tokenizer as it
was published (`tokenizer.json` or a sentencepiece `*.model`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from crcm_jax.errors import UsageError, UserError
from crcm_jax.models.base import Params
from crcm_jax.models.text.umt5 import UMT5Config, UMT5Encoder
from crcm_jax.models.text.wan import MAX_TOKENS, WanTextEncoder, open_tokenizer
from crcm_jax.models.vae.config import WanVAEConfig
from crcm_jax.models.vae.wan import WanVAE
from crcm_jax.models.vision.clip import CLIPVision, CLIPVisionConfig
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.parallel.rules import Layout


@dataclasses.dataclass(frozen=True)
class Release:
    """The parts of a published model; `image` of image-to-video ones. tokens: how long text is cut or filled up to."""

    transformer: WanConfig
    vae: WanVAEConfig = dataclasses.field(default_factory=WanVAEConfig.wan21)
    text: UMT5Config = dataclasses.field(default_factory=UMT5Config.xxl)
    tokens: int = MAX_TOKENS
    image: CLIPVisionConfig | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The stems of the files in its folder."""
        return ("transformer", "vae", "text_encoder", *(("image_encoder",) if self.image else ()))


RELEASES = {
    "wan2.1-t2v-1.3b": Release(WanConfig.t2v_1_3b(remat="none")),
    "wan2.1-t2v-14b": Release(WanConfig.t2v_14b(remat="none")),
    "wan2.1-i2v-14b": Release(WanConfig.i2v_14b(remat="none"), image=CLIPVisionConfig.vit_h14()),
}


def release(name: str) -> Release:
    """UsageError for a name that is not in `RELEASES`."""
    if name not in RELEASES:
        raise UsageError(f"--model={name} is not one of {', '.join(RELEASES)}")
    return RELEASES[name]


def transformer_shapes(network: WanTransformer) -> Params:
    """Its parameters as they are read: the layers' matrices in the compute dtype, all others in float32, where the
    network uses them so; cut over its mesh, if it has one, by `parallel.rules`."""

    def narrow(path, leaf):
        matrix = path[0].key == "blocks" and path[-1].key == "kernel"
        return leaf.update(dtype=jnp.dtype(network.config.dtype) if matrix else jnp.float32)

    shapes = jax.tree_util.tree_map_with_path(narrow, jax.eval_shape(network.init, jax.random.key(0)))
    mesh = network.placement.mesh
    return shapes if mesh is None else Layout(mesh, network.rules).abstract(shapes)


def load_transformer(network: WanTransformer, folder: Path) -> Params:
    """Weights as `transformer_shapes` has them."""
    return _load(folder / "transformer.safetensors", transformer_shapes(network))


def load_vae(found: Release, folder: Path) -> tuple[WanVAE, Params]:
    """The autoencoder and its weights, in its compute dtype."""
    vae = WanVAE(found.vae)
    shapes = jax.eval_shape(vae.init, jax.random.key(0))
    return vae, _load(folder / "vae.safetensors", shapes, found.vae.dtype)


def load_text_encoder(found: Release, folder: Path) -> WanTextEncoder:
    """The text encoder with its weights, in its compute dtype, and its tokenizer."""
    encoder = UMT5Encoder(found.text)
    tokenizer = open_tokenizer(folder)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0))
    params = _load(folder / "text_encoder.safetensors", shapes, found.text.dtype)
    return WanTextEncoder(encoder, params, tokenizer, length=found.tokens)


def load_image_encoder(found: Release, folder: Path) -> tuple[CLIPVision, Params]:
    """The image encoder and its weights. Files with and without the projection, which is not used, will do."""
    assert found.image is not None, "only releases that take an image have one"
    path = folder / "image_encoder.safetensors"
    projection = (_meta(path).get("model") or {}).get("projection", found.image.projection)
    encoder = CLIPVision(dataclasses.replace(found.image, projection=projection))
    return encoder, _load(path, jax.eval_shape(encoder.init, jax.random.key(0)), found.image.dtype)


def recorded(folder: Path) -> dict[str, Any]:
    """What the transformer's weights say of themselves, such as `training` and `config`: nothing, if published ones."""
    path = folder / "transformer.safetensors"
    return _meta(path) if path.is_file() else {}


def latent_shape(found: Release, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(frame, height, width, channel) of a clip's latents; UserError where frames or sides do not divide."""
    try:
        shape = WanVAE(found.vae).latent_shape(frames, height, width)
    except ValueError as error:
        raise UserError(str(error)) from error
    _, ph, pw = found.transformer.patch
    if shape[1] % ph or shape[2] % pw:
        side = found.vae.stride[1]
        raise UserError(f"--size={width}x{height} does not divide into patches of {side * pw}x{side * ph} pixels")
    return shape


def check(folder: Path, names: Sequence[str]) -> None:
    """UserError, one sentence, where a part's file is missing: known before minutes are spent on reading another."""
    if not folder.is_dir():
        raise UserError(f"there is no folder of weights at {folder}: make one with crcm convert --layout=ours")
    for name in names:
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            raise UserError(f"{folder} holds no {path.name}: write it with crcm convert --to={path} --layout=ours")


def _meta(path: Path) -> dict[str, Any]:
    from crcm_jax.saving.weights import load_meta

    return load_meta(path)


def _load(path: Path, expect: Params, dtype: str | None = None) -> Params:
    # Here and not above: checkpoints bring in orbax, which describing a model does not need.
    from crcm_jax.saving.weights import load_params

    return load_params(path, expect=expect, dtype=None if dtype is None else jnp.dtype(dtype))
