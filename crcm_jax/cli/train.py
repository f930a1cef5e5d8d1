"""`crcm train`: reads a configuration and runs it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crcm_jax import interrupts
from crcm_jax.cli import _config, _memory, _places
from crcm_jax.cli._numbers import integer
from crcm_jax.cli._parser import Parser
from crcm_jax.errors import UsageError
from crcm_jax.parallel import axes

if TYPE_CHECKING:
    from ml_collections import ConfigDict

HELP = "train a model in a workdir, or go on where it stopped"
EXAMPLE = "crcm train --config=configs/digits.py:tf_scm --workdir=out/tf_scm --config.optim.lr=1e-4"

_DETAIL = """\
Any key of the configuration can be set, --config.optim.lr=1e-4. SIGTERM or Ctrl-C saves and exits; the same command
goes on from there."""

_SEVERAL = "which must share the workdir; the same command on each, but for --process"

_WEEK = 7 * 86_400


def _processes(parser: Parser) -> None:
    add = parser.add_argument_group("as one of several processes (docs/launch.md)", _SEVERAL).add_argument
    add("--distributed", action="store_true", help="take what follows from the cluster (TPU VMs, GKE, Slurm, Open MPI)")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    add("--processes", type=integer(1, 1_000_000), metavar="N", help="how many processes there are")
    add("--process", type=integer(0, 1_000_000), metavar="I", help="which this one is, from 0")
    add(
        "--wait", type=integer(1, _WEEK), default=300, metavar="S", help="seconds that they wait to start [%(default)s]"
    )


def parser() -> Parser:
    """The command line of `crcm train`, but for --config.KEY=VALUE."""
    p = Parser(
        "crcm train",
        description=f"{HELP[0].upper()}{HELP[1:]}.\n\n{_DETAIL}",
        examples=[EXAMPLE],
        suggest=_config.key_for,
    )
    p.add_argument(
        "--config",
        type=_config.file,
        metavar="FILE.py[:VARIANT]",
        help="a Python file with get_config(variant), or the name of one that comes with the program, such as digits",
    )
    p.add_argument(
        "--workdir", type=_places.new_folder, metavar="DIR", help="checkpoints, metrics.jsonl, TensorBoard, samples"
    )
    p.add_argument(
        "--mesh",
        type=_config.mesh,
        action=_config.Axes,
        metavar="AXES",
        help=f"{axes.HELP} [config.mesh]",
    )
    _processes(p)
    return p


def parse(argv: list[str]) -> tuple[ConfigDict, Path]:
    """(locked configuration, workdir) of a command line; UsageError, one sentence, for what is wrong with it."""
    keys, words = _config.split(argv)
    options = parser().parse_args(words)
    for name, what in (("config", "--config=FILE.py"), ("workdir", "--workdir")):
        if getattr(options, name) is None:
            raise UsageError(f"{what} is missing, for example: {EXAMPLE}")
    return _config.load(options.config, keys, options.mesh), options.workdir


def parse_processes(argv: list[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """(arguments of `processes.join`, or None for one process; the other words) of a command line. UsageError."""
    parser = Parser("crcm train", add_help=False, lenient=True)
    _processes(parser)
    given, rest = parser.parse_known_args(argv)
    named = (given.coordinator, given.processes, given.process)
    if given.distributed and any(value is not None for value in named):
        raise UsageError("--distributed takes everything from the environment: leave it out, or the other options")
    if not given.distributed and all(value is None for value in named):
        return None, rest
    if not given.distributed:
        if None in named:
            raise UsageError("several processes need all of --coordinator=HOST:PORT, --processes=N and --process=I")
        if (
            not re.fullmatch(r"\S+:\d{1,5}", given.coordinator)
            or not 0 < int(given.coordinator.split(":")[-1]) < 1 << 16
        ):
            raise UsageError(f"--coordinator={given.coordinator} must be HOST:PORT")
        if not 0 <= given.process < given.processes:
            raise UsageError(f"--process={given.process} of --processes={given.processes}: number them from 0 to N − 1")
    return {"coordinator": named[0], "count": named[1], "index": named[2], "wait": given.wait}, rest


def main(argv: list[str]) -> int:
    """Trains; returns 0 when done or stopped by a signal."""
    if any(word in ("-h", "--help") for word in argv):
        parser().parse_args(["--help"])
    together, argv = parse_processes(argv)
    config, workdir = parse(argv)
    return run(config, workdir, together)


def run(config: ConfigDict, workdir: Path, together: dict[str, Any] | None) -> int:
    """Trains what was parsed."""
    data = config.get("data") or {}
    if together is None and data.get("name") != "latents":
        mend = "lower data.batch_size, data.frames, data.height or data.width"
        shape = [data.get(name, 1) for name in ("batch_size", "frames", "height", "width")]
        _memory.refuse_what_cannot_fit(*shape, mend=mend)
    from absl import flags

    # The data pipeline's worker processes ask for absl flags that somebody has parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    def work():
        # Only now: a wrong command line is answered at once, without waiting for JAX to load.
        from crcm_jax.train.assemble import train

        train(config, workdir)

    work() if together is None else one_of_several(work, together)
    return 0


def one_of_several(work: Callable[[], None], together: dict[str, Any]) -> None:
    """Does `work` as one of the processes that `together` (of `parse_processes`) describes.

    Where this one cannot go on, it says why and ends, without waiting for others that may be gone.
    """
    from crcm_jax.parallel.witness import Witness

    index = together["index"]
    witness = Witness("?" if index is None else str(index))
    interrupts.before_exit.append(witness.dismiss)
    from crcm_jax.parallel import processes

    try:
        witness.rename(str(processes.join(**together)))
        work()
        processes.leave()
    except BaseException as error:
        words, code = processes.explain(error, index)
        witness.dismiss(words)
        os._exit(code)
    witness.dismiss()
