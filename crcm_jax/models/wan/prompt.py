"""What Wan's transformer is told: text, an image for image-to-video models, and extra input channels a frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from crcm_jax.models.base import Condition
from crcm_jax.models.wan.config import WanConfig

EXTRA = "latents"
"""The name, in `Condition.frames`, of the extra input channels, `[batch, frame, height, width, channel]`."""


def prompt(text: jax.Array, image: jax.Array | None = None) -> dict[str, jax.Array]:
    """Wan's prompt tree. text: `[batch, token, channel]` embeddings, zeros past the prompt's end, which are attended
    (spec causal_rcm 7.4). image: `[batch, token, channel]` embeddings of image-to-video models."""
    return {"text": text} if image is None else {"text": text, "image": image}


def require(cond: Condition, config: WanConfig) -> None:
    """ValueError, one sentence, for a condition that is not one of this network's."""
    tree: Any = cond.prompt
    wanted = {"text": config.text_dim} | ({} if config.image_dim is None else {"image": config.image_dim})
    if not isinstance(tree, Mapping) or set(tree) != set(wanted):
        found = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
        raise ValueError(f"this Wan network's prompt is {{{', '.join(wanted)}}}, not {found}: it is another model's")
    for name, width in wanted.items():
        if tree[name].ndim != 3 or tree[name].shape[-1] != width:
            raise ValueError(
                f"the prompt's {name} has shape {list(tree[name].shape)}: this network wants [batch, token, {width}]"
            )
    extra = config.in_channels - config.out_channels
    if extra and EXTRA not in cond.frames:
        raise ValueError(f"this network wants {extra} extra channels a frame: give Condition.frames[{EXTRA!r}]")
    known = {EXTRA} if extra else set()
    if unknown := sorted(set(cond.frames) - known):
        raise ValueError(f"this network has no use for Condition.frames[{unknown[0]!r}]: leave it out")
    if extra and cond.frames[EXTRA].shape[-1] != extra:
        raise ValueError(
            f"Condition.frames[{EXTRA!r}] has {cond.frames[EXTRA].shape[-1]} channels and this network wants {extra}"
        )
