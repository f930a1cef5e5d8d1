"""From a config to the parts of a run: networks, codec, text encoder, objective. The only place that reads both."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from crcm_jax import flow
from crcm_jax.chunks import ChunkPattern
from crcm_jax.errors import UserError
from crcm_jax.models.base import Codec, Network, TextEncoder
from crcm_jax.models.text.umt5 import UMT5Config, UMT5Encoder
from crcm_jax.models.text.wan import WanTextEncoder, open_tokenizer
from crcm_jax.models.text.words import WordEncoder
from crcm_jax.models.vae.config import WanVAEConfig
from crcm_jax.models.vae.pixels import PixelCodec
from crcm_jax.models.vae.wan import WanVAE
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.objectives import common, diffusion
from crcm_jax.objectives.algorithm import Algorithm, gradient_of
from crcm_jax.objectives.sf_dmd import Scores, critic, sf_dmd, sf_dmd_replayed
from crcm_jax.objectives.tf_dcm import tf_dcm
from crcm_jax.objectives.tf_scm import tf_scm
from crcm_jax.parallel.placement import Placement
from crcm_jax.sampling.schedule import StepPlan
from crcm_jax.saving.weights import load_params

TRAINING_TYPES = ("bidirectional", "tf", "df", "tf_dcm", "tf_scm", "tf_dscm", "sf_dmd", "tf_scm_sf_dmd")


def chunk_pattern(config) -> ChunkPattern:
    """The chunk pattern, checked against the clip's latent frames."""
    pattern = ChunkPattern(**config.chunks)
    pattern.count(codec(config).latent_shape(config.data.frames, config.data.height, config.data.width)[0])
    return pattern


def network(config, role: str = "student", mesh: Mesh | None = None) -> Network:
    """The network of a role: `student` and `teacher` (causal unless the run is bidirectional), `real`, `critic`.

    The teacher, the real score and the critic may have another size: `config.sizes.<role>` overrides `config.model`.
    mesh: what its arrays will lie on; None is one device, whatever `config.mesh` says.
    """
    sizes = {**config.model, **config.sizes.get(role, {})}
    bidirectional = role in ("real", "critic") or config.training == "bidirectional"
    chunks = None if bidirectional else chunk_pattern(config)
    return WanTransformer(WanConfig(**_tuples(sizes)), chunks, Placement(mesh))


def codec(config) -> Codec:
    """Pixels ↔ latents."""
    return _named("codec", config.codec, {"pixels": PixelCodec, "wan_vae": _wan_vae})


def text_encoder(config) -> TextEncoder:
    """Prompts → embeddings."""
    return _named("text", config.text, {"words": WordEncoder, "umt5": _umt5})


def _wan_vae(version: str = "2.1", **options) -> Codec:
    known = {"2.1": WanVAEConfig.wan21, "2.2": WanVAEConfig.wan22}
    if version not in known:
        raise UserError(f"codec.version {version!r} is not one of {', '.join(known)}")
    return WanVAE(known[version](**options))


def _umt5(weights: str, tokenizer: str, **options) -> TextEncoder:
    for key, path in (("weights", weights), ("tokenizer", tokenizer)):
        if not path:
            raise UserError(f"--config.text.{key} is missing: see docs/weights.md for how to bring UMT5 in")
    encoder, reader = UMT5Encoder(UMT5Config.xxl()), open_tokenizer(tokenizer)
    expect = jax.eval_shape(encoder.init, jax.random.key(0))
    params = load_params(weights, expect=expect, dtype=encoder.config.dtype)
    return WanTextEncoder(encoder, params, reader, **options)


def rollout_plan(config) -> StepPlan:
    """Steps and times of each chunk in self-forcing, checked."""
    r = config.rollout
    times = tuple(tuple(row) for row in r.times)
    return StepPlan(tuple(r.steps), times, r.noisy_context, r.context_start)


def algorithm(config, mesh: Mesh | None = None) -> Algorithm:
    """The training type of `config`, with its losses bound to their networks, on `mesh` if given, and constants."""
    if config.training not in TRAINING_TYPES:
        raise UserError(f"training type {config.training!r} is not one of {', '.join(TRAINING_TYPES)}")
    return {
        "bidirectional": _diffusion, "tf": _diffusion, "df": _diffusion,
        "tf_dcm": _consistency, "tf_scm": _consistency, "tf_dscm": _consistency,
        "sf_dmd": _matching, "tf_scm_sf_dmd": _matching,
    }[config.training](config, mesh)  # fmt: skip


def _diffusion(config, mesh) -> Algorithm:
    o, net = config.objective, network(config, mesh=mesh)
    constants = {"times": flow.time_distribution(**o.times), "weighting": o.weighting, "scale": o.scale}
    if config.training != "bidirectional":
        constants["chunks"] = chunk_pattern(config)
    if config.training == "df":
        constants["strategy"] = o.strategy
    if config.training == "tf":
        constants["context_noise"] = _context_noise(config)
    run = {"bidirectional": diffusion.bidirectional, "tf": diffusion.teacher_forcing, "df": diffusion.diffusion_forcing}

    def loss(params, others, batch, key, progress):
        drop_key, key = jax.random.split(key)
        cond = common.drop_prompts(drop_key, batch, others["uncond"], o.prompt_dropout)
        return run[config.training](net, params, batch, cond, key, **constants)

    return Algorithm(student=gradient_of(loss))


def _consistency(config, mesh) -> Algorithm:
    losses = [
        {"tf_dcm": _tf_dcm, "tf_scm": _tf_scm}[name](config, mesh)
        for name in ("tf_dcm", "tf_scm")
        if config.training in (name, "tf_dscm")
    ]
    return Algorithm(student=_summed([gradient_of(loss) for loss in losses]), reads=("teacher",))


def _tf_dcm(config, mesh):
    o, net, teacher = config.objective, network(config, mesh=mesh), network(config, "teacher", mesh)
    constants = {
        "teacher_network": teacher, "chunks": chunk_pattern(config), "guidance": o.guidance, "levels": o.levels,
        "skip": o.skip, "time_shift": o.time_shift, "context_noise": _context_noise(config), "scale": o.scale,
    }  # fmt: skip

    def loss(params, others, batch, key, progress):
        uncond = common.unconditioned(batch, others["uncond"])
        cond = common.condition(batch)
        return tf_dcm(net, params, batch, cond, key, teacher=others["teacher"], uncond=uncond, **constants)

    return loss


def _tf_scm(config, mesh):
    o, net, teacher = config.objective, network(config, mesh=mesh), network(config, "teacher", mesh)
    constants = {
        "teacher_network": teacher, "chunks": chunk_pattern(config), "times": flow.time_distribution(**o.times),
        "guidance": o.guidance, "warmup": o.warmup, "context_noise": _context_noise(config),
        "one_pass": o.one_pass, "scale": o.scale,
    }  # fmt: skip

    def loss(params, others, batch, key, progress):
        return tf_scm(
            net, params, batch, common.condition(batch), key, teacher=others["teacher"], iteration=progress.iteration,
            uncond=common.unconditioned(batch, others["uncond"]), **constants,
        )  # fmt: skip

    return loss


def _matching(config, mesh) -> Algorithm:
    d, net = config.dmd, network(config, mesh=mesh)
    real, fake = network(config, "real", mesh), network(config, "critic", mesh)
    times = flow.time_distribution(**d.times)
    rolled = {"plan": rollout_plan(config), "chunks": chunk_pattern(config)}
    joint = config.training == "tf_scm_sf_dmd"

    def arguments(others, batch, progress):
        return {
            "scores": Scores(real, others["real"], fake, others["critic"]), "times": times, "scale": d.scale,
            "uncond": common.unconditioned(batch, others["uncond"]), "updates": progress.student_updates,
            "guidance": d.guidance, **rolled,
        }  # fmt: skip

    def direct(params, others, batch, key, progress):
        return sf_dmd(net, params, batch, common.condition(batch), key, **arguments(others, batch, progress))

    def replayed(params, others, batch, key, progress, weights):
        cond = common.condition(batch)
        options = {**arguments(others, batch, progress), "at_once": d.at_once, "gather_once": d.gather_once}
        return sf_dmd_replayed(net, params, batch, cond, key, weights, **options)

    def critic_loss(params, others, batch, key, progress):
        return critic(
            fake, params, batch, common.condition(batch), key, student_network=net, student=others["student"],
            updates=progress.critic_updates, times=times, gather_once=d.gather_once, **rolled,
        )  # fmt: skip

    student = replayed if d.replayed else gradient_of(direct)
    if joint:
        student = _after(config.objective.warmup, gradient_of(_tf_scm(config, mesh)), student)
    return Algorithm(
        student=student,
        critic=gradient_of(critic_loss),
        reads=("teacher", "real") if joint else ("real",),
        student_update_freq=d.student_update_freq,
        student_only_iterations=config.objective.warmup if joint else 0,
    )


def _summed(grad_fns):
    """One GradFn whose losses and gradients are the sums of the given ones', each with randomness of its own."""
    if len(grad_fns) == 1:
        return grad_fns[0]

    def summed(params, others, batch, key, progress, weights):
        (total, metrics), grads = grad_fns[0](params, others, batch, jax.random.fold_in(key, 0), progress, weights)
        for i, grad_fn in enumerate(grad_fns[1:], 1):
            (losses, more), g = grad_fn(params, others, batch, jax.random.fold_in(key, i), progress, weights)
            total, metrics, grads = total + losses, {**metrics, **more}, jax.tree.map(jax.numpy.add, grads, g)
        return (total, metrics), grads

    return summed


def _after(iteration: int, always, later):
    """`always`, plus `later` from `iteration` on (the joint type, spec causal_rcm 4.5); one program for both phases."""
    both = _summed([always, later])
    if not iteration:
        return both

    def phased(params, others, batch, key, progress, weights):
        args = (params, others, batch, key, progress, weights)

        def alone():
            (losses, metrics), grads = always(args[0], others, batch, jax.random.fold_in(key, 0), progress, weights)
            absent = jax.eval_shape(both, *args)[0][1]
            zeros = {name: jax.numpy.zeros(m.shape, m.dtype) for name, m in absent.items()}
            return (losses, {**zeros, **metrics}), grads

        return jax.lax.cond(progress.iteration < iteration, alone, lambda: both(*args))

    return phased


def _context_noise(config) -> common.ContextNoise:
    """How the student's context is noised in teacher forcing (spec causal_rcm 3.4)."""
    plan = rollout_plan(config)
    if not plan.noisy_context:
        return common.ContextNoise()
    if config.training == "tf_scm_sf_dmd":
        frames = codec(config).latent_shape(config.data.frames, config.data.height, config.data.width)[0]
        return common.ContextNoise(plan.context_times(chunk_pattern(config).count(frames)), plan.context_start)
    return common.ContextNoise((plan.schedule(0)[-1],), plan.context_start)


def _named(section: str, config, known: dict):
    options = dict(config)
    name = options.pop("name")
    if name not in known:
        raise UserError(f"{section}.name {name!r} is not one of {', '.join(known)}")
    return known[name](**_tuples(options))


def _tuples(options) -> dict:
    return {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in dict(options).items()}
