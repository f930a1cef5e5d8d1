"""Over which devices `crcm sample` spreads its work: prompts first, then the heads and tokens of each clip."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from crcm_jax.errors import UsageError
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel.placement import SAMPLES, indivisible

ROOM = 0.6
"""The share of a device's memory that whole weights may take: the rest is for caches and activations."""


def choose(asked: Mapping[str, int] | None, prompts: int, heads: int, weights: int) -> Mesh | None:
    """The mesh with the lengths `asked` for, or a fitting one of all local devices; None for just one.

    prompts: clips that there are; heads: of the network; weights: its bytes. By default prompts are cut over as many
    devices as there are, and what is left cuts heads and tokens as far as heads divide. Weights that take more than
    `ROOM` of a device are cut as well. UsageError for a mesh that cannot be.
    """
    devices = jax.local_devices()
    shape = (
        {**dict.fromkeys(meshes.AXES, 1), **asked}
        if asked
        else _usual(len(devices), prompts, heads, _fits(devices[0], weights))
    )
    size, text = math.prod(shape.values()), ",".join(f"{name}={n}" for name, n in (asked or {}).items())
    if size > len(devices):
        raise UsageError(f"--mesh={text} needs {size} devices and there are {len(devices)}")
    if lack := indivisible(shape, heads):
        raise UsageError(f"--mesh={text}: {lack}: use a divisor")
    words = meshes.describe(tuple(shape.values()))
    if len(devices) > 1:
        idle = (
            f", {len(devices) - size} idle: what there is does not divide" if size < len(devices) and not asked else ""
        )
        print(f"crcm: {size} of {len(devices)} devices, {words}{idle}", file=sys.stderr)
    if size == 1:
        return None
    return meshes.over(tuple(shape.values()), devices[:size])


def _usual(devices: int, prompts: int, heads: int, fits: bool) -> dict[str, int]:
    samples, within = ("data", "context") if fits else ("fsdp", "tensor")

    def shape(n: int, m: int) -> dict[str, int]:
        return {**dict.fromkeys(meshes.AXES, 1), samples: n, within: m}

    n = max(d for d in range(1, devices + 1) if devices % d == 0 and d <= max(prompts, 1))
    most = devices // n
    return next(s for m in range(most, 0, -1) if not indivisible(s := shape(n, m), heads))


def _fits(device: Any, weights: int) -> bool:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit is None or weights <= ROOM * limit


def batch(mesh: Mesh | None) -> int:
    """Clips that are made at once: one for each part into which prompts are cut."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in SAMPLES)
