"""What one device of each kind has and can do, and what a name such as `v5p:4x4x4` or `h200:8x4` asks for.

Peaks as read on 2026-11-21: of TPUs from docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, which count both
directions of all links of a chip together; of H100 and H200 SXM from pages that quote NVIDIA's data sheets (dense
products; NVLink counted the same way). Memory of the GPUs is what their driver reports.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import NamedTuple

from crcm_jax.errors import UsageError

GIB = 1 << 30


class Chip(NamedTuple):
    """One device as JAX counts them: a v5p chip is one device of two cores, a tpu7x chip is two devices."""

    name: str
    kind: str
    """JAX's `device_kind`."""
    flops: float
    """Dense bfloat16 FLOP/s of the matrix units."""
    hbm: int
    """Bytes of memory."""
    links: float
    """Bytes/s that it can send to its neighbours, over all its links together."""
    network: float = 0.0
    """Bytes/s that it can send to another machine; 0 where a slice is one network."""


TPUS = (
    Chip("v5e", "TPU v5 lite", 197e12, 16 * GIB, 200e9),
    Chip("v5p", "TPU v5", 459e12, 95 * GIB, 600e9),
    Chip("v6e", "TPU v6 lite", 918e12, 32 * GIB, 400e9),
    Chip("tpu7x", "TPU7x", 2307e12 / 2, 96 * GIB, 300e9),
)
# A network card of 400 Gbit/s for each GPU, as the makers' own machines have.
GPUS = (
    Chip("h100", "NVIDIA H100 80GB HBM3", 989.4e12, 81559 << 20, 450e9, 50e9),
    Chip("h200", "NVIDIA H200", 989.4e12, 143771 << 20, 450e9, 50e9),
)


MOST = 4096
"""GPUs: each becomes a device of this process."""


class Gpus(NamedTuple):
    """GPUs by count: `machine` of them in each of `machines`."""

    chip: Chip
    machine: int
    machines: int

    @property
    def total(self) -> int:
        return self.machine * self.machines


def gpus(topology: str) -> Gpus | None:
    """What `h200:8` or `h100:8x4` (eight in each of four machines) asks for; None for anything but those GPUs.

    UsageError where the count cannot be read.
    """
    name, _, count = topology.partition(":")
    chip = next((chip for chip in GPUS if chip.name == name), None)
    if chip is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", count)
    if not found or int(found[1]) * int(found[2] or 1) > MOST:
        raise UsageError(
            f"--topology={topology}: say how many GPUs, for example {name}:8, or {name}:8x4 for eight in each of four "
            "machines"
        )
    return Gpus(chip, int(found[1]), int(found[2] or 1))


def tpu(kind: str) -> Chip:
    """The TPU with that `device_kind`; UsageError for one that is not in `TPUS`."""
    for chip in TPUS:
        if chip.kind == kind:
            return chip
    raise UsageError(f"the memory of a {kind} is not known here: use one of {', '.join(c.name for c in TPUS)}")


def speed(chip: Chip, machine: int, members: Sequence[int]) -> float:
    """Bytes/s at which a device can at best send to the rest of a group, devices being numbered machine by machine.

    A group that spans machines sends through the network cards of all its members in a machine at once, as rings do.
    """
    if not chip.network:
        return chip.links
    beside = collections.Counter(member // machine for member in members)
    return chip.links if len(beside) == 1 else min(chip.links, chip.network * min(beside.values()))
