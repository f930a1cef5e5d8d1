"""Runs in a process of its own with eight CPU devices: a state saved as it lies on one mesh, restored onto others.

Prints one JSON object: for each mesh, whether every leaf came back bit for bit and lies as that mesh wants it, and the
share of the state that one device holds.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from crcm_jax import recipes
from crcm_jax.configs.digits import get_config
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel import rules
from crcm_jax.train import state as states
from crcm_jax.train.checkpoint import Checkpoints
from crcm_jax.train.optimizer import Optimizer

SAVED = {"fsdp": 8}
RESTORED = {
    "one device": {},
    "data 2 × tensor 2": {"data": 2, "tensor": 2},
    "fsdp 2 × tensor 4": {"fsdp": 2, "tensor": 4},
}


def config(mesh):
    c = get_config("sf_dmd")
    c.model.update({"dim": 64, "ffn_dim": 96, "heads": 8, "layers": 2, "freq_dim": 16})
    c.data.update({"batch_size": 8, "frames": 3})
    c.mesh = mesh
    return c


def shapes(c, mesh):
    """The state of a run on that mesh, as shapes and shardings."""
    training = recipes.make(c, mesh)
    players = training.players
    optimizers = {name: Optimizer.from_config(c[player.optim]) for name, player in players.items()}
    params = {name: jax.eval_shape(training.networks[name].init, jax.random.key(0)) for name in players}
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), params)  # with float32 master weights
    state = jax.eval_shape(lambda params: states.create(params, players, optimizers), params)
    return rules.Layout(mesh, training.rules).abstract(state)


def main(workdir):
    rng = np.random.default_rng(0)
    c = config(SAVED)
    like = shapes(c, meshes.make(c))
    values = jax.tree.map(lambda x: (100 * rng.normal(size=x.shape)).astype(x.dtype), like)
    now = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), values, like)
    checkpoints = Checkpoints(Path(workdir), c)
    checkpoints.save(now, {"next_index": 3}, {})
    checkpoints.close()
    report = {}
    for name, mesh in RESTORED.items():
        c = config(mesh)
        mesh = meshes.make(c, jax.devices()[: int(np.prod(list(mesh.values()) or 1))])
        like = shapes(c, mesh)
        back, data, _ = Checkpoints(Path(workdir), c).restore(like)
        leaves = list(zip(*map(jax.tree.leaves, (back, values, like))))
        report[name] = {
            "equal": all(np.array_equal(np.asarray(x), v) for x, v, _ in leaves) and data == {"next_index": 3},
            "placed": all(x.sharding.is_equivalent_to(s.sharding, x.ndim) for x, _, s in leaves),
            "share": rules.device_bytes(back) / sum(x.nbytes for x, _, _ in leaves),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
