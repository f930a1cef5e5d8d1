"""A world small enough to train in milliseconds, with everything that a real run has: two players, randomness, order.

The network is x ↦ w·x + b on [batch, 4] vectors. Run as a program it trains like `crcm train` does, as one of several
processes too: `python train_fakes.py WORKDIR [--coordinator=… --processes=… --process=…] [key=value …]`; beside the
configuration: `delay` and `slow_save`, seconds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crcm_jax.cli.train import one_of_several, parse_processes
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel import processes
from crcm_jax.recipes.averages import Power
from crcm_jax.recipes.base import LossFn, Player, Recipe, Role, Training, gradient_of
from crcm_jax.recipes.turns import Alternate, Always, Turns
from crcm_jax.train import loop
from crcm_jax.train.step import Frozen

DIM = 4


def config(**overrides) -> ConfigDict:
    c = ConfigDict(
        {
            "seed": 3, "training": "sf_dmd", "param_dtype": "float32", "model": {"dim": DIM}, "data": {"batch_size": 4},
            "optim": {"lr": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "warmup": 5,
                      "grad_clip": 0.0, "accumulate": 1},
            "critic_optim": {"lr": 3e-2, "b1": 0.0, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "warmup": 3,
                             "grad_clip": 1.0},
            "ema": {"rate": 0.1},
            "train": {"steps": 12, "log_every": 3, "save_every": 4, "sample_every": 0, "keep": 2},
            "sample": {"prompts": 1}, "mesh": {"data": 1, "fsdp": 1, "context": 1, "tensor": 1},
        }
    )  # fmt: skip
    c.update_from_flattened_dict(overrides)
    return c


def init_params(seed: int = 0, dtype=jnp.float32, width: int = DIM):
    w, b = jax.random.normal(jax.random.key(seed), (2, width), dtype)
    return {"layer": {"w": w, "b": b}}


def forward(params, x):
    return params["layer"]["w"] * x + params["layer"]["b"]


def noise_like(key, x):
    """One key a sample, so that a sample's draw does not depend on how many others there are."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(x.shape[0]))
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)


@dataclasses.dataclass(frozen=True)
class Line:
    """What trainers ask of a network beside losses: how a mesh cuts it."""

    rules = ()


def student_loss(nets, batch, key, progress):
    x, updates = batch["latents"] + 0.1 * noise_like(key, batch["latents"]), progress.updates["student"]
    target = forward(nets["critic"].params, x) + 0.01 * updates
    error = jnp.square(forward(nets["student"].params, x) - target)
    return jnp.sum(error, 1), {"spread": jnp.std(error, 1), "rate": 1.0 * updates}


def critic_loss(nets, batch, key, progress):
    x = batch["latents"] + noise_like(key, batch["latents"])
    return jnp.sum(jnp.square(forward(nets["critic"].params, x) - forward(nets["student"].params, x) - x), 1), {}


ALWAYS = Always()


def training_of(
    losses: Mapping[str, LossFn], turns: Turns = ALWAYS, reads: tuple[str, ...] = (), rate: float = 0.1
) -> Training:
    """A training whose players, "student" and maybe others, learn from `losses`; the student's weights are averaged."""
    players = {
        name: Player(gradient_of(loss, name), "optim", {"ema": Power(rate)})
        if name == "student"
        else Player(gradient_of(loss, name), f"{name}_optim")
        for name, loss in losses.items()
    }
    recipe = Recipe(
        name="line",
        summary="",
        roles={name: Role(causal=False, starts_from=()) for name in (*losses, *reads)},
        players=lambda config, networks: players,
        turns=lambda config: turns,
        sampler=lambda config: None,
        guided=lambda config: False,
    )
    return Training(recipe, {role: Line() for role in recipe.roles}, players, turns)


def training(freq: int = 3, reads: tuple[str, ...] = (), rate: float = 0.1) -> Training:
    return training_of({"student": student_loss, "critic": critic_loss}, Alternate(freq), reads, rate)


def initial(dtype=jnp.float32) -> loop.Initial:
    return loop.Initial({"student": init_params(0, dtype), "critic": init_params(1, dtype)}, Frozen({}, None))


class Data:
    """Endless batches that depend on the position alone; from `nan_from` on, every sample is NaN. `rows`: all but a few
    are left out."""

    def __init__(self, batch: int = 4, delay: float = 0.0, nan_from: int | None = None, rows=slice(None)):
        self.batch, self.delay, self.nan_from, self.position, self.rows = batch, delay, nan_from, 0, rows

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.delay)
        rng = np.random.default_rng(self.position)
        latents = rng.normal(size=(self.batch, DIM)).astype(np.float32)
        if self.nan_from is not None and self.position >= self.nan_from:
            latents[:] = np.nan
        self.position += 1
        return {"latents": latents[self.rows]}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def train(workdir, data: Data | None = None, **overrides):
    c = config(**overrides)
    return loop.run(c, workdir, training=training(rate=c.ema.rate), data=data or Data(), init=initial())


def slow_saves(seconds: float) -> None:
    """Makes every save take at least so long between its parts, to be killed in."""
    from crcm_jax.saving import manifest, storage

    seal, write = manifest.seal, storage.write_trees

    def slow_seal(folder):
        time.sleep(seconds / 2)
        seal(folder)

    def slow_write(folder, trees):
        response = write(folder, trees)
        time.sleep(seconds / 2)
        return response

    manifest.seal, storage.write_trees = slow_seal, slow_write


def main(argv):
    together, (workdir, *words) = parse_processes(argv)
    options = dict(word.split("=") for word in words)
    slow_saves(float(options.pop("slow_save", 0)))
    delay = float(options.pop("delay", 0))
    options = {key: float(value) if "." in value else int(value) for key, value in options.items()}

    def work():
        rows = processes.rows(meshes.samples(meshes.make(config(**options))), 4)
        train(workdir, Data(delay=delay, rows=rows), **options)

    work() if together is None else one_of_several(work, together)


if __name__ == "__main__":
    from crcm_jax import __main__ as program

    program.dispatch = main
    program.run()
