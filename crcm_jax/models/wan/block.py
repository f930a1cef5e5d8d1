"""One layer of Wan's transformer."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx

from crcm_jax.models.wan import layers as wan
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.parallel.placement import ONE_DEVICE, Placement


class Block(nnx.Module):
    """One transformer layer (spec wan21 1.2.4)."""

    def __init__(self, c: WanConfig, rngs: nnx.Rngs, placement: Placement = ONE_DEVICE):
        dtype, near = jnp.dtype(c.dtype), nnx.initializers.truncated_normal(1 / math.sqrt(c.dim))
        heads: dict[str, Any] = {"init": near, "dtype": dtype, "implementation": c.attention}
        heads |= {"placement": placement, "rngs": rngs}
        self.modulation = nnx.Param(near(rngs.params(), (6, c.dim), jnp.float32))
        self.self_attn = wan.Attention(c.dim, c.heads, c.eps, image=False, **heads)
        self.cross_attn = wan.Attention(c.dim, c.heads, c.eps, image=c.image_dim is not None, **heads)
        self.norm1, self.norm2 = wan.LayerNorm(c.dim, c.eps, dtype), wan.LayerNorm(c.dim, c.eps, dtype)
        self.norm3 = wan.LayerNorm(c.dim, c.eps, dtype, affine=True)
        init = nnx.initializers.xavier_uniform()
        self.ffn = wan.Mlp(c.dim, c.ffn_dim, c.dim, wan.gelu, init=init, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def modulations(self, e):
        """The six (shift, scale, gate) × 2 of time projections e `[batch, frame or 1, 6, channel]`."""
        m = self.modulation[...].astype(e.dtype) + e
        return [m[:, :, i] for i in range(6)]

    def qkv(self, x, m, table, tokens: int):
        """Queries, keys and values of the self-attention, of the first `tokens` of each frame."""
        return self.self_attn.project(wan.modulate(self.norm1(x), m[0], m[1]).astype(self.dtype), table, tokens)

    def finish(self, x, m, sources, q, k, v, **view):
        """The rest of the layer: self-attention in a view of context, cross-attention, feed-forward."""
        x = self._gated(x, self.self_attn.attend(x, q, k, v, **view), m[2])
        x = x + self.cross_attn.cross(self.norm3(x).astype(self.dtype), *sources)
        h = self.ffn(wan.modulate(self.norm2(x), m[3], m[4]).astype(self.dtype))
        return self._gated(x, h, m[5])

    def sources(self, text, image):
        """Keys and values of everything that cross-attention looks at."""
        found = (self.cross_attn.text_keys(text),)
        return found if image is None else (*found, self.cross_attn.image_keys(image))

    def _gated(self, x, y, gate):
        return (x + y.astype(gate.dtype) * gate[:, :, None]).astype(x.dtype)
