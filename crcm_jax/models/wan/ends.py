"""What stands before and after the layers of Wan's transformer."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from crcm_jax.models.core import rope
from crcm_jax.models.wan import layers as wan
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.parallel.placement import pad_to

TIME_SCALE = 1000.0
"""Rectified-flow t in [0, 1] reaches the network as 1000·t (spec causal_rcm 1.3)."""


class ImageEmbedding(nnx.Module):
    """LayerNorm, Linear, exact GELU, Linear, LayerNorm: CLIP tokens to text-like tokens (Wan2.1 I2V)."""

    def __init__(self, c: WanConfig, image_dim: int, rngs: nnx.Rngs):
        dtype, init = jnp.dtype(c.dtype), nnx.initializers.xavier_uniform()
        exact = functools.partial(jax.nn.gelu, approximate=False)
        self.norm_in = wan.LayerNorm(image_dim, 1e-5, dtype, affine=True)
        self.mlp = wan.Mlp(image_dim, image_dim, c.dim, exact, init=init, dtype=dtype, rngs=rngs)
        self.norm_out = wan.LayerNorm(c.dim, 1e-5, dtype, affine=True)

    def __call__(self, image):
        return self.norm_out(self.mlp(self.norm_in(image)))


class Ends(nnx.Module):
    """What comes before and after the layers: embeddings of patches, time, text and image, and the head."""

    def __init__(self, c: WanConfig, rngs: nnx.Rngs):
        dtype, high = jnp.dtype(c.dtype), wan.wide(jnp.dtype(c.dtype))
        xavier, small = nnx.initializers.xavier_uniform(), nnx.initializers.normal(0.02)
        patch = math.prod(c.patch)
        make = functools.partial(wan.Mlp, init=small, rngs=rngs)
        self.patch_embedding = wan.Linear(c.in_channels * patch, c.dim, init=xavier, dtype=dtype, rngs=rngs)
        self.time_embedding = make(c.freq_dim, c.dim, c.dim, jax.nn.silu, dtype=high)
        self.time_projection = wan.Linear(c.dim, 6 * c.dim, init=xavier, dtype=high, rngs=rngs)
        self.text_embedding = make(c.text_dim, c.dim, c.dim, wan.gelu, dtype=dtype)
        if c.image_dim is not None:
            self.image_embedding = ImageEmbedding(c, c.image_dim, rngs)
        zeros = nnx.initializers.zeros_init()
        self.head = wan.Linear(c.dim, c.out_channels * patch, init=zeros, dtype=high, rngs=rngs)
        modulation = nnx.initializers.truncated_normal(1 / math.sqrt(c.dim))
        self.head_modulation = nnx.Param(modulation(rngs.params(), (2, c.dim), jnp.float32))
        self.head_norm = wan.LayerNorm(c.dim, c.eps, dtype)
        self.config = c

    def tokens(self, x, extra, padded: int):
        """Latents `[batch, frame, height, width, channel]`, and extra channels of them or None → tokens
        `[batch, frame, token, channel]`, zeros at each frame's end up to `padded`."""
        if extra is not None:
            x = jnp.concatenate([x, extra.astype(x.dtype)], -1)
        _, ph, pw = self.config.patch
        # Channel slowest within a patch (spec causal_rcm 10.24).
        patches = rearrange(x, "b f (h p) (w q) c -> b f (h w) (c p q)", p=ph, q=pw)
        return self.patch_embedding(pad_to(patches, 2, padded))

    def time(self, t):
        """Times `[batch, frame or 1]` → (e `[batch, frame, channel]`, its six-way projection)."""
        c = self.config
        high = wan.wide(jnp.dtype(c.dtype))
        position = t.astype(jnp.promote_types(t.dtype, high)) * TIME_SCALE
        if c.round_time:
            position = position.astype(jnp.bfloat16).astype(position.dtype)
        half = c.freq_dim // 2
        # In float64 wherever jax has it enabled, then to the wide dtype.
        angle = position[..., None] * (rope.BASE ** (-jnp.arange(half, dtype=position.dtype) / half))
        e = self.time_embedding(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1).astype(high))
        projected = self.time_projection(jax.nn.silu(e))
        return e, projected.reshape(*projected.shape[:-1], 6, c.dim)

    def embed(self, text, image):
        """(text, image or None) as the layers' cross-attention wants them."""
        return self.text_embedding(text), None if image is None else self.image_embedding(image)

    def velocity(self, x, e, height: int, width: int):
        """Tokens → latents of the clip's (latent) height and width."""
        high = wan.wide(jnp.dtype(self.config.dtype))
        shift, scale = (self.head_modulation[...].astype(high)[i] + e for i in range(2))
        _, ph, pw = self.config.patch
        x = self.head(wan.modulate(self.head_norm(x), shift, scale))[:, :, : (height // ph) * (width // pw)]
        size = {"h": height // ph, "w": width // pw, "p": ph, "q": pw}
        return rearrange(x, "b f (h w) (p q c) -> b f (h p) (w q) c", **size)
