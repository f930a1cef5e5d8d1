"""`crcm demo`: the three stages on moving digits, on a laptop."""

from __future__ import annotations

import argparse

from crcm_jax.cli import _places
from crcm_jax.cli._parser import Parser

HELP = "distil a streaming student of moving digits in minutes, and report on it"
EXAMPLE = "crcm demo --workdir=out/demo"


def parser() -> Parser:
    """The command line of `crcm demo`."""
    p = Parser("crcm demo", description=f"{HELP[0].upper()}{HELP[1:]}.", examples=[EXAMPLE])
    p.add_argument("--workdir", type=_places.new_folder, default="out/demo", help="folder of the demo [%(default)s]")
    p.add_argument("--from-scratch", action="store_true", help="train the bidirectional teacher too")
    return p


def main(argv: list[str]) -> int:
    """Runs the demo and names its report; returns 0."""
    return run(parser().parse_args(argv))


def run(options: argparse.Namespace) -> int:
    """Does what was parsed."""
    from absl import flags

    from crcm_jax import demo

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    print(f"report: {demo.run(options.workdir, options.from_scratch)}")
    return 0
