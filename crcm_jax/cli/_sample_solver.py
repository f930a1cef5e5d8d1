"""How `crcm sample` and `crcm evaluate` make clips: what their options ask for, held against what the weights record.

Weights trained here, or converted from such, record their training type and configuration; published ones record
nothing, and what they are has to be said: causal ones stream, bidirectional ones (`--sampler`) make a clip at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from crcm_jax import recipes
from crcm_jax.errors import UsageError, UserError
from crcm_jax.sampling import ContextRule, Few, Ode, Schedule, Solver, Whole
from crcm_jax.sampling.schedule import MID_TIMES

STREAMING = ("mid", "noisy_context", "context_start", "chunks")
"""Options that a bidirectional model has no use for."""


def whole(options: argparse.Namespace, meta: Mapping[str, Any]) -> bool:
    """Whether clips are made at once: by a model that its weights call bidirectional, or that the options do."""
    training = meta.get("training")
    return bool(options.sampler) or (training is not None and not recipes.named(training).causal)


def choose(
    options: argparse.Namespace, meta: Mapping[str, Any], *, whole: bool = False
) -> tuple[Solver | Whole, float]:
    """(solver, guidance). meta: what the weights say, `training` and `config`, if anything; whole: whether the model
    is bidirectional whatever they say.

    UsageError for options that do not go together or not with the weights, UserError for impossible schedules.
    """
    training, config = meta.get("training"), meta.get("config") or {}
    recipe = recipes.named(training) if training else None
    whole = whole or (recipe is not None and not recipe.causal)
    if training and not whole and options.sampler:
        raise UsageError(f"--sampler is for bidirectional models, and this one was trained as {training!r}: drop it")
    if whole or options.sampler:
        return _whole(options, config)
    own = config.get("sample") or {}
    if options.ode or (recipe is not None and not recipe.distills and not options.steps):
        guidance = own.get("guidance", 3.0) if options.guidance is None else options.guidance
        return _ode(options, own.get("ode_steps", 50)), guidance
    if options.shift is not None:
        raise UsageError("--shift belongs to --ode and --sampler")
    if options.guidance not in (None, 1.0):
        raise UsageError("--guidance belongs to --ode and --sampler: a few-step student carries its guidance within")
    rollout = config.get("rollout") or {}
    noisy = options.noisy_context or rollout.get("noisy_context", False)
    start = rollout.get("context_start", 1) if options.context_start is None else options.context_start
    steps = options.steps or tuple(rollout.get("steps", (4,)))
    mid = options.mid or rollout.get("times") or usual_times(steps, noisy)
    try:
        return Few(Schedule(steps, tuple(map(tuple, mid))), ContextRule(noisy, start)), 1.0
    except ValueError as error:
        raise UserError(str(error)) from error


def _whole(options: argparse.Namespace, config: Mapping[str, Any]) -> tuple[Whole, float]:
    for name in STREAMING:
        value = getattr(options, name, None)
        if value is not None and value is not False:
            raise UsageError(
                f"--{name.replace('_', '-')} is for streaming, and a bidirectional model makes a clip at once"
            )
    if options.ode:
        raise UsageError("--ode streams, and this model is bidirectional: use --sampler=euler --steps=N")
    steps = options.steps or ((config.get("sample") or {}).get("ode_steps", 50),)
    if len(steps) != 1 or steps[0] < 1:
        raise UsageError(f"--steps={','.join(map(str, steps))}: a clip that is made at once takes one number of steps")
    guidance = (config.get("sample") or {}).get("guidance", 5.0) if options.guidance is None else options.guidance
    return Whole(options.sampler or "unipc", steps[0], options.shift or 5.0), guidance


def _ode(options: argparse.Namespace, steps: int) -> Ode:
    steps = steps if options.ode is None else options.ode
    if steps < 1:
        raise UsageError(f"--ode={steps}: use at least 1 step")
    context = ContextRule(options.noisy_context, options.context_start or 0)
    return Ode(steps, options.shift or 3.0, context=context)


def usual_times(steps: Sequence[int], noisy: bool) -> tuple[tuple[float, ...], ...]:
    """Where published students stop on their way, for each entry of `steps` (spec causal_rcm 6.1)."""
    two = (5 / 8,) if noisy else (5 / 6,)
    return tuple(two if n == 2 else MID_TIMES[: max(n - 1, 0)] for n in steps)


def describe(solver: Solver | Whole, guidance: float, meta: Mapping[str, Any], *, whole: bool) -> str:
    """One line for people: what will be done, and why that. whole: whether clips are made at once."""
    guided = "" if solver.distilled else f", guidance {guidance:g}"
    trained = meta.get("training")
    said = f"trained as {trained}" if trained else "the weights do not say what they are"
    if not trained and not whole:
        said += ": --sampler=unipc is for bidirectional ones"
    return f"{solver.describe()}{guided} ({said})"
