"""The command `crcm` (also `python -m crcm_jax`): finds the subcommand and turns users' errors into one sentence."""

from __future__ import annotations

import difflib
import errno
import importlib
import pkgutil
import sys

from crcm_jax import cli
from crcm_jax.errors import UsageError, UserError


def subcommands() -> list[str]:
    """Names of the modules in `crcm_jax.cli`."""
    return sorted(module.name for module in pkgutil.iter_modules(cli.__path__) if not module.name.startswith("_"))


def usage() -> str:
    """What `crcm --help` prints."""
    lines = [
        "usage: crcm COMMAND [--help] …",
        "",
        "Causal-rCM in JAX: distil a video diffusion model into one that streams.",
        "",
    ]
    modules = {name: importlib.import_module(f"crcm_jax.cli.{name}") for name in subcommands()}
    lines += [f"  {name:<10} {module.HELP}" for name, module in modules.items()]
    lines += ["", "for example:", *(f"  {module.EXAMPLE}" for module in modules.values())]
    return "\n".join(lines)


def dispatch(argv: list[str]) -> int:
    """Runs the subcommand `argv[0]` with the rest of the arguments and returns its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else UsageError.exit_code
    name, known = argv[0], subcommands()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
        raise UsageError(f"there is no command {name!r}: {hint}")
    return importlib.import_module(f"crcm_jax.cli.{name}").main(argv[1:]) or 0


def run() -> None:
    """Entry point. Exit codes: 0 done (also when stopped by SIGTERM), 1 the run could not go on, 2 wrong usage."""
    try:
        code = dispatch(sys.argv[1:])
    except UserError as error:
        print(f"crcm: {error}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"crcm: the disk is full ({error}): free some space and run the same command again", file=sys.stderr)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    run()
