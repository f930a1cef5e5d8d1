"""The Wan video autoencoder as a codec (`models.base.Codec`): whole clips, or chunk by chunk.

Both are one loop over time. A clip is worked on `config.step` latent frames (four times as many pixel frames) at a
time, the causal state of every layer going from one turn to the next, so memory does not grow with the clip's length,
and 720p fits without cutting frames into tiles (which would change the result: the middle attention sees whole frames).
A chunk's state is a value: `decode_chunk(params, latents, cache) -> pixels, cache`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Float

from crcm_jax.models.base import Params
from crcm_jax.models.core.declare import Declared
from crcm_jax.models.vae.config import WanVAEConfig
from crcm_jax.models.vae.network import Decoder, Encoder
from crcm_jax.shapes import Array

Pixels: TypeAlias = Float[Array, "batch pixel_frame height width 3"]
Latents: TypeAlias = Float[Array, "batch frame down across channel"]

VAECache = Any
"""What every layer keeps of the frames before: a nested dict of `[batch, 1 or 2, height, width, channel]` arrays."""

_NETWORKS = {"encoder": Encoder, "decoder": Decoder}


def _over_time(apply, x, first: int, step: int, past):
    """`apply(x, past) -> y, past` over x's frames (axis 1): `first` frames if the clip starts here, then by `step`."""
    outputs = []
    if past is None:
        y, past = apply(x[:, :first], None)
        outputs.append(y)
        x = x[:, first:]
    turns, rest = divmod(x.shape[1], step)
    if turns:
        whole = x[:, : turns * step].reshape(x.shape[0], turns, step, *x.shape[2:])

        def turn(past, x):
            y, past = apply(x, past)
            return past, y

        past, y = jax.lax.scan(turn, past, jnp.moveaxis(whole, 1, 0))
        outputs.append(jnp.moveaxis(y, 0, 1).reshape(x.shape[0], -1, *y.shape[3:]))
    if rest:
        y, past = apply(x[:, turns * step :], past)
        outputs.append(y)
    return jnp.concatenate(outputs, 1), past


@dataclasses.dataclass(frozen=True)
class WanVAE:
    """The autoencoder of `config`. Latents are normalised, float32; pixels are in [−1, 1], float32.

    Parameters are `{"encoder": …, "decoder": …}`; decoding reads only the latter.
    """

    config: WanVAEConfig

    @property
    def dtype(self) -> str:
        """See `models.base.Codec`."""
        return self.config.dtype

    def init(self, key: jax.Array) -> Params:
        """Random parameters, float32."""
        keys = jax.random.split(key, len(_NETWORKS))
        return {name: network.init(k) for (name, network), k in zip(self._networks.items(), keys)}

    @functools.cached_property
    def _networks(self) -> dict[str, Declared]:
        return {name: Declared(functools.partial(make, self.config)) for name, make in _NETWORKS.items()}

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(frame, height, width, channel) of the latents of a clip of that many frames and pixels.

        Raises ValueError for a clip that is not 1 + 4k frames of whole latent pixels.
        """
        time, side = self.config.stride
        if frames < 1 or (frames - 1) % time:
            raise ValueError(f"a clip of {frames} frames is not 1 + {time}k frames, as this autoencoder needs")
        if height % side or width % side:
            raise ValueError(f"frames of {height}×{width} pixels do not divide into latent pixels of {side}×{side}")
        return 1 + (frames - 1) // time, height // side, width // side, self.config.channels

    def encode(self, params: Params, video: Pixels) -> Latents:
        """Latents (the posterior's mean) of pixels `[batch, 1 + 4k, height, width, 3]`."""
        return self.encode_chunk(params, video)[0]

    def decode(self, params: Params, latents: Latents) -> Pixels:
        """Pixels `[batch, 1 + 4k, height, width, 3]` of latents `[batch, 1 + k, …]`."""
        return self.decode_chunk(params, latents)[0]

    @functools.partial(jax.jit, static_argnames="self")
    def encode_chunk(self, params: Params, video: Pixels, cache: VAECache | None = None) -> tuple[Latents, VAECache]:
        """(latents, cache) of the next frames of a clip: 1 + 4k of them where `cache` is None (the start), else 4k.

        Raises ValueError for other numbers of frames, and for sizes that do not divide.
        """
        time = self.config.stride[0]
        self.latent_shape(video.shape[1] + (0 if cache is None else 1), *video.shape[2:4])
        network = self._networks["encoder"].bind(params["encoder"])
        z, cache = _over_time(network, video.astype(self.config.dtype), 1, self.config.step * time, cache)
        mean, std = self._statistics()
        return (z[..., : self.config.channels].astype(mean.dtype) - mean) / std, cache

    @functools.partial(jax.jit, static_argnames="self")
    def decode_chunk(self, params: Params, latents: Latents, cache: VAECache | None = None) -> tuple[Pixels, VAECache]:
        """(pixels, cache) of the next latent frames of a clip; `cache` is None at its start.

        1 + k latent frames become 1 + 4k pixel frames at the start, later k become 4k. However a clip is cut into
        chunks, its pixels are those of `decode`. Raises ValueError for latents of another number of channels.
        """
        if latents.shape[-1] != self.config.channels or not latents.shape[1]:
            raise ValueError(
                f"latents of shape {latents.shape} are not [batch, frame ≥ 1, height, width, {self.config.channels}]"
            )
        mean, std = self._statistics()
        z = (latents.astype(mean.dtype) * std + mean).astype(self.config.dtype)
        network = self._networks["decoder"].bind(params["decoder"])
        x, cache = _over_time(network, z, 1, self.config.step, cache)
        return jnp.clip(x.astype(mean.dtype), -1.0, 1.0), cache

    def decode_stream(self, params: Params, chunks: Iterator[Latents]) -> Iterator[Pixels]:
        """Pixels of each latent chunk as it arrives; together, exactly the pixels of `decode`."""
        cache = None
        for latents in chunks:
            pixels, cache = self.decode_chunk(params, latents, cache)
            yield pixels

    def _statistics(self):
        # Applied in float32 (or wider) whatever the networks compute in: the latents are float32 at rest.
        dtype = jnp.promote_types(self.config.dtype, jnp.float32)
        return jnp.asarray(self.config.mean, dtype), jnp.asarray(self.config.std, dtype)
