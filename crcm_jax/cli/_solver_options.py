"""The options by which `crcm sample` and `crcm evaluate` choose how clips are made, spelt alike; no JAX here."""

from __future__ import annotations

import argparse

from crcm_jax.cli._numbers import integer, number, several, times
from crcm_jax.cli._parser import Parser
from crcm_jax.errors import UsageError

WHOLE = ("unipc", "euler")
"""Samplers of bidirectional models."""


def add(p: Parser, *, required: bool = False, guidance: float | None = None) -> None:
    """Adds them all. required: whether steps have to be named. guidance: the default, None for what the model's run
    had."""
    add = p.add_argument
    add("--sampler", choices=WHOLE, help="make the whole clip at once, with a bidirectional model [unipc]")
    p.add_renamed("--solver", "--sampler")
    steps = p.add_mutually_exclusive_group(required=required)
    steps.add_argument(
        "--steps",
        type=several(integer(1, 10_000), example="4,2"),
        help="steps of each chunk, the last for all later ones; or of the whole clip [as trained, 4 or 50]",
    )
    steps.add_argument(
        "--ode", type=integer(1, 10_000), metavar="N", help="Euler steps of a causal diffusion model [50]"
    )
    add("--mid", type=times, help="times between 1 and 0 where a student stops; chunks apart by ';' [as trained]")
    add("--noisy-context", action="store_true", help="later chunks see the last denoising pass, not a clean one")
    add("--context-start", type=integer(0), metavar="CHUNK", help="from this chunk on [as trained, 1]")
    usual = "as trained, 3; with --sampler 5" if guidance is None else "%(default)s"
    add(
        "--guidance",
        type=number(at_least=0, at_most=1000),
        default=guidance,
        help=f"guidance of a diffusion model [{usual}]",
    )
    add("--shift", type=number(above=0, at_most=1000), help="time shift of a diffusion model [3; with --sampler 5]")


def check(options: argparse.Namespace) -> None:
    """UsageError for options that do not go together, whatever the model."""
    if options.mid and not options.steps:
        raise UsageError("--mid belongs to --steps: a diffusion model's times follow from --ode")
