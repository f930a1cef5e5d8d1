"""A codec that only rearranges: space to depth, for pixels that need no learned autoencoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
from jaxtyping import Float

from crcm_jax.errors import UserError
from crcm_jax.models.base import Params
from crcm_jax.shapes import Array


@dataclasses.dataclass(frozen=True)
class PixelCodec:
    """Space to depth: `patch`×`patch` pixels become channels, frames stay frames; then (x − mean)/std.

    `mean` and `std` are those of the data's pixels in [−1, 1]. They bring latents to about zero mean and unit variance,
    which the noise schedules assume; a mostly empty canvas is far from it. Works on NumPy and JAX arrays alike, and
    gives back the kind it was given. It has no parameters: pass None.
    """

    patch: int = 2
    mean: float = 0.0
    std: float = 1.0
    channels: int = 1
    """Of the video: 1 grey, 3 colour."""

    def __post_init__(self):
        if self.patch < 1:
            raise UserError(f"codec.patch is {self.patch}, it must be at least one pixel")
        if not self.std > 0:
            raise UserError(f"codec.std is {self.std}, it must be positive")

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(frame, height, width, channel) of the latents of such a clip; UserError if the patch does not divide it."""
        if height % self.patch or width % self.patch:
            raise UserError(
                f"a canvas of {height}×{width} pixels does not split into patches of {self.patch}×{self.patch}: "
                "change data.height, data.width or codec.patch"
            )
        return frames, height // self.patch, width // self.patch, self.channels * self.patch**2

    @property
    def dtype(self) -> str:
        """Whatever it is given."""
        return "float32"

    def init(self, key: jax.Array) -> Params:
        """It has no parameters."""
        return {}

    def encode(
        self, params: Params, video: Float[Array, "batch frame height width channel"]
    ) -> Float[Array, "batch frame down across inner"]:
        """Pixels `[batch, frame, height, width, channel]` → latents `[…, height/p, width/p, channel·p²]`."""
        del params
        batch, frames, height, width, channels = video.shape
        if channels != self.channels:
            raise UserError(f"the video has {channels} channels and codec.channels is {self.channels}: make them agree")
        shape = self.latent_shape(frames, height, width)
        p = self.patch
        blocks = video.reshape(batch, frames, shape[1], p, shape[2], p, channels).transpose(0, 1, 2, 4, 3, 5, 6)
        return (blocks.reshape(batch, *shape) - self.mean) / self.std

    def decode(
        self, params: Params, latents: Float[Array, "batch frame down across inner"]
    ) -> Float[Array, "batch frame height width channel"]:
        """The inverse of `encode`. Values outside [−1, 1] are left as they are."""
        del params
        batch, frames, height, width, _ = latents.shape
        p = self.patch
        blocks = (latents * self.std + self.mean).reshape(batch, frames, height, width, p, p, self.channels)
        return blocks.transpose(0, 1, 2, 4, 3, 5, 6).reshape(batch, frames, height * p, width * p, self.channels)

    def decode_stream(self, params: Params, chunks: Iterator[Array]) -> Iterator[Array]:
        """Pixels of each latent chunk as it arrives; frames are independent, so nothing is carried over."""
        for chunk in chunks:
            yield self.decode(params, chunk)
