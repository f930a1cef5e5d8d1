"""What a run keeps on each device from start to end, counted before anything is allocated."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from crcm_jax.errors import UserError
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel import rules

GIB = 1 << 30

Plan = dict[str, int]
"""What → bytes on one device, shards as the mesh cuts them."""


def of_state(state: Any, frozen: dict[str, Any]) -> Plan:
    """The plan of a `TrainState` and the frozen trees beside it; leaves are arrays, or shapes with shardings.

    Gradients, in float32, come and go within a step, one player's at a time, but no step can do without them.
    Activations are not in it: they are known once the step is compiled.
    """
    plan: Plan = {}
    for name, player in state.players.items():
        plan[f"{name}'s weights"] = rules.device_bytes(player.params)
        plan |= {f"{name}'s {average}": rules.device_bytes(tree) for average, tree in player.averages.items()}
        plan[f"{name}'s optimiser"] = rules.device_bytes(player.opt)
    moments = (player.opt.adam for player in state.players.values())
    plan["gradients"] = max(_one_moment(adam) for adam in moments)
    plan |= {name: rules.device_bytes(tree) for name, tree in frozen.items()}
    return {name: size for name, size in plan.items() if size}


def _one_moment(adam: Any) -> int:
    """Bytes of a player's gradient, in float32 and cut as its optimiser's two moments are."""
    return rules.device_bytes([leaf for leaf in jax.tree.leaves(adam) if leaf.ndim]) // 2


def table(plan: Plan) -> str:
    """The plan in words, one line each, and its total."""
    rows = [*plan.items(), ("in all", sum(plan.values()))]
    return "\n".join(f"  {name:<20} {size / GIB:9.3f} GiB" for name, size in rows)


def shortage(plan: Plan, mesh: Mesh, room: int) -> str | None:
    """Why `plan` does not fit into `room` bytes a device and what to do about it, in one sentence; None if it fits."""
    total = sum(plan.values())
    if total <= room:
        return None
    return (
        f"weights and optimiser state need {total / GIB:.1f} GiB on each device, {(total - room) / GIB:.1f} GiB more "
        f"than the {room / GIB:.1f} GiB it has: {mend(mesh, total / room)}"
    )


def mend(mesh: Mesh, excess: float) -> str:
    """What would make a step fit that needs `excess` times the memory there is."""
    fsdp = 1 << (mesh.shape["fsdp"] - 1).bit_length()
    while fsdp < mesh.shape["fsdp"] * excess:
        fsdp *= 2
    return f"use mesh.fsdp={fsdp} or more ({meshes.describe(tuple(mesh.shape.values()))} now), or a smaller model"


def refuse_what_cannot_fit(plan: Plan, mesh: Mesh) -> None:
    """Prints the plan of a run on accelerators, and raises UserError where it is more than a device's memory.

    Devices that do not say how much memory they have (CPUs) are not judged.
    """
    told = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    limits = [limit for limit in told if limit is not None]
    if len(limits) < len(told):
        return
    if jax.process_index() == 0:
        print(f"crcm: on each device of {meshes.describe(tuple(mesh.shape.values()))}:\n{table(plan)}", flush=True)
    lack = shortage(plan, mesh, min(limits))
    if lack:
        raise UserError(lack)
