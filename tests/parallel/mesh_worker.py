"""Runs in a process of its own with eight CPU devices: the same gradients on several meshes, as one JSON object.

`mesh_worker.py` prints, for some training types and meshes that together hold everything, the largest relative
differences of losses, metrics and gradients from one device, and how the programs communicate. `mesh_worker.py all`
compares every training type on every mesh, which takes a quarter of an hour, and prints a row as it has it.
"""

from __future__ import annotations

import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from configs.digits import TRAINING, get_config
from crcm_jax import build
from crcm_jax.models.base import Condition
from crcm_jax.objectives.algorithm import Progress
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel import rules
from crcm_jax.sampling.stream import Few, generate
from crcm_jax.schedule import StepPlan

MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 8": {"tensor": 8},
    "context 8": {"context": 8},
    "data 2 × context 4": {"data": 2, "context": 4},
    "data 2 × fsdp 2 × context 2": {"data": 2, "fsdp": 2, "context": 2},
    "fsdp 2 × context 2 × tensor 2": {"fsdp": 2, "context": 2, "tensor": 2},
}
QUICK = {
    "bidirectional": ("fsdp 8", "context 8"),
    "tf_scm": ("fsdp 2 × context 2 × tensor 2",),
    "sf_dmd": ("data 2 × fsdp 2 × context 2",),
}


def config(training: str, mesh: dict[str, int], **changes):
    """Digits at a size that compiles in seconds: 16 tokens a frame, eight heads, tiled attention; and where the batch's
    latents, and so its activations, are larger than any matrix."""
    c = get_config(training)
    c.model.update({"dim": 48, "ffn_dim": 96, "heads": 8, "layers": 2, "freq_dim": 16, "patch": (1, 2, 2)})
    c.model.update({"attention": "chunked", "remat": "block"})
    c.data.update({"batch_size": 8, "frames": 7})
    c.rollout.steps, c.rollout.times = (2,), ((5 / 6,),)
    c.mesh = mesh
    c.update_from_flattened_dict(changes)
    return c


def random_like(tree, seed: int):
    """Every parameter random: a fresh network's zero head would pass for anything."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        start = float(path[-1].key == "scale")
        spread = x.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.3
        return (start + spread * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def batch_of(c, seed: int = 5):
    rng = np.random.default_rng(seed)
    shape = build.codec(c).latent_shape(c.data.frames, c.data.height, c.data.width)
    size = c.data.batch_size
    latents = rng.normal(size=(size, *shape)).astype(np.float32)
    return {"latents": latents, "text": rng.normal(size=(size, c.text.length, c.text.dim)).astype(np.float32)}


def place(tree, mesh):
    return jax.device_put(tree, rules.shardings(tree, mesh))


def compiled(c, placed: bool = True):
    """The gradient function of each player, compiled for `c.mesh`, and its arguments but for the batch.

    placed: whether the networks know the mesh; without, the compiler is left alone with it.
    """
    mesh = meshes.make(c)
    algorithm = rules.cut_gradients(build.algorithm(c, mesh if placed else None), mesh)
    trees = {
        role: random_like(jax.eval_shape(build.network(c, role).init, jax.random.key(0)), seed)
        for seed, role in enumerate(("student", "critic", *algorithm.reads))
    }
    frozen = place({"uncond": np.zeros((1, c.text.length, c.text.dim), np.float32), **trees}, mesh)
    batch = jax.device_put(batch_of(c), meshes.samples(mesh))
    at = Progress(*(jnp.int32(i) for i in (5, 1, 1)))
    weights = np.full(c.data.batch_size, 1 / c.data.batch_size, np.float32)
    players = {"student": algorithm.student, "critic": algorithm.critic}
    rest = (jax.random.key(3), at, weights)
    functions = {
        name: jax.jit(function).lower(frozen[name], frozen, batch, *rest).compile()
        for name, function in players.items()
        if function
    }
    return functions, frozen, rest


def run(c, *batches):
    """For each batch, the metrics and the gradient of each player; and how the weights lie and are gathered."""
    functions, frozen, rest = compiled(c)
    results = []
    for batch in batches:
        batch = jax.device_put(batch, meshes.samples(meshes.make(c)))
        results.append({})
        for name, function in functions.items():
            (losses, metrics), grads = function(frozen[name], frozen, batch, *rest)
            kept = jax.tree.map(lambda g, p: g.sharding.is_equivalent_to(p.sharding, g.ndim), grads, frozen[name])
            assert all(jax.tree.leaves(kept)), "a gradient lies as its parameter does not"
            results[-1][name] = jax.tree.map(np.asarray, ({"loss": losses, **metrics}, grads))
    whole = sum(x.nbytes for x in jax.tree.leaves(frozen["student"]))
    about = {"share": rules.device_bytes(frozen["student"]) / whole, "gathered": gathered(functions["student"])}
    return results, about


def differences(a, b):
    """Largest relative difference of (losses and metrics, gradient leaves), each against its own largest entry."""

    def largest(part):
        pairs = [pair for p in b for pair in zip(jax.tree.leaves(a[p][part]), jax.tree.leaves(b[p][part]))]
        return float(max(np.abs(x - y).max() / max(np.abs(y).max(), 1e-12) for x, y in pairs))

    return {"metrics": largest(0), "gradient": largest(1)}


def gathered(program) -> int:
    """Numbers in the largest result of an all-gather on one device."""
    shapes = re.findall(r" = f32\[([\d,]*)\]\S* all-gather\(", program.as_text())
    return max((math.prod(map(int, shape.split(","))) for shape in shapes if shape), default=0)


def compare(training: str, names):
    """(name, differences) of a training type on each of those meshes, and of a wrong answer."""
    c = config(training, {})
    batch = batch_of(c)
    # The comparison must see a wrong answer: one sample of eight in another's place.
    wrong = {name: x[[1, *range(1, 8)]] for name, x in batch.items()}
    (expected, other), _ = run(c, batch, wrong)
    yield f"{training} power", differences(other, expected)
    for name in names:
        (found,), about = run(config(training, MESHES[name]), batch)
        yield f"{training} {name}", differences(found, expected) | about


def streaming():
    """Largest relative difference of a clip sampled on a mesh, guided, from the same on one device."""
    clips = []
    for mesh in ({}, MESHES["fsdp 2 × context 2 × tensor 2"]):
        c = config("tf", mesh, **{"data.batch_size": 2})
        mesh = meshes.make(c)
        network = build.network(c, mesh=mesh)
        params = place(random_like(jax.eval_shape(network.init, jax.random.key(0)), 0), mesh)
        batch = batch_of(c)
        plan = StepPlan((2,), ((5 / 6,),), noisy_context=True, context_start=1)
        clips.append(
            generate(
                network, params, Condition(batch["text"]), jax.random.key(1), shape=batch["latents"].shape,
                chunks=build.chunk_pattern(c), solver=Few(plan), uncond=Condition(batch["text"] * 0), guidance=2.0,
            )
        )  # fmt: skip
    one, many = (np.asarray(clip) for clip in clips)
    return float(np.abs(many - one).max() / np.abs(one).max())


def main(words):
    alone, frozen, _ = compiled(config("bidirectional", MESHES["fsdp 8"]), placed=False)
    matrices = [math.prod(x.shape[-2:]) for x in jax.tree.leaves(frozen["student"])]
    report = {"streaming": streaming(), "left alone": gathered(alone["student"]), "matrix": max(matrices)}
    report["latents"] = batch_of(config("tf", {}))["latents"].size
    for training, names in ({name: tuple(MESHES) for name in TRAINING} if words == ["all"] else QUICK).items():
        for row, found in compare(training, names):
            report[row] = found
            if words:
                print(row, found, file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
