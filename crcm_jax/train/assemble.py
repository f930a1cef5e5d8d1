"""From a configuration to a run: networks, losses, data and initial weights, put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from crcm_jax import build
from crcm_jax.data import pipeline
from crcm_jax.errors import UsageError, blame_config
from crcm_jax.evaluate.clips import training_clips
from crcm_jax.objectives.algorithm import Algorithm
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel import processes, rules
from crcm_jax.saving.weights import load_params
from crcm_jax.train import encoders
from crcm_jax.train.loop import Initial, run
from crcm_jax.train.state import TrainState
from crcm_jax.train.step import step_key

_CAUSAL_DIFFUSION = ("tf", "df")
_CONSISTENCY = ("tf_dcm", "tf_scm", "tf_dscm")
_MATCHING = ("sf_dmd", "tf_scm_sf_dmd")
STAGES = {
    "teacher": _CAUSAL_DIFFUSION,
    "real": ("bidirectional",),
    "critic": ("bidirectional", *_MATCHING),
}
"""Training types whose weights can play a role; those a student may start from depend on its own training type."""


def student_stages(training: str) -> tuple[str, ...]:
    """Training types whose weights the student of `training` may start from."""
    if training == "bidirectional":
        return ("bidirectional",)
    if training in _CAUSAL_DIFFUSION:
        return ("bidirectional", *_CAUSAL_DIFFUSION)
    return (*_CAUSAL_DIFFUSION, *_CONSISTENCY, *(_MATCHING if training in _MATCHING else ()))


def initial(config, algorithm: Algorithm, uncond: Any) -> Initial:
    """The trees that `config.init` names, in `config.param_dtype` and cut over `config.mesh`, checked against their
    networks and stages.

    student: random if its path is ''. critic: the real score if its path is ''. uncond: the negative prompt's embedding
    `[1, token, channel]`.
    """
    key, mesh = step_key(config.seed, "init", 0, 0), meshes.make(config)
    dtype = jnp.dtype(config.param_dtype)

    def load(role, training):
        expect = rules.abstract(jax.eval_shape(build.network(config, role).init, key), mesh)
        return load_params(config.init[role], expect=expect, dtype=dtype, training=training)

    uncond = jnp.asarray(uncond)
    others = {"uncond": jax.device_put(uncond, rules.shardings(uncond, mesh))}
    for role in algorithm.reads:
        if not config.init[role]:
            raise UsageError(
                f"training {config.training!r} needs --config.init.{role}: the workdir of a run trained as "
                f"{' or '.join(STAGES[role])}"
            )
        others[role] = load(role, STAGES[role])
    if config.init.student:
        student = load("student", student_stages(config.training))
    else:
        init = build.network(config, "student").init
        cut = rules.shardings(jax.eval_shape(init, key), mesh)
        student = jax.jit(init, out_shardings=cut)(key)
        student = jax.tree.map(lambda x: x.astype(dtype), student)
    critic = None
    if algorithm.critic is not None:
        critic = load("critic", STAGES["critic"]) if config.init.critic else others["real"]
    return Initial(student, critic, others)


def train(config, workdir: str | Path) -> TrainState:
    """Assembles what `config` describes and runs it in `workdir`; see `run`."""
    with blame_config():
        mesh = meshes.make(config)
        algorithm = build.algorithm(config, mesh)
        codec, text_encoder = build.codec(config), encoders.text_encoder(config)
        params = encoders.codec_params(config, codec)
        rows = processes.rows(meshes.samples(mesh), config.data.batch_size)
        data = pipeline.make(config, codec=codec, codec_params=params, text_encoder=text_encoder, rows=rows)
        sampler = training_clips(config)
    init = initial(config, algorithm, encoders.negative_embedding(config, text_encoder))
    return run(config, workdir, algorithm=algorithm, data=data, init=init, sampler=sampler)
