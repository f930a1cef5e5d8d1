"""From a configuration to the parts of a run that are not its recipe: networks, codec, text encoder, chunk pattern."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from crcm_jax.chunks import ChunkPattern
from crcm_jax.errors import UserError
from crcm_jax.models.base import Codec, Network, TextEncoder
from crcm_jax.models.text.embedded import Embedded
from crcm_jax.models.text.umt5 import UMT5Config, UMT5Encoder
from crcm_jax.models.text.wan import WanTextEncoder, open_tokenizer
from crcm_jax.models.text.words import WordEncoder
from crcm_jax.models.vae.config import WanVAEConfig
from crcm_jax.models.vae.pixels import PixelCodec
from crcm_jax.models.vae.wan import WanVAE
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.parallel.placement import Placement
from crcm_jax.saving.weights import load_params


def chunk_pattern(config) -> ChunkPattern:
    """The chunk pattern, checked against the clip's latent frames."""
    pattern = ChunkPattern(**config.chunks)
    pattern.count(latent_shape(config)[0])
    return pattern


def network(config, role: str, causal: bool, mesh: Mesh | None = None) -> Network:
    """The network of a role, over the run's chunks or bidirectional.

    Roles may have another size than the student: `config.sizes.<role>` overrides `config.model`.
    mesh: what its arrays will lie on; None is one device, whatever `config.mesh` says.
    """
    sizes = {**config.model, **config.sizes.get(role, {})}
    return WanTransformer(WanConfig(**_tuples(sizes)), chunk_pattern(config) if causal else None, Placement(mesh))


def codec(config) -> Codec:
    """Pixels ↔ latents."""
    return _named("codec", config.codec, {"pixels": PixelCodec, "wan_vae": _wan_vae})


def latent_shape(config) -> tuple[int, int, int, int]:
    """(frame, height, width, channel) of a clip's latents."""
    return codec(config).latent_shape(config.data.frames, config.data.height, config.data.width)


def prompt_shape(config) -> dict[str, tuple[int, ...]]:
    """The shapes of a prompt's leaves, without the batch."""
    return {"text": (config.text.length, config.model.text_dim)}


def text_encoder(config) -> TextEncoder:
    """Prompts → a condition's prompt."""
    return Embedded(_named("text", config.text, {"words": WordEncoder, "umt5": _umt5}))


def _wan_vae(version: str = "2.1", **options) -> Codec:
    known = {"2.1": WanVAEConfig.wan21, "2.2": WanVAEConfig.wan22}
    if version not in known:
        raise UserError(f"codec.version {version!r} is not one of {', '.join(known)}")
    return WanVAE(known[version](**options))


def _umt5(weights: str, tokenizer: str, **options) -> WanTextEncoder:
    for key, path in (("weights", weights), ("tokenizer", tokenizer)):
        if not path:
            raise UserError(f"--config.text.{key} is missing: see docs/weights.md for how to bring UMT5 in")
    encoder, reader = UMT5Encoder(UMT5Config.xxl()), open_tokenizer(tokenizer)
    expect = jax.eval_shape(encoder.init, jax.random.key(0))
    params = load_params(weights, expect=expect, dtype=encoder.config.dtype)
    return WanTextEncoder(encoder, params, reader, **options)


def _named(section: str, config, known: dict):
    options = dict(config)
    name = options.pop("name")
    if name not in known:
        raise UserError(f"{section}.name {name!r} is not one of {', '.join(known)}")
    return known[name](**_tuples(options))


def _tuples(options) -> dict:
    return {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in dict(options).items()}
