"""`crcm demo`: the three stages on moving digits, on a laptop."""

from __future__ import annotations

from pathlib import Path

from crcm_jax.cli._parser import Parser

HELP = "distil a streaming student of moving digits in minutes, and report on it"
EXAMPLE = "crcm demo --workdir=out/demo"


def main(argv: list[str]) -> int:
    """Runs the demo and names its report; returns 0."""
    p = Parser("crcm demo", description=f"{HELP}.", epilog=f"for example: {EXAMPLE}")
    p.add_argument("--workdir", default="out/demo", help="folder of the demo [%(default)s]")
    p.add_argument("--from-scratch", action="store_true", help="train the bidirectional teacher too")
    options = p.parse_args(argv)

    from absl import flags

    from crcm_jax.demo import run

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    print(f"report: {run(Path(options.workdir), options.from_scratch)}")
    return 0
