"""What a run needs of the encoders: the codec's weights, the text encoder, and the negative prompt's embedding.

Data that are latents already need none of them, and then nothing large is read.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import parts
from crcm_jax.data import pipeline, tensor_file, texts
from crcm_jax.errors import UsageError
from crcm_jax.models.base import Codec, Condition, Params, TextEncoder
from crcm_jax.saving.weights import load_params


def codec_params(config, codec: Codec) -> Params:
    """The weights in `config.init.codec`, in the codec's compute dtype; None for data that are latents already and for
    a codec without weights. UsageError if they are needed and missing."""
    shapes = jax.eval_shape(codec.init, jax.random.key(0))
    if pipeline.holds_latents(config) or not jax.tree.leaves(shapes):
        return None
    path = config.init.get("codec", "")
    if not path:
        raise UsageError(
            "--config.init.codec is missing: the weights of the VAE (docs/weights.md says how to get them)"
        )
    return load_params(path, expect=shapes, dtype=jnp.dtype(codec.dtype))


def text_encoder(config) -> TextEncoder | None:
    """The text encoder of data that hold prompts; None for data that hold their embeddings."""
    return None if pipeline.holds_latents(config) else parts.text_encoder(config)


def negative_prompt(config, encoder: TextEncoder | None, *, needed: bool) -> Condition:
    """What guidance leads away from, a condition of one row, as `config.init.uncond` says (spec causal_rcm 7.4).

    A `.pt` file is the embedding itself, any other the negative prompt's text, and '' the empty prompt; text needs an
    encoder, which is built here if `encoder` is None. Zeros if no loss looks at it (`needed`). UsageError if the file
    is missing or of another shape, or an encoder is needed that has no weights.
    """
    path = config.init.get("uncond", "")
    if path and not Path(path).is_file():
        raise UsageError(f"--config.init.uncond={path}: there is no such file")
    if path.endswith(".pt"):
        return Condition({"text": _read(path, *parts.prompt_shape(config)["text"])})
    if encoder is None and not path:
        if not needed:
            return Condition({n: np.zeros((1, *shape), np.float32) for n, shape in parts.prompt_shape(config).items()})
        raise UsageError(
            f"training {config.training!r} needs --config.init.uncond: the negative prompt's embedding as a .pt file, "
            "or its text and --config.text.weights; crcm data embed writes the former"
        )
    prompt = texts.read(path).strip() if path else ""
    return Condition((encoder or parts.text_encoder(config))([prompt]))


def _read(path: str, tokens: int, channels: int) -> np.ndarray:
    embedding = tensor_file.loads(Path(path).read_bytes(), path)
    shape = embedding.shape[1:] if embedding.ndim == 3 and len(embedding) == 1 else embedding.shape
    if len(shape) != 2 or shape[1] != channels or shape[0] > tokens:
        raise UsageError(
            f"--config.init.uncond={path} is of shape {list(embedding.shape)}, needed is [{tokens}, {channels}], "
            "text.length by model.text_dim"
        )
    filled = np.zeros((1, tokens, channels), np.float32)
    filled[0, : shape[0]] = embedding.reshape(shape)
    return filled
