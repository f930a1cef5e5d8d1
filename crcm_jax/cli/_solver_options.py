"""The options by which `crcm sample` and `crcm evaluate` choose how clips are made, spelt alike; no JAX here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from crcm_jax.errors import UsageError

WHOLE = ("unipc", "euler")
"""Samplers of bidirectional models."""


def numbers(kind: Callable[[str], Any], separator: str = ",", example: str = "4,2") -> Callable[[str], tuple]:
    """A parser of lists of numbers."""

    def parse(text: str):
        try:
            return tuple(kind(part) for part in text.split(separator) if part)
        except (ValueError, ZeroDivisionError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as {example}") from None

    return parse


def times(text: str) -> tuple[tuple[float, ...], ...]:
    """`15/16,5/6;5/8` → the times of each chunk."""
    row = numbers(lambda number: float(Fraction(number.strip())), example="15/16,5/6,5/8;5/6")
    return tuple(row(part) for part in text.split(";"))


def add_sampler(add: Callable[..., Any], **options: Any) -> None:
    """`--sampler`, of which `--solver` is another spelling."""
    add("--sampler", "--solver", choices=WHOLE, **options)


def add(p: argparse.ArgumentParser, *, required: bool = False, guidance: float | None = None) -> None:
    """Adds them all. required: whether steps have to be named. guidance: the default, None for what the model's run
    had."""
    add_sampler(p.add_argument, help="make the whole clip at once, with a bidirectional model [unipc]")
    steps = p.add_mutually_exclusive_group(required=required)
    steps.add_argument(
        "--steps",
        type=numbers(int),
        help="steps of each chunk, the last for all later ones; or of the whole clip [as trained, 4 or 50]",
    )
    steps.add_argument("--ode", type=int, metavar="N", help="Euler steps of a causal diffusion model [50]")
    add = p.add_argument
    add("--mid", type=times, help="times between 1 and 0 where a student stops; chunks apart by ';' [as trained]")
    add("--noisy-context", action="store_true", help="later chunks see the last denoising pass, not a clean one")
    add("--context-start", type=int, metavar="CHUNK", help="from this chunk on [as trained, 1]")
    usual = "as trained, 3; with --sampler 5" if guidance is None else "%(default)s"
    add("--guidance", type=float, default=guidance, help=f"guidance of a diffusion model [{usual}]")
    add("--shift", type=float, help="time shift of a diffusion model [3; with --sampler 5]")


def check(options: argparse.Namespace) -> None:
    """UsageError for options that do not go together, whatever the model."""
    if options.mid and not options.steps:
        raise UsageError("--mid belongs to --steps: a diffusion model's times follow from --ode")
