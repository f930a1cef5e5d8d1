"""The real train step, compiled for a TPU slice that is not there: what it needs, moves and computes on each chip."""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from crcm_jax import build
from crcm_jax.errors import UsageError, UserError
from crcm_jax.objectives.algorithm import Algorithm
from crcm_jax.parallel import flops, hlo, plan, rules
from crcm_jax.parallel import mesh as meshes
from crcm_jax.train import state as states
from crcm_jax.train.optimizer import Optimizer
from crcm_jax.train.step import make_steps

HBM = {"TPU v5 lite": 16 * plan.GIB, "TPU v5": 95 * plan.GIB, "TPU v6 lite": 32 * plan.GIB, "TPU7x": 96 * plan.GIB}
"""Bytes of memory of one device; a tpu7x chip is two devices and has twice that."""


class Compiled(NamedTuple):
    """One player's step. Bytes are those on one device, `flops` those of all devices together."""

    player: str
    seconds: float
    arguments: int
    """State and frozen trees: what `plan` counts, padded as the chip lays arrays out."""
    temporary: int
    """Activations, gradients and buffers of communication."""
    peak: int
    flops: int
    collectives: list[hlo.Collective]


class Inputs(NamedTuple):
    """The arguments of a step, as shapes with shardings."""

    state: states.TrainState
    others: dict[str, Any]
    batch: dict[str, jax.ShapeDtypeStruct]


def devices(topology: str) -> list[Any]:
    """The devices of a topology such as `v5p:2x2x1`. UserError without libtpu; UsageError for one it does not know."""
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        if "libtpu" in str(error).lower() or isinstance(error, ImportError | NotImplementedError):
            raise UserError(
                "compiling for a TPU needs its compiler, libtpu: pip install 'causal-rcm-jax[tpu]'"
            ) from error
        raise UsageError(
            f"--topology={topology} is not one that libtpu knows: use a generation and the chips along each side, "
            "for example v5p:2x2x1, v5p:4x4x8, v6e:16x16 or tpu7x:2x2x1"
        ) from error


def hbm(device: Any) -> int:
    """Bytes of memory of one device of that kind; UsageError for a kind that is not in `HBM`."""
    if device.device_kind not in HBM:
        raise UsageError(f"the memory of a {device.device_kind} is not known here: use one of {', '.join(HBM)}")
    return HBM[device.device_kind]


def inputs(config, algorithm: Algorithm, mesh: Mesh) -> Inputs:
    """What a run of `config` passes to its steps, cut over `mesh`; nothing is allocated."""
    key = jax.eval_shape(jax.random.key, 0)
    dtype = jnp.dtype(config.param_dtype)

    def tree(role):
        return jax.eval_shape(
            lambda key: jax.tree.map(lambda x: x.astype(dtype), build.network(config, role).init(key)), key
        )

    text = build.text_encoder(config)([""])
    others = {"uncond": jax.ShapeDtypeStruct(text.shape, text.dtype), **{role: tree(role) for role in algorithm.reads}}
    optimizer, critic_optimizer = _optimizers(config, algorithm)
    critic = None if algorithm.critic is None else tree("critic")
    state = jax.eval_shape(
        lambda params, critic: states.create(params, optimizer, critic, critic_optimizer), tree("student"), critic
    )
    latents = build.codec(config).latent_shape(config.data.frames, config.data.height, config.data.width)
    size, cut = config.data.batch_size, meshes.samples(mesh)
    batch = {
        "latents": jax.ShapeDtypeStruct((size, *latents), jnp.float32, sharding=cut),
        "text": jax.ShapeDtypeStruct((size, *text.shape[1:]), jnp.float32, sharding=cut),
    }
    return Inputs(rules.abstract(state, mesh), rules.abstract(others, mesh), batch)


def compile_step(config, algorithm: Algorithm, mesh: Mesh, arguments: Inputs, player: str, room: int) -> Compiled:
    """Compiles the step of `player`, "student" or "critic", for the devices of `mesh`.

    UserError if it needs more than `room` bytes a device, by how much, and what to do.
    """
    steps = make_steps(
        rules.cut_gradients(algorithm, mesh),
        *_optimizers(config, algorithm),
        ema_rate=config.ema.rate,
        seed=config.seed,
        accumulate=config.optim.get("accumulate", 1),
        shardings=jax.tree.map(lambda x: x.sharding, arguments.state),
    )
    traced = steps[player == "critic"].trace(*arguments)
    began = time.perf_counter()
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", str(error))
        if not used:
            raise
        need, has = (float(used[i]) * 1024 ** " KMGT".index(used[i + 1] or " ") for i in (1, 3))
        raise UserError(_lack(player, need, has, mesh)) from error
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = held + memory.temp_size_in_bytes
    if peak > room:
        raise UserError(_lack(player, peak, room, mesh))
    return Compiled(
        player,
        seconds,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        peak,
        flops.matmul_flops(traced.jaxpr.jaxpr),
        hlo.collectives(compiled.as_text()),
    )


def undivided(arguments: Inputs, mesh: Mesh) -> list[str]:
    """One line for each weight, of each network, that a rule would cut and whose length does not divide."""
    lines: list[str] = []
    networks = {"student": arguments.state.params, "critic": arguments.state.critic, **arguments.others}
    for tree in networks.values():
        rules.shardings(tree, mesh, lines.append)
    return list(dict.fromkeys(lines))


def _lack(player: str, need: float, has: float, mesh: Mesh) -> str:
    return (
        f"the {player}'s step does not fit: it needs {need / plan.GIB:.1f} GiB on each device, "
        f"{(need - has) / plan.GIB:.1f} GiB more than the {has / plan.GIB:.1f} GiB it has: "
        f"{plan.mend(mesh, need / has)}"
    )


def _optimizers(config, algorithm: Algorithm) -> tuple[Optimizer, Optimizer | None]:
    critic = None if algorithm.critic is None else Optimizer.from_config(config.critic_optim)
    return Optimizer.from_config(config.optim), critic
