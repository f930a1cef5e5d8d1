"""Runs in a process of its own with eight CPU devices: the same train step on several meshes, as one JSON object.

`mesh_worker.py` prints, for two training types on meshes that hold every axis, the largest relative differences of
metrics and gradients from one device; the same of a sampled clip; and what programs gather. `mesh_worker.py TYPE…`
compares both players of those training types, or of `all`, on every mesh, and prints a row as soon as it has one.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import parts, recipes
from crcm_jax.configs.digits import TRAINING, get_config
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel.rules import Layout, device_bytes
from crcm_jax.sampling import ContextRule, Few, Schedule, generate
from crcm_jax.train import state as states
from crcm_jax.train.optimizer import Optimizer
from crcm_jax.train.state import TrainState
from crcm_jax.train.step import Frozen, make_steps

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
    "tf_scm": ("fsdp 2 × context 2 × tensor 2",),
    "sf_dmd": ("data 2 × fsdp 2 × context 2",),
}


def config(training: str, mesh: dict[str, int], **changes):
    """Digits at a size that compiles in seconds: eight tokens a frame, which context has to fill up, eight heads, tiled
    attention."""
    c = get_config(training)
    c.model.update({"dim": 64, "ffn_dim": 96, "heads": 8, "layers": 2, "freq_dim": 16, "patch": (1, 4, 2)})
    c.model.update({"attention": "chunked", "remat": "block"})
    c.data.update({"batch_size": 8, "frames": 7})
    c.optim.warmup = c.critic_optim.warmup = 0
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
    size = c.data.batch_size
    latents = rng.normal(size=(size, *parts.latent_shape(c))).astype(np.float32)
    text = rng.normal(size=(size, c.text.length, c.text.dim)).astype(np.float32)
    return {"latents": latents, "prompt": {"text": text}}


def place(tree, mesh, table):
    return jax.device_put(tree, Layout(mesh, table).shardings(tree))


class Players(NamedTuple):
    """The train step of each player, compiled, and what it takes but for the batch."""

    steps: dict
    fresh: Callable
    """Makes the state that both start from, as it lies before every step."""
    frozen: Frozen
    lies: TrainState


def compiled(c, players) -> Players:
    """The steps of those `players` on `c.mesh`."""
    mesh = meshes.make(c)
    training = recipes.make(c, mesh)
    optimizers = {name: Optimizer.from_config(c[player.optim]) for name, player in training.players.items()}
    weights = {
        role: random_like(jax.eval_shape(network.init, jax.random.key(0)), seed)
        for seed, (role, network) in enumerate(training.networks.items())
    }
    frozen = place({role: weights[role] for role in training.reads}, mesh, training.rules)
    uncond = Condition({"text": np.zeros((1, c.text.length, c.text.dim), np.float32)})
    frozen = Frozen(frozen, meshes.everywhere(uncond, mesh))

    def create():
        return states.create({name: weights[name] for name in training.players}, training.players, optimizers)

    like = Layout(mesh, training.rules).abstract(jax.eval_shape(create))
    lies = jax.tree.map(lambda x: x.sharding, like)
    steps = make_steps(training, optimizers, shardings=lies)
    batch = jax.device_put(batch_of(c), meshes.samples(mesh))
    programs = {name: step.lower(like, frozen, batch).compile() for name, step in steps.items() if name in players}
    return Players(programs, lambda: jax.device_put(create(), lies), frozen, lies)


def run(c, players, *batches):
    """What each player's step yields for each batch, from the same state: its metrics, and its gradient, read off the
    optimiser's first moment. And the share of the state that lies on one device."""
    players, mesh = compiled(c, players), meshes.make(c)
    results = []
    for batch in batches:
        results.append({})
        for name, step in players.steps.items():
            now, metrics = step(players.fresh(), players.frozen, jax.device_put(batch, meshes.samples(mesh)))
            kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), now, players.lies)
            assert all(jax.tree.leaves(kept)), "a step changed how the state lies"
            section = c.optim if name == "student" else c.critic_optim
            moments, b1 = next(part for part in now.players[name].opt.adam if hasattr(part, "mu")), section.b1
            gradient = jax.tree.map(lambda g, b1=b1: np.asarray(g) / (1 - b1), moments.mu)
            results[-1][name] = jax.tree.map(np.asarray, metrics), gradient
    return results, device_bytes(now) / sum(x.nbytes for x in jax.tree.leaves(now))


def differences(a, b):
    """Largest relative difference of (metrics, gradient leaves), each against its own largest entry."""

    def largest(part):
        pairs = [pair for p in b for pair in zip(jax.tree.leaves(a[p][part]), jax.tree.leaves(b[p][part]))]
        return float(max(np.abs(x - y).max() / max(np.abs(y).max(), 1e-12) for x, y in pairs))

    return {"metrics": largest(0), "gradient": largest(1)}


def compare(training: str, names, players=("student", "critic")):
    """(name, differences) of a training type on each of those meshes, and of a wrong answer."""
    c = config(training, {})
    batch = batch_of(c)
    # The comparison must see a wrong answer: one sample of eight in another's place.
    wrong = jax.tree.map(lambda x: x[[1, *range(1, 8)]], batch)
    (expected, other), _ = run(c, players, batch, wrong)
    yield f"{training} power", differences(other, expected)
    for name in names:
        (found,), share = run(config(training, MESHES[name]), players, batch)
        yield f"{training} {name}", differences(found, expected) | {"share": share}


def streaming():
    """Largest relative difference of a clip sampled on a mesh, guided, from the same on one device."""
    clips = []
    for mesh in ({}, MESHES["fsdp 2 × context 2 × tensor 2"]):
        c = config("tf", mesh, **{"data.batch_size": 2})
        mesh = meshes.make(c)
        network = recipes.student(c, mesh)
        params = random_like(jax.eval_shape(network.init, jax.random.key(0)), 0)
        model = Bound(network, place(params, mesh, network.rules))
        batch = batch_of(c)
        cond = Condition(batch["prompt"])
        options = {"uncond": jax.tree.map(np.zeros_like, cond), "guidance": 2.0, "shape": batch["latents"].shape}
        solver = Few(Schedule((2,), ((5 / 6,),)), ContextRule(noisy=True, start=1))
        clips.append(generate(model, cond, jax.random.key(1), solver=solver, **options))
    one, many = (np.asarray(clip) for clip in clips)
    return float(np.abs(many - one).max() / np.abs(one).max())


def wide(mesh: dict[str, int]):
    """A network of which a batch's latents are larger than any matrix, and its activations more so."""
    return config("bidirectional", mesh, **{"model.dim": 48, "model.patch": (1, 2, 2)})


def gathered(mesh: str, placed: bool = True) -> int:
    """Numbers in the largest result, on one device, of an all-gather in the gradient of a network on `mesh`.

    placed: whether the network knows the mesh, or the compiler is left alone with it.
    """
    c = wide(MESHES[mesh])
    mesh = meshes.make(c)
    network = recipes.student(c, mesh if placed else None)
    params = Layout(mesh, network.rules).abstract(jax.eval_shape(network.init, jax.random.key(0)))
    batch = jax.device_put(batch_of(c), meshes.samples(mesh))

    def loss(params, x, prompt):
        return jnp.mean(jnp.square(Bound(network, params).velocity(x, x[:, :1, 0, 0, 0], Condition(prompt)) - x))

    gradient = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda x: x.sharding, params))
    program = gradient.lower(params, batch["latents"], batch["prompt"]).compile().as_text()
    shapes = re.findall(r" = f32\[([\d,]*)\]\S* all-gather\(", program)
    return max((math.prod(map(int, shape.split(","))) for shape in shapes if shape), default=0)


def communication():
    """`gathered` on some meshes, beside the numbers in the largest matrix and in a batch of latents."""
    c = wide({})
    weights = jax.tree.leaves(jax.eval_shape(recipes.student(c).init, jax.random.key(0)))
    return {
        "matrix": max(math.prod(x.shape[-2:]) for x in weights),
        "latents": batch_of(c)["latents"].size,
        "fsdp": gathered("fsdp 8"),
        "fsdp, left alone": gathered("fsdp 8", placed=False),
        "context": gathered("context 8"),
    }


def main(words):
    players = ("student", "critic") if words else ("student",)
    report = {} if words else {"streaming": streaming(), "communication": communication()}
    chosen = {name: tuple(MESHES) for name in (TRAINING if words == ["all"] else words)} or QUICK
    for training, names in chosen.items():
        for row, found in compare(training, names, players):
            report[row] = found
            if words:
                print(row, found, file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
