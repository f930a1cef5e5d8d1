"""The configuration of a Wan transformer (spec wan21 1.1); the published sizes stand in `models/wan/family.py`."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from crcm_jax.models.core.remat import REMAT
from crcm_jax.models.wan.family import COMMON, FAMILY
from pallas_kernels.attention import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """A Wan transformer. `WanConfig.published("1.3b")` and its kind are of the published sizes.

    text_dim, image_dim: channels of the text and image embeddings; image_dim None for text-to-video.
    dtype: compute dtype; norms, modulation, time and head run in at least float32.
    round_time: round 1000·t to bfloat16, as published Causal-rCM checkpoints were trained (spec causal_rcm 1.3).
    remat: what the backward pass recomputes: "none"; "block", everything inside a block; "attention", everything
        but attention; "offload", the same with attention's outputs kept in the host's memory (`remat`).
    attention: an implementation of `pallas_kernels.attention`, or None for the best that applies.
    """

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    in_channels: int = COMMON["in_channels"]
    out_channels: int = COMMON["out_channels"]
    patch: tuple[int, int, int] = COMMON["patch"]
    freq_dim: int = COMMON["freq_dim"]
    text_dim: int = COMMON["text_dim"]
    image_dim: int | None = None
    eps: float = 1e-6
    dtype: str = "bfloat16"
    round_time: bool = True
    remat: str = "block"
    attention: str | None = None

    def __post_init__(self):
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"model.dim {self.dim} must be model.heads {self.heads} times an even head width")
        if self.head_dim < 6:
            raise ValueError(f"head width {self.head_dim} leaves a RoPE axis without a channel pair: use at least 6")
        if self.patch[0] != 1:
            raise ValueError(f"model.patch {self.patch}: one latent frame per token in time is what chunks need")
        if self.remat not in REMAT:
            raise ValueError(f"model.remat {self.remat!r} is not one of {', '.join(REMAT)}")
        if self.attention is not None and self.attention not in IMPLEMENTATIONS:
            raise ValueError(f"model.attention {self.attention!r} is not one of {', '.join(IMPLEMENTATIONS)}")
        jnp.dtype(self.dtype)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @classmethod
    def published(cls, size: str, **changes) -> WanConfig:
        """Of a published size; UserError for an unknown one."""
        return cls(**{**FAMILY.size(size), **changes})

    @classmethod
    def t2v_1_3b(cls, **changes) -> WanConfig:
        return cls.published("1.3b", **changes)

    @classmethod
    def t2v_14b(cls, **changes) -> WanConfig:
        return cls.published("14b", **changes)

    @classmethod
    def i2v_14b(cls, **changes) -> WanConfig:
        return cls.published("i2v-14b", **changes)
