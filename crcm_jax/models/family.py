"""What a model family, a published network and a published model are: plain data that loads without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from crcm_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from crcm_jax.chunks import ChunkPattern
    from crcm_jax.models.base import Network, Params

Fields = Mapping[str, Any]
"""Fields of a network's configuration, or a section of a run's."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One published network, such as a transformer or an autoencoder.

    kind: its family in `convert.models`. fields: of its configuration. origin: the repository that it stands in.
    licence: as that repository says, or "unknown".
    """

    kind: str
    fields: Fields
    origin: str
    licence: str = "apache-2.0"


@dataclasses.dataclass(frozen=True)
class Release:
    """A published model that clips are made with.

    model, codec, text: as sections of a configuration; `model` may name a published `size`. image: fields of the image
    encoder, of image-to-video models. frames, width, height: of its usual clip, in pixels. fps: of its clips.
    """

    model: Fields
    codec: Fields
    text: Fields
    image: Fields | None = None
    frames: int = 81
    width: int = 832
    height: int = 480
    fps: float = 16.0


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks of one architecture. What its functions need of JAX they import when they are called.

    sizes: the fields of published sizes, those that differ between them. layouts: how its weights are laid out
      elsewhere, by the names that `crcm convert --layout` takes; "ours" is one more.
    network: (fields, chunks or None, mesh or None) → a described network. ValueError for fields that it cannot have.
    prompt_shape: (fields, tokens) → the shapes of a prompt's leaves, without the batch.
    patch: fields → latent pixels of a token, (height, width).
    stored: of a network, its parameters' shapes in the types that sampling reads them in, cut over its mesh.
    """

    name: str
    sizes: Mapping[str, Fields]
    layouts: tuple[str, ...]
    network: Callable[[Fields, ChunkPattern | None, Mesh | None], Network]
    prompt_shape: Callable[[Fields, int], dict[str, tuple[int, ...]]]
    patch: Callable[[Fields], tuple[int, int]]
    stored: Callable[[Network], Params]

    def size(self, name: str) -> dict[str, Any]:
        """The fields of a published size; UserError for an unknown one."""
        if name not in self.sizes:
            raise UserError(f"model.size {name!r} is not one of {', '.join(self.sizes)}")
        return dict(self.sizes[name])
