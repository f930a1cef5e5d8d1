"""The layers that Wan's transformer is made of (spec wan21 1.2), as Flax NNX modules.

NNX only declares parameters and applies them; every transformation is `jax.*` over the plain tree of arrays.
Tokens keep their frame axis, `[batch, frame, token, channel]`, so that per-frame modulation broadcasts over tokens
instead of being expanded to them. Norms, modulation, time and head run in at least float32 ("wide"), the rest in the
module's compute dtype.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from crcm_jax.parallel.placement import Placement
from pallas_kernels.attention import Full, Mask, attention


def wide(dtype) -> jnp.dtype:
    """The dtype of norms and modulation beside a compute dtype: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(nnx.Module):
    """y = x·kernel + bias, in `dtype`. kernel `[in, out]`, bias `[out]`."""

    def __init__(self, inputs: int, outputs: int, *, init, dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.dtype = dtype

    def __call__(self, x):
        dtype = self.dtype
        # Float32 means float32 here: on GPUs and TPUs the default would round the factors to 10 or 8 bits.
        precision = jax.lax.Precision.HIGHEST if dtype.itemsize >= 4 else None
        y = jnp.dot(x.astype(dtype), self.kernel[...].astype(dtype), precision=precision)
        return y + self.bias[...].astype(dtype)


class Mlp(nnx.Module):
    """Linear, activation, Linear. Fields are named after the positions in the native checkpoints' Sequential."""

    def __init__(self, inputs: int, hidden: int, outputs: int, activation, *, init, dtype, rngs: nnx.Rngs):
        self.up = Linear(inputs, hidden, init=init, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, outputs, init=init, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        return self.down(self.activation(self.up(x)))


def gelu(x):
    """GELU, tanh form."""
    return jax.nn.gelu(x, approximate=True)


class RmsNorm(nnx.Module):
    """x·rsqrt(mean x² + eps), cast to the compute dtype, then × scale (spec wan21 1.2.5)."""

    def __init__(self, dim: int, eps: float, dtype):
        self.scale = nnx.Param(jnp.ones(dim))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x):
        x = x.astype(wide(self.dtype))
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.eps)
        return x.astype(self.dtype) * self.scale[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer norm in wide precision, with scale and bias only if `affine`."""

    def __init__(self, dim: int, eps: float, dtype, affine: bool = False):
        self.affine = affine
        if affine:
            self.scale, self.bias = nnx.Param(jnp.ones(dim)), nnx.Param(jnp.zeros(dim))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x):
        high = wide(self.dtype)
        x = x.astype(high)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.eps)
        if self.affine:
            x = x * self.scale[...].astype(high) + self.bias[...].astype(high)
        return x


def modulate(x, shift, scale):
    """x·(1 + scale) + shift, with shift and scale `[batch, frame or 1, channel]` over the tokens of each frame."""
    return x * (1 + scale[:, :, None]) + shift[:, :, None]


def rotate(x, rope):
    """Rotary embedding of interleaved channel pairs (2k, 2k+1).

    x `[batch, frame, token, head, channel]`; rope = (cos, sin), each `[frame, token, channel/2]`, in wide precision.
    """
    cos, sin = (table[None, :, :, None, :, None] for table in rope)
    pairs = x.astype(cos.dtype).reshape(*x.shape[:-1], -1, 2)
    # Each pair beside itself the other way round, not both halves put together: one pass over memory, forward and back.
    pairs = pairs * cos + jnp.flip(pairs, -1) * (sin * jnp.array([-1, 1], sin.dtype))
    return pairs.reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention with RMS norm on q and k over the whole width (spec wan21 1.2.5, 1.2.6).

    With `image`, a second set of keys and values for image tokens, whose output is added (Wan2.1 I2V).
    """

    def __init__(
        self, dim: int, heads: int, eps: float, *, image: bool, init, dtype, implementation, placement: Placement,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        linear = lambda: Linear(dim, dim, init=init, dtype=dtype, rngs=rngs)  # noqa: E731
        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        self.norm_q, self.norm_k = RmsNorm(dim, eps, dtype), RmsNorm(dim, eps, dtype)
        if image:
            self.k_img, self.v_img, self.norm_k_img = linear(), linear(), RmsNorm(dim, eps, dtype)
        self.heads, self.implementation, self.placement = heads, implementation, placement

    def _split(self, x):
        """`[…, heads·channel]` → `[…, head, channel]`."""
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def project(self, x, rope, tokens: int):
        """Rotated queries and keys, and values, `[batch, frame·token, head, channel]`, of a frame's first `tokens`."""
        q, k = (
            rotate(self._split(norm(linear(x))), rope)
            for norm, linear in ((self.norm_q, self.q), (self.norm_k, self.k))
        )
        return tuple(self.placement.to_heads(y, tokens) for y in (q, k, self._split(self.v(x))))

    def attend(self, x, q, k, v, *, context=None, mask: Mask):
        """Output projection of the attention of q over k, v (and the context's keys and values); shaped like x."""
        call = functools.partial(attention, implementation=self.implementation)
        out = self.placement.attend(call, q, k, v, context=context, mask=mask)
        out = self.placement.to_tokens(out, *x.shape[1:3])
        return self.o(out.reshape(x.shape))

    def text_keys(self, text):
        """Keys and values of the text tokens, the same for every stream of a layer."""
        return self._split(self.norm_k(self.k(text))), self._split(self.v(text))

    def image_keys(self, image):
        """Keys and values of the image tokens."""
        return self._split(self.norm_k_img(self.k_img(image))), self._split(self.v_img(image))

    def cross(self, x, *sources):
        """Cross-attention of tokens x over each (keys, values) of `sources`, outputs added. No rotation, no mask."""
        q = self._split(self.norm_q(self.q(x)))
        call = functools.partial(attention, mask=Full(), implementation=self.implementation)
        outs = [self.placement.attend_across(call, q, k, v) for k, v in sources]
        return self.o(sum(outs).reshape(x.shape))
