"""`crcm train`: reads a configuration and runs it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from crcm_jax.cli import _configs
from crcm_jax.cli._parser import Parser
from crcm_jax.errors import UsageError
from crcm_jax.parallel import axes
from crcm_jax.parallel.witness import Witness

HELP = "train a model in a workdir, or go on where it stopped"
EXAMPLE = "crcm train --config=configs/digits.py:tf_scm --workdir=out/tf_scm --config.optim.lr=1e-4"

_USAGE = f"""usage: crcm train --config=FILE.py[:VARIANT] --workdir=FOLDER [--mesh=AXES] [--config.KEY=VALUE …]

{HELP[0].upper()}{HELP[1:]}. Any key of the configuration can be set, --config.optim.lr=1e-4.
SIGTERM or Ctrl-C saves and exits; the same command goes on from there.

  --config    a Python file with get_config(variant), or the name of one that comes with the program, such as digits;
              a variant of configs/digits.py is a training type
  --workdir   folder of the run: checkpoints, metrics.jsonl, TensorBoard, samples
  --mesh      {axes.HELP} (or --config.mesh.data=2 …)

As one of several processes (docs/launch.md), which must share the workdir; the same command on each, but for --process:

  --distributed                take what follows from the cluster's environment (TPU VMs, GKE, Slurm, Open MPI)
  --coordinator=HOST:PORT      where process 0 listens
  --processes=N --process=I    how many processes there are, and which this one is, from 0
  --wait=300                   how many seconds they wait for each other to start

for example:
  {EXAMPLE}"""


def parse(argv: list[str]) -> tuple[ConfigDict, Path]:
    """(locked configuration, workdir) of a command line; UsageError, one sentence, for what is wrong with it."""
    argv = with_mesh(_configs.located(argv))
    # The plain configuration first: what it lacks can then be told from what is wrong with a value.
    plain = _parse([word for word in argv if not word.startswith("--config.")], argv).config
    for word in argv:
        if word.startswith("--config."):
            _check_key(word[len("--config.") :].split("=", 1)[0], plain)
    values = _parse(argv, argv)
    if not values.workdir:
        raise UsageError(f"--workdir is missing, for example: {EXAMPLE}")
    if "://" in values.workdir:
        raise UsageError(f"--workdir={values.workdir} is no folder: mount the bucket and name a folder in it")
    return values.config, Path(values.workdir)


def with_mesh(argv: list[str]) -> list[str]:
    """The words with `--mesh=data=2` as `--config.mesh.data=2`; UsageError for what is no mesh."""
    words: list[str] = []
    for word in argv:
        given = axes.parse(word.removeprefix("--mesh=")) if word.startswith("--mesh=") else None
        words += [word] if given is None else [f"--config.mesh.{name}={length}" for name, length in given.items()]
    return words


def _parse(words: list[str], argv: list[str]) -> flags.FlagValues:
    path = next((word.split("=", 1)[1].split(":")[0] for word in argv if word.startswith("--config=")), None)
    if path is None:
        raise UsageError(f"--config=FILE.py is missing, for example: {EXAMPLE}")
    if not Path(path).is_file():
        raise UsageError(f"there is no configuration file {path}: {_configs.shipped()}")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "configuration", flag_values=values, lock_config=True, sys_argv=["crcm", *words]
    )
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    try:
        rest = values(["crcm", *words])[1:]
    except (flags.Error, ValueError, TypeError) as error:
        # A failure inside the configuration file arrives as its traceback; the last line says what happened.
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(reason.removeprefix("ValueError: ")) from error
    if rest:
        raise UsageError(f"{rest[0]!r} is not an option: options begin with --, see crcm train --help")
    return values


def _keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")


def _check_key(key: str, config: ConfigDict) -> None:
    known = list(_keys(config))
    if key.split("[")[0] in known:
        return
    # A forgotten or misspelt section matters less than the last word.
    same_word = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    near = difflib.get_close_matches(key, same_word, 1, cutoff=0.0) or difflib.get_close_matches(
        key, known, 1, cutoff=0.4
    )
    hint = f": did you mean config.{near[0]}?" if near else ""
    raise UsageError(f"the configuration has no key config.{key}{hint}")


def parse_processes(argv: list[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """(arguments of `processes.join`, or None for one process; the other words) of a command line. UsageError."""
    parser = Parser(prog="crcm train", add_help=False, allow_abbrev=False)
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--wait", type=int, default=300)
    given, rest = parser.parse_known_args(argv)
    named = (given.coordinator, given.processes, given.process)
    if given.distributed and any(value is not None for value in named):
        raise UsageError("--distributed takes everything from the environment: leave it out, or the other options")
    if not given.distributed and all(value is None for value in named):
        return None, rest
    if not given.distributed:
        if None in named:
            raise UsageError("several processes need all of --coordinator=HOST:PORT, --processes=N and --process=I")
        if not re.fullmatch(r".+:\d+", given.coordinator):
            raise UsageError(f"--coordinator={given.coordinator} must be HOST:PORT")
        if not 0 <= given.process < given.processes:
            raise UsageError(f"--process={given.process} of --processes={given.processes}: number them from 0 to N − 1")
    return {"coordinator": named[0], "count": named[1], "index": named[2], "wait": given.wait}, rest


def main(argv: list[str]) -> int:
    """Trains; returns 0 when done or stopped by a signal."""
    if any(word in ("-h", "--help", "-help") for word in argv):
        print(_USAGE)
        return 0
    together, argv = parse_processes(argv)
    config, workdir = parse(argv)
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
    index = together["index"]
    witness = Witness("?" if index is None else str(index))
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
