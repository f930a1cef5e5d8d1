"""How Wan2.1's image-to-video models are told their first frame: as CLIP tokens, and as extra input channels.

The channels are a mask, one for each pixel frame of a latent one, that says which frames are given, and the latents of
the clip that has the given frame first and mid-grey (zero) frames after it. Sources: `Wan2.1: wan/image2video.py`,
`WanImageToVideoPipeline.prepare_latents` of diffusers.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from crcm_jax.models.base import Params
from crcm_jax.models.vae.wan import WanVAE


def condition_latents(vae: WanVAE, params: Params, image: jax.Array, frames: int) -> jax.Array:
    """`Condition.latents` of clips that start with `image`: `[batch, frame, height, width, mask + latent channel]`.

    image: pixels `[batch, 1, height, width, 3]` in [−1, 1]; frames: of the clip, in pixels.
    """
    grey = jnp.zeros((image.shape[0], frames - 1, *image.shape[2:]), image.dtype)
    latents = vae.encode(params, jnp.concatenate([image, grey], 1))
    given = jnp.arange(latents.shape[1]) == 0
    mask = jnp.broadcast_to(given[:, None, None, None], (*latents.shape[:-1], vae.config.stride[0]))
    return jnp.concatenate([mask.astype(latents.dtype), latents], -1)


def size_of(width: int, height: int, area: int, side: int) -> tuple[int, int]:
    """(width, height) in pixels of a clip with the proportions of an image, of at most `area` pixels; both multiples of
    `side`, and at least that."""
    # Roots of whole numbers: a square that is one must not come out a hair too small.
    exact = math.isqrt(area * width // height), math.isqrt(area * height // width)
    across, down = (max(side, n // side * side) for n in exact)
    return across, down
