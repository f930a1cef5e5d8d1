"""Ahead-of-time compilation for TPUs that are not there, with the `libtpu` wheel, and what it tells about a kernel."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import sys
from typing import NamedTuple

import jax

from pallas_kernels.attention.mosaic_tpu.target import CHIPS, Chip, within

_TOPOLOGIES = {"v5e": "v5e:2x2x1", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2x1", "tpu7x": "tpu7x:2x2x1"}
_WITHOUT_TPU = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # one process a machine may hold the chips; who only compiles holds none
}


class Cost(NamedTuple):
    """What a traced kernel asks of a chip: its name, matrix FLOPs, HBM bytes, and score entries it computes."""

    name: str
    flops: int
    bytes: int
    entries: int


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    if importlib.util.find_spec("libtpu") is None:
        return "the libtpu wheel is not installed: pip install 'causal-rcm-jax[tpu]'"
    if sys.platform != "linux":
        return "the libtpu wheel is for Linux"
    return None


def devices(chip: str) -> list:
    """Four or eight devices of a small topology of a chip. Looks for no TPU; call it in a process of its own."""
    from jax.experimental import topologies

    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    os.environ["XLA_FLAGS"] = ""  # meant for other devices; libtpu ends the process at one that it does not know
    return topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGIES[chip]).devices


def chip_named(name: str) -> Chip:
    """The entry of `CHIPS`."""
    return next(chip for chip in CHIPS if chip.name == name)


def compiled(function, args, chip: Chip):
    """`function` compiled for a chip. args: `jax.ShapeDtypeStruct`s with shardings over `devices`.

    Raises:
      jax.errors.JaxRuntimeError: what the compiler refuses, too much VMEM among it.
    """
    with within(chip):
        # A function of its own: what was traced for one chip must not be found in the cache for the next.
        return jax.jit(lambda *args: function(*args)).trace(*args).lower(lowering_platforms=("tpu",)).compile()


def costs(function, args, chip: Chip) -> list[Cost]:
    """The kernels that `function` calls."""
    with within(chip):
        return list(_kernels(jax.make_jaxpr(function)(*args).jaxpr))


def vmem(function, args, chip: Chip) -> int:
    """Bytes of VMEM that suffice for the largest kernel of `function`.

    The compiler tells what it needs only where the limit is too low, and then only up to what does not fit first: so
    the limit is raised to what it asked for until it is content.
    """
    limit = 4 << 20
    while limit < chip.vmem:
        try:
            compiled(function, args, dataclasses.replace(chip, vmem=limit * 4 // 3))
            return limit
        except jax.errors.JaxRuntimeError as error:
            asked = re.search(r"Scoped allocation with size ([\d.]+)M", str(error))
            if asked is None:
                raise
            limit = max(int((float(asked[1]) + 0.5) * 2**20), limit + limit // 8)
    return limit


def _kernels(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            cost = equation.params["cost_estimate"]
            name = str(equation.params["name"])
            yield Cost(name, cost.flops, cost.bytes_accessed, cost.transcendentals)
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _kernels(inner)
