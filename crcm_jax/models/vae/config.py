"""Sizes and latent statistics of the Wan video autoencoders (spec wan21 2, spec cosmos3 2.5)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

CONVOLUTIONS = ("fold", "taps", "volume")

_MEAN_21 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_STD_21 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
    """A Wan autoencoder; `WanVAEConfig.wan21()` and `.wan22()` give the published ones.

    channels: latent channels; mean, std: their statistics, `channels` numbers each.
    encoder_dim, decoder_dim: width of the stage nearest the pixels; `multipliers` times it are the stages' widths.
    temporal: for each of the encoder's downsamplings, whether it halves time too (the decoder mirrors them).
    patch: side of the pixel squares folded into channels before the first convolution.
    residual: parameter-free shortcuts around whole stages, as in 2.2.
    dtype: compute dtype. Norms and the attention's softmax run in at least float32.
    step: latent frames worked on at once; memory grows with it, results do not change.
    convolution: how a convolution over time reaches the hardware (see `vae_layers.convolve`).
    """

    channels: int
    encoder_dim: int
    decoder_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    residual: bool = False
    dtype: str = "bfloat16"
    step: int = 1
    convolution: str = "fold"

    def __post_init__(self):
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"vae.mean and vae.std need vae.channels = {self.channels} numbers each")
        if len(self.temporal) != len(self.multipliers) - 1:
            raise ValueError(f"vae.temporal needs one flag between every two of {len(self.multipliers)} stages")
        if self.convolution not in CONVOLUTIONS:
            raise ValueError(f"vae.convolution {self.convolution!r} is not one of {', '.join(CONVOLUTIONS)}")
        if self.step < 1:
            raise ValueError(f"vae.step is {self.step}: at least one latent frame at a time")
        jnp.dtype(self.dtype)

    @property
    def stride(self) -> tuple[int, int]:
        """(pixel frames per latent frame, pixels per latent pixel along a side)."""
        return 2 ** sum(self.temporal), self.patch * 2 ** len(self.temporal)

    @classmethod
    def wan21(cls, **changes) -> WanVAEConfig:
        """16 channels, 4×8×8: every Wan2.1 model, and Wan2.2's 14B models."""
        base = {"channels": 16, "encoder_dim": 96, "decoder_dim": 96, "mean": _MEAN_21, "std": _STD_21}
        return cls(**{**base, **changes})

    @classmethod
    def wan22(cls, **changes) -> WanVAEConfig:
        """48 channels, 4×16×16: Wan2.2-TI2V-5B and Cosmos 3."""
        base = {"channels": 48, "encoder_dim": 160, "decoder_dim": 256, "mean": _MEAN_22, "std": _STD_22}
        return cls(**{**base, "patch": 2, "residual": True, **changes})


PUBLISHED = {"2.1": WanVAEConfig.wan21, "2.2": WanVAEConfig.wan22}
"""By version, as `codec.version` names it."""
