"""Runs in a process of its own with eight CPU devices: the same train step on several meshes, as one JSON object.

`mesh_worker.py` prints, for each training type and mesh, the largest relative differences of losses, metrics and
gradients from one device, and the share of the state that one device holds. `mesh_worker.py all` takes minutes: every
type on every mesh. The default are the types and the mesh that hold everything that the others do.
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from configs.digits import get_config
from crcm_jax import build
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel import rules
from crcm_jax.train import state as states
from crcm_jax.train.optimizer import Optimizer
from crcm_jax.train.step import make_steps

MESHES = {
    "one": {},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "context": {"data": 2, "context": 4},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
    "all": {"fsdp": 2, "context": 2, "tensor": 2},
}
QUICK = {"tf_scm": ("one", "mixed"), "sf_dmd": ("one", "mixed")}
EVERYTHING = {training: tuple(MESHES) for training in ("tf", "tf_scm", "sf_dmd")}
FAST = {"xla_backend_optimization_level": 0}


def config(training: str, mesh: dict[str, int], **changes):
    c = get_config(training)
    c.model.update({"dim": 64, "ffn_dim": 96, "heads": 8, "layers": 2, "freq_dim": 16})
    c.data.update({"batch_size": 8, "frames": 3})
    c.rollout.steps, c.rollout.times = (2,), ((5 / 6,),)
    c.optim.warmup = c.critic_optim.warmup = 0
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


def run(c, *batches):
    """(for each batch, what a student step and a critic step yield from the same state, share of it on one device).

    What a player's step yields: its metrics, and its gradient, read off the optimiser's first moment.
    """
    mesh = meshes.make(c)
    algorithm = rules.cut_gradients(build.algorithm(c, mesh), mesh)
    optimizer, critic_optimizer = Optimizer.from_config(c.optim), Optimizer.from_config(c.critic_optim)
    tree = jax.eval_shape(build.network(c).init, jax.random.key(0))
    params = random_like(tree, 0)
    others = {
        "uncond": batches[0]["text"][:1] * 0,
        **{name: random_like(tree, i) for i, name in enumerate(algorithm.reads, 1)},
    }
    others = jax.device_put(others, rules.shardings(others, mesh))
    critic = None if algorithm.critic is None else random_like(tree, 9)

    def fresh(params, critic):
        return states.create(params, optimizer, critic, critic_optimizer)

    like = rules.abstract(jax.eval_shape(fresh, params, critic), mesh)
    placed = jax.tree.map(lambda x: x.sharding, like)
    make = jax.jit(fresh, out_shardings=placed).lower(params, critic).compile(FAST)
    batches = [jax.device_put(batch, meshes.samples(mesh)) for batch in batches]
    players = [
        (name, step)
        for name, step in zip(
            ("student", "critic"), make_steps(algorithm, optimizer, critic_optimizer, shardings=placed)
        )
        if step
    ]
    compiled = {name: step.lower(like, others, batches[0]).compile(FAST) for name, step in players}
    results = []
    for batch in batches:
        now = make(params, critic)
        results.append({})
        for name, step in compiled.items():
            now, metrics = step(now, others, batch)
            opt, b1 = (now.opt, c.optim.b1) if name == "student" else (now.critic_opt, c.critic_optim.b1)
            moments = next(part for part in opt.adam if hasattr(part, "mu"))
            results[-1][name] = {
                "metrics": {k: float(v) for k, v in metrics.items()},
                "gradient": jax.tree.map(lambda g, b1=b1: np.asarray(g) / (1 - b1), moments.mu),
            }
        kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), now, placed)
        assert all(jax.tree.leaves(kept)), "a step changed how the state lies"
    return results, rules.device_bytes(now) / sum(x.nbytes for x in jax.tree.leaves(now))


def differences(a, b):
    """Largest relative difference of (loss-like metrics, gradient leaves each against its own largest entry)."""
    scalars = max(
        abs(a[p]["metrics"][k] - b[p]["metrics"][k]) / max(abs(b[p]["metrics"][k]), 1e-6)
        for p in b
        for k in b[p]["metrics"]
    )
    leaves = [
        np.abs(x - y).max() / max(np.abs(y).max(), 1e-12)
        for p in b
        for x, y in zip(jax.tree.leaves(a[p]["gradient"]), jax.tree.leaves(b[p]["gradient"]))
    ]
    return {"metrics": float(scalars), "gradient": float(max(leaves))}


def main(words):
    report = {}
    for training, names in (EVERYTHING if words == ["all"] else QUICK).items():
        batch = batch_of(config(training, {}))
        # The comparison must see a wrong answer: one sample of eight in another's place.
        wrong = {name: x[[1, *range(1, 8)]] for name, x in batch.items()}
        for name in names:
            if name == "one":
                (expected, other), share = run(config(training, {}), batch, wrong)
                report[f"{training} power"] = differences(other, expected)
            else:
                (found,), share = run(config(training, MESHES[name]), batch)
                report[f"{training} {name}"] = differences(found, expected) | {"share": share}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
