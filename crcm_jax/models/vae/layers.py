"""The layers of the Wan autoencoders (spec wan21 2), as Flax NNX modules.

Frames are `[batch, frame, height, width, channel]`. A layer that looks back in time takes `past`, what it kept of the
frames before, and returns `(y, past)` for its next call; `past=None` is the start of a clip. Nothing is hidden in the
modules: whatever a stream remembers is in those values.

The start of a clip is special in two places (spec wan21 2.2): a temporal downsampling passes the first frame through,
and a temporal upsampling does not double it, nor lets later frames see it. Written so, one pass over n frames and n
passes over one frame are the same function.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from crcm_jax.models.vae.config import WanVAEConfig


def _precision(dtype):
    # Float32 means float32 here: on GPUs and TPUs the default would round the factors to 10 or 8 bits.
    return jax.lax.Precision.HIGHEST if dtype.itemsize >= 4 else None


def _convolve_frames(x, kernel, stride: int, padding):
    """Each frame alone: x `[batch, frame, height, width, in]`, kernel `[height, width, in, out]`."""
    outputs = kernel.shape[-1]
    if x.dtype.itemsize < 4:
        # Tensor cores take 16-bit channels by eights; the image side has 3 or 12.
        more_in, more_out = -x.shape[-1] % 8, -outputs % 8
        x = jnp.pad(x, [(0, 0)] * 4 + [(0, more_in)])
        kernel = jnp.pad(kernel, [(0, 0)] * 2 + [(0, more_in), (0, more_out)])
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_precision(x.dtype),
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])[..., :outputs]


def convolve(x, kernel, *, time_stride: int = 1, stride: int = 1, padding=((0, 0), (0, 0)), method: str = "fold"):
    """Convolution of frames x `[batch, frame, height, width, in]`, unpadded in time.

    kernel: `[time, height, width, in, out]`. method, all equal but for rounding:

    * "fold": the taps' frames side by side in the channels, then one 2-D convolution: sums in float32, in hardware's
      favourite layout, for one more copy of the input per tap.
    * "taps": one 2-D convolution a tap, added up (in 16 bits, where that is the dtype).
    * "volume": one 3-D convolution.
    """
    taps = kernel.shape[0]
    if method == "volume":
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (time_stride, stride, stride),
            ((0, 0), *padding),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            precision=_precision(x.dtype),
        )
    last = x.shape[1] - taps
    frames = [x[:, k : k + last + 1 : time_stride] for k in range(taps)]
    if method == "taps":
        return sum(_convolve_frames(f, kernel[k], stride, padding) for k, f in enumerate(frames))
    return _convolve_frames(jnp.concatenate(frames, -1), rearrange(kernel, "t h w i o -> h w (t i) o"), stride, padding)


class Conv(nnx.Module):
    """Convolution plus bias, without padding in time.

    kernel `[time, height, width, in, out]`, or `[height, width, in, out]` where `size` has two numbers; bias `[out]`.
    """

    def __init__(self, inputs, outputs, size, c: WanVAEConfig, rngs: nnx.Rngs, *, time_stride=1, stride=1, padding=0):
        shape = (*size, inputs, outputs)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.dtype = jnp.dtype(c.dtype)
        self.time_stride, self.stride, self.method = time_stride, stride, c.convolution
        self.padding = (padding, padding) if isinstance(padding, tuple) else ((padding, padding),) * 2

    def __call__(self, x):
        kernel = self.kernel[...].astype(self.dtype)
        kernel = kernel[None] if kernel.ndim == 4 else kernel
        how = {"time_stride": self.time_stride, "stride": self.stride, "padding": self.padding, "method": self.method}
        return convolve(x.astype(self.dtype), kernel, **how) + self.bias[...].astype(self.dtype)


class CausalConv(Conv):
    """A convolution that looks back over its past frames, or over zeros at the start."""

    def __call__(self, x, past=None):
        before = self.kernel.shape[0] - 1
        if past is None:
            past = jnp.zeros((x.shape[0], before, *x.shape[2:]), x.dtype)
        x = jnp.concatenate([past, x], 1)
        return super().__call__(x), x[:, -before:]


class RmsNorm(nnx.Module):
    """√C · x / ‖x‖₂ over the C channels, × scale; the norm floored at 1e-12."""

    def __init__(self, channels: int, c: WanVAEConfig):
        self.scale = nnx.Param(jnp.ones(channels))
        self.dtype = jnp.dtype(c.dtype)

    def __call__(self, x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        norm = jnp.sqrt(jnp.sum(jnp.square(wide), -1, keepdims=True))
        scale = self.scale[...].astype(wide.dtype) * x.shape[-1] ** 0.5
        return (wide / jnp.maximum(norm, 1e-12) * scale).astype(self.dtype)


class ResidualBlock(nnx.Module):
    """Twice norm, SiLU, causal 3×3×3 convolution; plus the input, through a 1×1×1 convolution if widths differ."""

    def __init__(self, inputs: int, outputs: int, c: WanVAEConfig, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RmsNorm(inputs, c), RmsNorm(outputs, c)
        self.conv1 = CausalConv(inputs, outputs, (3, 3, 3), c, rngs, padding=1)
        self.conv2 = CausalConv(outputs, outputs, (3, 3, 3), c, rngs, padding=1)
        if inputs != outputs:
            self.shortcut = Conv(inputs, outputs, (1, 1, 1), c, rngs)
        self.same = inputs == outputs

    def __call__(self, x, past=None):
        past = past or {}
        h, first = self.conv1(jax.nn.silu(self.norm1(x)), past.get("conv1"))
        h, second = self.conv2(jax.nn.silu(self.norm2(h)), past.get("conv2"))
        return h + (x if self.same else self.shortcut(x)), {"conv1": first, "conv2": second}


class Attention(nnx.Module):
    """Every pixel of a frame attends to all pixels of that frame, with one head of all channels; plus the input."""

    def __init__(self, channels: int, c: WanVAEConfig, rngs: nnx.Rngs):
        self.norm = RmsNorm(channels, c)
        self.qkv = Conv(channels, 3 * channels, (1, 1), c, rngs)
        self.proj = Conv(channels, channels, (1, 1), c, rngs)

    def __call__(self, x):
        qkv = rearrange(self.qkv(self.norm(x)), "b f h w c -> (b f) (h w) c")
        wide = jnp.promote_types(x.dtype, jnp.float32)
        precision = _precision(qkv.dtype)

        def attend(qkv):
            q, k, v = jnp.split(qkv, 3, -1)
            scores = jnp.einsum("qc,kc->qk", q, k, preferred_element_type=wide, precision=precision)
            weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, -1).astype(v.dtype)
            return jnp.einsum("qk,kc->qc", weights, v, precision=precision)

        # One frame at a time: at 720p a frame's scores already take 0.8 GB.
        y = jax.lax.map(attend, qkv)
        return x + self.proj(y.reshape(x.shape))


class Downsample(nnx.Module):
    """Halves height and width (odd taps fall on a zero row below, a zero column right), and time if `temporal`."""

    def __init__(self, channels: int, temporal: bool, c: WanVAEConfig, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, (3, 3), c, rngs, stride=2, padding=(0, 1))
        if temporal:
            self.time_conv = Conv(channels, channels, (3, 1, 1), c, rngs, time_stride=2)
        self.temporal = temporal

    def __call__(self, x, past=None):
        x = self.conv(x)
        if not self.temporal:
            return x, {}
        kept = {"time_conv": x[:, -1:]}
        if past is not None:
            return self.time_conv(jnp.concatenate([past["time_conv"], x], 1)), kept
        return (jnp.concatenate([x[:, :1], self.time_conv(x)], 1) if x.shape[1] > 1 else x), kept


class Upsample(nnx.Module):
    """Doubles height and width by repetition and a convolution; doubles time first if `temporal`."""

    def __init__(self, inputs: int, outputs: int, temporal: bool, c: WanVAEConfig, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, (3, 3), c, rngs, padding=1)
        if temporal:
            self.time_conv = CausalConv(inputs, 2 * inputs, (3, 1, 1), c, rngs)
        self.temporal = temporal

    def _double(self, x, past):
        y, past = self.time_conv(x, past)
        return rearrange(y, "b f h w (t c) -> b (f t) h w c", t=2), {"time_conv": past}

    def __call__(self, x, past=None):
        kept = {}
        if self.temporal and past is not None:
            x, kept = self._double(x, past["time_conv"])
        elif self.temporal:
            first, rest = x[:, :1], x[:, 1:]
            if rest.shape[1]:
                rest, kept = self._double(rest, None)
                x = jnp.concatenate([first, rest], 1)
            else:
                kept = {"time_conv": jnp.zeros_like(jnp.concatenate([first, first], 1))}
        return self.conv(jnp.repeat(jnp.repeat(x, 2, 2), 2, 3)), kept


def average_down(x, outputs: int, time: int, side: int):
    """Blocks of time × side × side pixels into channels, then means of neighbouring channels down to `outputs`.

    An odd clip (its start) is filled with a zero frame in front.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (f t) (h p) (w q) c -> b f h w (c t p q)", t=time, p=side, q=side)
    return x.reshape(*x.shape[:4], outputs, -1).mean(-1)


def duplicate_up(x, outputs: int, time: int, side: int, start: bool):
    """Channels repeated and laid out as blocks of time × side × side pixels; a clip's `start` gives one frame."""
    x = jnp.repeat(x, outputs * time * side * side // x.shape[-1], -1)
    x = rearrange(x, "b f h w (c t p q) -> b (f t) (h p) (w q) c", t=time, p=side, q=side)
    return x[:, time - 1 :] if start else x
