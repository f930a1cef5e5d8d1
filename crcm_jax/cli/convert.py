"""`crcm convert`: weights from one layout to another."""

from __future__ import annotations

import argparse
import sys

from crcm_jax.cli import _places
from crcm_jax.cli._numbers import integer
from crcm_jax.cli._parser import Parser
from crcm_jax.errors import UsageError
from crcm_jax.models import registry

HELP = "bring PyTorch weights in, or hand weights back to PyTorch, bit for bit"
EXAMPLE = "crcm convert --from=Wan2.1-T2V-1.3B --to=weights/wan2.1-t2v-1.3b.safetensors --layout=ours"

_DETAIL = """\
The source's layout and model are told by the names and shapes of its tensors: Wan's own .pth and .safetensors,
diffusers and transformers folders, rCM, Causal-rCM and Self-Forcing .pt files, the Wan2.1 and 2.2 autoencoders, UMT5,
and this project's own files and checkpoints. Every tensor must find its place and every place its tensor. The output is
written under another name and takes its own when it is whole."""


def parser() -> Parser:
    """The command line of `crcm convert`."""
    p = Parser("crcm convert", description=f"{HELP[0].upper()}{HELP[1:]}.\n\n{_DETAIL}", examples=[EXAMPLE])
    add = p.add_argument
    add(
        "--from",
        type=_places.given,
        dest="source",
        required=True,
        metavar="PATH",
        help="a file, a folder, or a run's workdir",
    )
    add(
        "--to",
        type=_places.new_place,
        metavar="PATH",
        help="a new .safetensors, .pth or .pt file; for diffusers a new folder",
    )
    add("--layout", choices=registry.LAYOUTS, help="how to name and shape what is written")
    add("--model", metavar="NAME", help=f"insist on a published model: {', '.join(registry.PARTS)}")
    add("--which", choices=("ema", "params", "critic"), help="of several sets of weights [the average if there is one]")
    add("--heads", type=integer(1, 65_536), help="attention heads, for sizes that are not published ones")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="round to this type [as the source has it]")
    add("--dry-run", action="store_true", help="only report what the source holds, lacks, and has too much")
    return p


def main(argv: list[str]) -> int:
    """Converts; returns 0, or 1 after a dry run of weights that do not fit. UserError for what is wrong."""
    options = parser().parse_args(argv)
    if not options.dry_run and not (options.to and options.layout):
        raise UsageError(f"--to and --layout say what to write (or --dry-run, to look only), for example: {EXAMPLE}")

    return run(options)


def run(options: argparse.Namespace) -> int:
    """Does what was parsed."""
    # Only now: a wrong command line is answered at once, without waiting for JAX to load.
    from crcm_jax.convert import engine

    chosen = {"model": options.model, "which": options.which, "heads": options.heads}
    if options.dry_run:
        report = engine.inspect(options.source, **chosen)
        print("\n".join(report.lines()))
        return 0 if report.fits else 1
    dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(options.dtype)
    say = lambda line: print(line, file=sys.stderr if line.startswith("warning") else sys.stdout)  # noqa: E731
    engine.convert(options.source, options.to, options.layout, dtype=dtype, say=say, **chosen)
    return 0
