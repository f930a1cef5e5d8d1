"""The published Wan2.1 models by name: their sizes, and their weights from a folder of files in this project's layout.

A folder holds what `crcm convert --layout=ours` writes, `transformer.safetensors`, `vae.safetensors` and
`text_encoder.safetensors`, and the text encoder's tokenizer as it was published (`tokenizer.json` or a sentencepiece
`*.model`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from crcm_jax.errors import UsageError, UserError
from crcm_jax.models.base import Params
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.models.wan.text import MAX_TOKENS, WanTextEncoder, load_tokenizer
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.models.wan.umt5 import UMT5Config, UMT5Encoder
from crcm_jax.models.wan.vae import WanVAE
from crcm_jax.models.wan.vae_config import WanVAEConfig


@dataclasses.dataclass(frozen=True)
class Release:
    """The parts of a published model. `tokens`: how long its text is cut or filled up to."""

    transformer: WanConfig
    vae: WanVAEConfig = dataclasses.field(default_factory=WanVAEConfig.wan21)
    text: UMT5Config = dataclasses.field(default_factory=UMT5Config.xxl)
    tokens: int = MAX_TOKENS


RELEASES = {
    "wan2.1-t2v-1.3b": Release(WanConfig.t2v_1_3b(remat="none")),
    "wan2.1-t2v-14b": Release(WanConfig.t2v_14b(remat="none")),
    "wan2.1-i2v-14b": Release(WanConfig.i2v_14b(remat="none")),
}


def release(name: str) -> Release:
    """UsageError for a name that is not in `RELEASES`."""
    if name not in RELEASES:
        raise UsageError(f"--model={name} is not one of {', '.join(RELEASES)}")
    return RELEASES[name]


def load_transformer(found: Release, folder: Path) -> Params:
    """Weights of the layers' matrices in the compute dtype, all others in float32, where the network uses them so."""

    def narrow(path, leaf):
        matrix = path[0].key == "blocks" and path[-1].key == "kernel"
        return leaf.update(dtype=jnp.dtype(found.transformer.dtype) if matrix else jnp.float32)

    shapes = jax.eval_shape(WanTransformer(found.transformer).init, jax.random.key(0))
    return _load(folder / "transformer.safetensors", jax.tree_util.tree_map_with_path(narrow, shapes))


def load_vae(found: Release, folder: Path) -> tuple[WanVAE, Params]:
    """The autoencoder and its weights, in its compute dtype."""
    vae = WanVAE(found.vae)
    shapes = jax.eval_shape(vae.init, jax.random.key(0))
    return vae, _load(folder / "vae.safetensors", shapes, found.vae.dtype)


def load_text_encoder(found: Release, folder: Path) -> WanTextEncoder:
    """The text encoder with its weights, in its compute dtype, and its tokenizer."""
    encoder = UMT5Encoder(found.text)
    try:
        tokenizer = load_tokenizer(folder)
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise UserError(str(error)) from error
    shapes = jax.eval_shape(encoder.init, jax.random.key(0))
    params = _load(folder / "text_encoder.safetensors", shapes, found.text.dtype)
    return WanTextEncoder(encoder, params, tokenizer, length=found.tokens)


def check(folder: Path) -> None:
    """UserError, one sentence, where a file is missing: known before minutes are spent on reading another."""
    if not folder.is_dir():
        raise UserError(f"there is no folder of weights at {folder}: make one with crcm convert --layout=ours")
    for name in ("transformer", "vae", "text_encoder"):
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            raise UserError(f"{folder} holds no {path.name}: write it with crcm convert --to={path} --layout=ours")


def _load(path: Path, expect: Params, dtype: str | None = None) -> Params:
    # Here and not above: checkpoints bring in orbax, which describing a model does not need.
    from crcm_jax.train.weights import load_params

    return load_params(path, expect=expect, dtype=None if dtype is None else jnp.dtype(dtype))
