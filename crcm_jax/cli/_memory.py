"""Whether what is asked for can be held at all, counted before anything is read."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from crcm_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from crcm_jax.pipeline import Model

_GB = 1e9
_PIXEL = 3 * 4
"""Bytes of a decoded pixel, in colour and float32."""
_MEND = "choose a smaller --size, fewer --frames, or a smaller batch or model"
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def of_machine() -> int:
    """Bytes of this machine's memory, or of the part of it that this process may use."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _LIMITS:
        path = Path(name)
        text = path.read_text().strip() if path.is_file() else ""
        sizes += [int(text)] if text.isdecimal() else []
    return min(sizes)


def refuse_what_cannot_fit(
    clips: int, frames: int, height: int, width: int, *, latents: int = 0, weights: int = 0, mend: str = _MEND
) -> None:
    """UserError, one sentence, if `clips` decoded clips at a time and what else lies beside them cannot be held.

    latents: bytes of a clip's; weights: bytes of them in the same memory. mend: what would make them fit.
    What is counted are the pixels of the finished clips, their latents and the weights: activations come on top.
    """
    room = of_machine()
    pixels, latents = clips * frames * height * width * _PIXEL, clips * latents
    need = pixels + latents + weights
    if need > room:
        many = f"{clips} clips" if clips > 1 else "a clip"
        parts = f"{_say(pixels)} of pixels, {_say(latents)} of latents" + (
            f", {_say(weights)} of weights" * bool(weights)
        )
        raise UserError(
            f"{many} of {frames} frames of {width}x{height} pixels cannot be held: {parts}, and there are "
            f"{_say(room)} of memory: {mend}"
        )


def plan(model: Model, clips: int, frames: int, height: int, width: int, *, weights: int, mesh: Mesh | None) -> None:
    """UserError if a model cannot make `clips` clips at a time here: its weights on the devices of `mesh`
    (None: one), or, where those have no memory of their own, beside the clips in this machine's.

    weights: bytes of the network that makes the latents, or of the autoencoder where that alone is used.
    """
    import jax

    shape = model.latent_shape(frames, height, width)
    parts = 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    refuse_weights(weights // parts, limit)
    beside = weights if limit is None else 0
    refuse_what_cannot_fit(clips, frames, height, width, latents=4 * math.prod(shape), weights=beside)


def refuse_weights(need: int, room: int | None) -> None:
    """UserError, one sentence, if `need` bytes of weights on each device are more than its `room`, if that is known."""
    if room is not None and need > room:
        raise UserError(
            f"the weights need {_say(need)} on each device, which has {_say(room)}: cut them over more devices, "
            "--mesh=fsdp=N, or choose a smaller model"
        )


def _say(size: int) -> str:
    return f"{size / _GB:,.1f} GB"
