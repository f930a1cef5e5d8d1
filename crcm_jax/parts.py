"""From a configuration to the parts of a run that are not its recipe: networks, codec, text encoder, chunk pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from crcm_jax.chunks import ChunkPattern
from crcm_jax.errors import UserError
from crcm_jax.models import registry
from crcm_jax.models.base import Codec, Network, TextEncoder
from crcm_jax.models.text.embedded import Embedded
from crcm_jax.models.text.umt5 import UMT5Config, UMT5Encoder
from crcm_jax.models.text.wan import TOKENS, WanTextEncoder, open_tokenizer
from crcm_jax.models.text.words import WORD_WIDTH, WordEncoder
from crcm_jax.models.vae.config import PUBLISHED
from crcm_jax.models.vae.pixels import PixelCodec
from crcm_jax.models.vae.wan import WanVAE
from crcm_jax.saving.weights import load_params


def chunk_pattern(config) -> ChunkPattern:
    """The chunk pattern, checked against the clip's latent frames."""
    pattern = ChunkPattern(**config.chunks)
    pattern.count(latent_shape(config)[0])
    return pattern


def network(config, role: str, causal: bool, mesh: Mesh | None = None) -> Network:
    """The network of a role, over the run's chunks or bidirectional.

    Roles may have another size than the student: `config.sizes.<role>` overrides `config.model`, as `registry.fields`
    says. mesh: what its arrays will lie on; None is one device, whatever `config.mesh` says.
    """
    family, fields = registry.fields(config.model, config.sizes.get(role, {}))
    return family.network(fields, chunk_pattern(config) if causal else None, mesh)


def codec(config) -> Codec:
    """Pixels ↔ latents."""
    return codec_of(config.codec)


def codec_of(section: Mapping[str, Any]) -> Codec:
    """The codec of a `config.codec`."""
    return _named("codec", section, {"pixels": PixelCodec, "wan_vae": _wan_vae})


def latent_shape(config) -> tuple[int, int, int, int]:
    """(frame, height, width, channel) of a clip's latents."""
    return codec(config).latent_shape(config.data.frames, config.data.height, config.data.width)


def prompt_shape(config) -> dict[str, tuple[int, ...]]:
    """The shapes of a prompt's leaves, without the batch."""
    family, fields = registry.fields(config.model)
    return family.prompt_shape(fields, config.text.length)


def text_encoder(config) -> TextEncoder:
    """Prompts → a condition's prompt; weights, where it has some, are read."""
    return text_encoder_of(config.text)


def text_encoder_of(section: Mapping[str, Any]) -> TextEncoder:
    """The text encoder of a `config.text`."""
    return Embedded(_named("text", section, {"words": WordEncoder, "umt5": _umt5}))


def text_width(section: Mapping[str, Any]) -> int:
    """Channels of what the text encoder of a `config.text` gives, without reading it."""
    return section.get("dim") or {"umt5": UMT5Config.xxl().dim}.get(section["name"], WORD_WIDTH)


def _wan_vae(version: str = "2.1", **options) -> Codec:
    if version not in PUBLISHED:
        raise UserError(f"codec.version {version!r} is not one of {', '.join(PUBLISHED)}")
    return WanVAE(PUBLISHED[version](**options))


def _umt5(
    weights: str = "", tokenizer: str = "", length: int = TOKENS, batch: int = 4, fix_unicode: bool = True, **sizes
) -> WanTextEncoder:
    for key, path in (("weights", weights), ("tokenizer", tokenizer)):
        if not path:
            raise UserError(f"--config.text.{key} is missing: see docs/weights.md for how to bring UMT5 in")
    encoder, reader = UMT5Encoder(UMT5Config.xxl(**sizes)), open_tokenizer(tokenizer)
    expect = jax.eval_shape(encoder.init, jax.random.key(0))
    params = load_params(weights, expect=expect, dtype=encoder.config.dtype)
    return WanTextEncoder(encoder, params, reader, length=length, batch=batch, fix_unicode=fix_unicode)


def _named(section: str, config, known: dict):
    options = dict(config)
    name = options.pop("name")
    if name not in known:
        raise UserError(f"{section}.name {name!r} is not one of {', '.join(known)}")
    return known[name](**_tuples(options))


def _tuples(options) -> dict:
    return {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in dict(options).items()}
