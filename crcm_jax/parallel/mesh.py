"""The one mesh that a run's arrays lie on: data, fsdp, context and tensor, from `config.mesh`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from crcm_jax.errors import UsageError
from crcm_jax.parallel import placement
from crcm_jax.parallel.axes import AXES, check, parse

__all__ = ["AXES", "describe", "everywhere", "make", "over", "parse", "samples", "sizes", "whole"]


def sizes(config) -> tuple[int, int, int, int]:
    """The length of each of `AXES`; axes that `config.mesh` does not name, or a config without it, have length one.

    UsageError if `config.mesh` names anything else, or a length is not a positive integer.
    """
    section = dict(config.get("mesh") or {})
    check(section)
    return tuple(section.get(name, 1) for name in AXES)


def describe(shape: Sequence[int]) -> str:
    """`data 2 × fsdp 4`: the axes that are longer than one."""
    return " × ".join(f"{name} {n}" for name, n in zip(AXES, shape) if n > 1) or "one device"


def make(config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all there are), laid out so that tensor's neighbours are close.

    A mesh of one device takes the first. UsageError if any other does not match the number of devices, or does not
    agree with the batch or the heads (`check`).
    """
    shape = sizes(config)
    chips = list(jax.devices() if devices is None else devices)
    wanted = math.prod(shape)
    if wanted == 1 and jax.process_count() == 1:
        chips = chips[:1]
    if wanted != len(chips):
        raise UsageError(
            f"a mesh of {describe(shape)} needs {wanted} devices and there are {len(chips)}: "
            f"make the product of {', '.join(f'mesh.{name}' for name in AXES)} {len(chips)}"
        )
    _check(config, dict(zip(AXES, shape)))
    return over(shape, chips)


def over(shape: Sequence[int], devices: Sequence[jax.Device]) -> Mesh:
    """The mesh with these lengths of `AXES` over exactly `devices`."""
    grid = mesh_utils.create_device_mesh(tuple(shape), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check(config, shape: dict[str, int]) -> None:
    accumulate = (config.get("optim") or {}).get("accumulate", 1)
    parts = shape["data"] * shape["fsdp"]
    batch = config.data.batch_size
    if parts > 1 and batch % (parts * accumulate):
        parts_of = f"mesh.data × mesh.fsdp = {parts}" + (
            f" × optim.accumulate = {accumulate}" if accumulate > 1 else ""
        )
        raise UsageError(f"data.batch_size={batch} does not divide over {parts_of}: use a multiple of it")
    if shape["context"] * shape["tensor"] == 1:
        return
    for role in ("student", *config.get("sizes", {})):
        # A published size says its heads itself: then the network is the one that refuses the mesh.
        heads = {**config.model, **config.get("sizes", {}).get(role, {})}.get("heads")
        if heads and (lack := placement.indivisible(shape, heads)):
            raise UsageError(f"{lack} of the {role}: use a divisor")


def whole(mesh: Mesh) -> NamedSharding:
    """How arrays lie that each device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """`tree`, whole on each device of the mesh, if there is one."""
    return tree if mesh is None else jax.device_put(tree, whole(mesh))


def samples(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: its first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(placement.SAMPLES))
