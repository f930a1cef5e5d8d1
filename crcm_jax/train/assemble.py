"""From a configuration to a run: recipe, networks, data and initial weights, put together."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from crcm_jax import parts, recipes
from crcm_jax.data import pipeline
from crcm_jax.errors import UsageError, blame_config
from crcm_jax.evaluate.clips import training_clips
from crcm_jax.models.base import Condition, Params
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel import processes
from crcm_jax.parallel.rules import Layout
from crcm_jax.recipes import Training
from crcm_jax.saving.weights import load_params
from crcm_jax.train import encoders
from crcm_jax.train.loop import Initial, run
from crcm_jax.train.state import TrainState
from crcm_jax.train.step import Frozen, step_key


def initial(config, training: Training, uncond: Condition) -> Initial:
    """The weights that `config.init` names, in `config.param_dtype` and cut over `config.mesh`, checked against their
    networks and the recipes that they come from; random ones, or another role's, where the recipe allows it.

    uncond: the negative prompt, of one row. UsageError for a role that has no weights.
    """
    mesh, dtype = meshes.make(config), jnp.dtype(config.param_dtype)
    layout = Layout(mesh, training.rules)
    found: dict[str, Params] = {}
    # Those that may stand in for others first.
    for name, role in sorted(training.recipe.roles.items(), key=lambda item: item[1].like is not None):
        path, network = config.init.get(name, ""), training.networks[name]
        shapes = layout.abstract(jax.eval_shape(network.init, jax.random.key(0)))
        if path:
            found[name] = load_params(path, expect=shapes, dtype=dtype, training=role.starts_from)
        elif role.like is not None:
            found[name] = found[role.like]
        elif role.random:
            cut = jax.tree.map(lambda x: x.sharding, shapes)
            fresh = jax.jit(network.init, out_shardings=cut)(step_key(config.seed, "init", 0, 0))
            found[name] = jax.tree.map(lambda x: x.astype(dtype), fresh)
        else:
            raise UsageError(
                f"training {config.training!r} needs --config.init.{name}: the workdir of a run trained as "
                f"{' or '.join(role.starts_from)}"
            )
    uncond = meshes.everywhere(jax.tree.map(jnp.asarray, uncond), mesh)
    frozen = Frozen({name: found[name] for name in training.reads}, uncond)
    return Initial({name: found[name] for name in training.players}, frozen)


def train(config, workdir: str | Path) -> TrainState:
    """Assembles what `config` describes and runs it in `workdir`; see `run`."""
    with blame_config():
        mesh = meshes.make(config)
        training = recipes.make(config, mesh)
        pipeline.require(config, training.recipe.needs)
        codec, text_encoder = parts.codec(config), encoders.text_encoder(config)
        params = encoders.codec_params(config, codec)
        rows = processes.rows(meshes.samples(mesh), config.data.batch_size)
        data = pipeline.make(config, codec=codec, codec_params=params, text_encoder=text_encoder, rows=rows)
        sampler = training_clips(config)
    uncond = encoders.negative_prompt(config, text_encoder, needed=training.recipe.guided(config))
    init = initial(config, training, uncond)
    return run(config, workdir, training=training, data=data, init=init, sampler=sampler)
