"""Over which devices `crcm sample` spreads its work: prompts first, then the heads and tokens of each clip."""

from __future__ import annotations

import math
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from crcm_jax.errors import UsageError
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel.placement import SAMPLES, indivisible

ROOM = 0.6
"""The share of a device's memory that whole weights may take: the rest is for caches and activations."""


def choose(text: str | None, prompts: int, heads: int, weights: int) -> Mesh | None:
    """The mesh of `--mesh=TEXT`, such as `data=2,context=4`, or a fitting one of all local devices; None for just one.

    prompts: clips that there are; heads: of the network; weights: its bytes. By default prompts are cut over as many
    devices as there are, and what is left cuts heads and tokens as far as heads divide. Weights that take more than
    `ROOM` of a device are cut as well. UsageError for a mesh that cannot be.
    """
    devices = jax.local_devices()
    if text:
        shape = {**dict.fromkeys(meshes.AXES, 1), **meshes.parse(text)}
    else:
        shape = _usual(len(devices), prompts, heads, _fits(devices[0], weights))
    size = math.prod(shape.values())
    if size > len(devices):
        raise UsageError(f"--mesh={text} needs {size} devices and there are {len(devices)}")
    if lack := indivisible(shape, heads):
        raise UsageError(f"--mesh={text}: {lack}: use a divisor")
    words = meshes.describe(tuple(shape.values()))
    if len(devices) > 1:
        idle = (
            f", {len(devices) - size} idle: what there is does not divide" if size < len(devices) and not text else ""
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
