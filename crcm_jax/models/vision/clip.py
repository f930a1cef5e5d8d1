"""The CLIP vision tower that Wan2.1's image-to-video models look at their first frame with (ViT-H/14).

A pre-norm vision transformer with a class token, learnt positions and exact GELU. Wan reads the hidden state before the
last layer, class token first; the last layer, the norm after it and the projection are kept so that weights go back as
whole as they came. Sources: `Wan2.1: wan/modules/clip.py`, transformers' `CLIPVisionModel`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crcm_jax.models.base import Params
from crcm_jax.models.core.declare import Declared
from crcm_jax.models.published import PARTS
from crcm_jax.models.wan.layers import LayerNorm, Linear, Mlp

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the training images' channels, for pixels in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """A CLIP vision tower; `CLIPVisionConfig.vit_h14()` is the one that Wan2.1 was trained with.

    image: pixels along either side; patch: pixels along a patch's. projection: channels of the space shared with text,
    None where a file leaves that matrix out. dtype: compute dtype; norms and softmax run in at least float32.
    """

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    image: int = 224
    patch: int = 14
    projection: int | None = None
    eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self):
        if self.dim % self.heads or self.image % self.patch or self.layers < 2:
            raise ValueError(
                f"a CLIP vision tower of width {self.dim}, {self.heads} heads, {self.layers} layers and patches of "
                f"{self.patch} in images of {self.image} does not divide"
            )
        jnp.dtype(self.dtype)

    @property
    def tokens(self) -> int:
        """Of an image: one for every patch, and the class token."""
        return 1 + (self.image // self.patch) ** 2

    @classmethod
    def vit_h14(cls, **changes) -> CLIPVisionConfig:
        return cls(**{**PARTS["clip-vit-h14"].fields, **changes})


class Attention(nnx.Module):
    """Multi-head self-attention, scaled by 1/√d."""

    def __init__(self, c: CLIPVisionConfig, init, rngs: nnx.Rngs):
        linear = lambda: Linear(c.dim, c.dim, init=init, dtype=jnp.dtype(c.dtype), rngs=rngs)  # noqa: E731
        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        self.heads = c.heads

    def __call__(self, x):
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        precision, wide = _precision(q.dtype), jnp.promote_types(q.dtype, jnp.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide, precision=precision)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, -1).astype(q.dtype)
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=precision).reshape(x.shape))


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: CLIPVisionConfig, rngs: nnx.Rngs):
        dtype, init = jnp.dtype(c.dtype), nnx.initializers.lecun_normal()
        exact = functools.partial(jax.nn.gelu, approximate=False)
        self.norm1, self.norm2 = (LayerNorm(c.dim, c.eps, dtype, affine=True) for _ in range(2))
        self.attention = Attention(c, init, rngs)
        self.mlp = Mlp(c.dim, c.ffn_dim, c.dim, exact, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _precision(dtype):
    # Float32 means float32 here: on GPUs and TPUs the default would round the factors to 10 or 8 bits.
    return jax.lax.Precision.HIGHEST if dtype.itemsize >= 4 else None


@dataclasses.dataclass(frozen=True)
class CLIPVision:
    """The vision tower of `config`.

    Parameters are `{"patch_embedding": [y, x, colour, channel], "class_token": …, "position": [token, channel],
    "norm_in": …, "layers": …, "norm_out": …, "projection": …}`, layers stacked on their leading axis.
    """

    config: CLIPVisionConfig

    @functools.cached_property
    def _layer(self) -> Declared:
        return Declared(lambda rngs: Layer(self.config, rngs))

    @functools.cached_property
    def _norm(self) -> Declared:
        c = self.config
        return Declared(lambda rngs: LayerNorm(c.dim, c.eps, jnp.dtype(c.dtype), affine=True))

    def init(self, key: jax.Array) -> Params:
        """Random parameters, float32."""
        c = self.config
        first, second = jax.random.split(key)
        draw = lambda i, *shape: 0.02 * jax.random.normal(jax.random.fold_in(first, i), shape)  # noqa: E731
        norm = lambda: {"scale": jnp.ones(c.dim), "bias": jnp.zeros(c.dim)}  # noqa: E731
        return {
            "patch_embedding": draw(0, c.patch, c.patch, 3, c.dim),
            "class_token": draw(1, c.dim),
            "position": draw(2, c.tokens, c.dim),
            "norm_in": norm(),
            "layers": jax.vmap(self._layer.init)(jax.random.split(second, c.layers)),
            "norm_out": norm(),
            **({} if c.projection is None else {"projection": draw(3, c.dim, c.projection)}),
        }

    @functools.partial(jax.jit, static_argnames="self")
    def __call__(self, params: Params, images: jax.Array) -> jax.Array:
        """Tokens `[batch, 1 + patch, channel]` before the last layer, of normalised `images` [batch, y, x, colour]."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        side = c.image // c.patch
        patches = images.astype(dtype).reshape(-1, side, c.patch, side, c.patch, 3).swapaxes(2, 3)
        kernel, precision = params["patch_embedding"].astype(dtype), _precision(dtype)
        x = jnp.einsum("bstyxc,yxcd->bstd", patches, kernel, precision=precision).reshape(len(images), -1, c.dim)
        first = jnp.broadcast_to(params["class_token"].astype(dtype), (len(x), 1, c.dim))
        x = jnp.concatenate([first, x], 1) + params["position"].astype(dtype)
        x = self._norm.bind(params["norm_in"])(x).astype(dtype)

        def step(x, params):
            return self._layer.bind(params)(x).astype(dtype), None

        return jax.lax.scan(step, x, jax.tree.map(lambda leaf: leaf[:-1], params["layers"]))[0]


def preprocess(image: np.ndarray, config: CLIPVisionConfig, *, crop: bool = False) -> np.ndarray:
    """Pixels `[height, width, 3]` uint8 of any size → what the tower takes, `[1, y, x, colour]` float32, normalised.

    As Wan does: the whole picture, squeezed into a square by bicubic interpolation without smoothing. With `crop`, as
    the pipeline of diffusers does: the middle of the picture whose shorter side Pillow has resized, with smoothing.
    """
    side = config.image
    if crop:
        pixels = _middle(image, side) / 255
    else:
        rows, columns = (bicubic(n, side) for n in image.shape[:2])
        pixels = np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float32) / 255, columns, optimize=True)
    return ((pixels - np.array(MEAN)) / np.array(STD)).astype(np.float32)[None]


def _middle(image: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    short = min(image.shape[:2])
    height, width = (side * n // short for n in image.shape[:2])
    top, left = (height - side) // 2, (width - side) // 2
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)[top : top + side, left : left + side]


def bicubic(size: int, to: int) -> np.ndarray:
    """The matrix `[to, size]` of cubic convolution (a = −3/4, edges repeated, pixel centres aligned by area).

    These are the weights of torch's `interpolate(mode="bicubic")`; `jax.image` and Pillow have a = −1/2.
    """
    a = -0.75
    centre = (np.arange(to) + 0.5) * size / to - 0.5
    first = np.floor(centre).astype(int)
    matrix = np.zeros((to, size))
    for offset in range(-1, 3):
        d = np.abs(centre - first - offset)
        near, far = ((a + 2) * d - (a + 3)) * d**2 + 1, a * (((d - 5) * d + 8) * d - 4)
        np.add.at(matrix, (np.arange(to), np.clip(first + offset, 0, size - 1)), np.where(d <= 1, near, far))
    return matrix
