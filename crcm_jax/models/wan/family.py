"""The Wan family: its sizes, its published models, and how its networks are made (spec wan21 1.1)."""

from __future__ import annotations

from crcm_jax.models.family import Family, Fields, Part, Release
from crcm_jax.models.published import FPS
from crcm_jax.models.published import PARTS as SHARED

TOKENS = 512
"""Tokens of text that the published transformers look at, the end-of-sequence token included."""

COMMON = {
    "in_channels": 16, "out_channels": 16, "patch": (1, 2, 2), "freq_dim": 256,
    "text_dim": SHARED["umt5-xxl"].fields["dim"],
}  # fmt: skip
"""What all text-to-video sizes share."""

_14B = {"dim": 5120, "ffn_dim": 13824, "heads": 40, "layers": 40}

SIZES = {
    "1.3b": {"dim": 1536, "ffn_dim": 8960, "heads": 12, "layers": 30},
    "14b": _14B,
    # Beside the noisy latents, a mask and the given frame's latents; 2.1 sees the frame through CLIP as well.
    "i2v-14b": {**_14B, "in_channels": 36, "image_dim": SHARED["clip-vit-h14"].fields["dim"]},
    "i2v-a14b": {**_14B, "in_channels": 36},
}

PARTS = {
    "wan2.1-t2v-1.3b": Part("wan-transformer", SIZES["1.3b"], "Wan-AI/Wan2.1-T2V-1.3B"),
    "wan2.1-t2v-14b": Part("wan-transformer", SIZES["14b"], "Wan-AI/Wan2.1-T2V-14B"),
    "wan2.1-i2v-14b": Part("wan-transformer", SIZES["i2v-14b"], "Wan-AI/Wan2.1-I2V-14B-480P"),
    "wan2.2-i2v-a14b": Part("wan-transformer", SIZES["i2v-a14b"], "Wan-AI/Wan2.2-I2V-A14B"),
}
"""Published transformers."""

VAE = {"name": "wan_vae", "version": "2.1"}
TEXT = {"name": "umt5", "length": TOKENS}


def _release(size: str, image: Fields | None = None) -> Release:
    model = {"family": "wan", "size": size, "remat": "none"}
    return Release(model, VAE, TEXT, image, fps=FPS["wan_vae"])


RELEASES = {
    "wan2.1-t2v-1.3b": _release("1.3b"),
    "wan2.1-t2v-14b": _release("14b"),
    "wan2.1-i2v-14b": _release("i2v-14b", SHARED["clip-vit-h14"].fields),
}
"""Published models that this program samples."""


def _network(fields, chunks, mesh):
    from crcm_jax.models.wan.config import WanConfig
    from crcm_jax.models.wan.transformer import WanTransformer
    from crcm_jax.parallel.placement import Placement

    return WanTransformer(WanConfig(**fields), chunks, Placement(mesh))


def _prompt_shape(fields: Fields, tokens: int) -> dict[str, tuple[int, ...]]:
    return {"text": (tokens, fields.get("text_dim", COMMON["text_dim"]))}


def _patch(fields: Fields) -> tuple[int, int]:
    return fields.get("patch", COMMON["patch"])[1:]


def _stored(network):
    """The layers' matrices in the compute dtype, all else in float32: as the network uses them."""
    import jax
    import jax.numpy as jnp

    from crcm_jax.parallel.rules import Layout

    def narrow(path, leaf):
        matrix = path[0].key == "blocks" and path[-1].key == "kernel"
        return leaf.update(dtype=jnp.dtype(network.config.dtype) if matrix else jnp.float32)

    shapes = jax.tree_util.tree_map_with_path(narrow, jax.eval_shape(network.init, jax.random.key(0)))
    mesh = network.placement.mesh
    return shapes if mesh is None else Layout(mesh, network.rules).abstract(shapes)


FAMILY = Family("wan", SIZES, ("native", "diffusers", "rcm"), _network, _prompt_shape, _patch, _stored)
