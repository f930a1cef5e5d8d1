"""config.json of the PyTorch classes that load our exports.

These are `WanTransformer3DModel` and `AutoencoderKLWan` of diffusers, `UMT5EncoderModel` and `CLIPVisionModel` (with
its projection, if there is one) of transformers; the fields are the classes' own arguments.
"""

from __future__ import annotations

from typing import Any

from crcm_jax.convert import models

_DIFFUSERS = "0.42.1"
"""The release whose classes these were tried with."""


def of(model: models.Model) -> dict[str, Any]:
    """The contents of config.json for `model`."""
    if model.family is models.TRANSFORMER:
        return _transformer(model.config)
    if model.family is models.UMT5:
        return _umt5(model.config)
    if model.family is models.CLIP:
        return _clip(model.config)
    return _vae(model.config)


def _transformer(c: Any) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": _DIFFUSERS,
        "added_kv_proj_dim": None if c.image_dim is None else c.dim,
        "attention_head_dim": c.head_dim,
        "cross_attn_norm": True,
        "eps": c.eps,
        "ffn_dim": c.ffn_dim,
        "freq_dim": c.freq_dim,
        "image_dim": c.image_dim,
        "in_channels": c.in_channels,
        "num_attention_heads": c.heads,
        "num_layers": c.layers,
        "out_channels": c.out_channels,
        "patch_size": list(c.patch),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": c.text_dim,
    }


def _vae(c: Any) -> dict[str, Any]:
    time, side = c.stride
    residual = {
        "decoder_base_dim": c.decoder_dim,
        "in_channels": 3 * c.patch**2,
        "is_residual": True,
        "out_channels": 3 * c.patch**2,
        "patch_size": c.patch,
    }
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": _DIFFUSERS,
        "attn_scales": [],
        "base_dim": c.encoder_dim,
        "dim_mult": list(c.multipliers),
        "dropout": 0.0,
        "latents_mean": list(c.mean),
        "latents_std": list(c.std),
        "num_res_blocks": c.blocks,
        "scale_factor_spatial": side,
        "scale_factor_temporal": time,
        "temperal_downsample": list(c.temporal),
        "z_dim": c.channels,
        **(residual if c.residual else {}),
    }


def _clip(c: Any) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel" if c.projection is None else "CLIPVisionModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": c.dim,
        "image_size": c.image,
        "intermediate_size": c.ffn_dim,
        "layer_norm_eps": c.eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": c.heads,
        "num_channels": 3,
        "num_hidden_layers": c.layers,
        "patch_size": c.patch,
        "projection_dim": c.projection or 512,
    }


def _umt5(c: Any) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"],
        "d_ff": c.ffn_dim,
        "d_kv": c.head_dim,
        "d_model": c.dim,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": c.eps,
        "model_type": "umt5",
        "num_heads": c.heads,
        "num_layers": c.layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": c.max_distance,
        "relative_attention_num_buckets": c.buckets,
        "vocab_size": c.vocabulary,
    }
