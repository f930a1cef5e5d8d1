"""The command `crcm` (also `python -m crcm_jax`): finds the subcommand and turns users' errors into one sentence."""

from __future__ import annotations

import sys

from crcm_jax import interrupts

EXIT_CODES = "exit codes: 0 done, 1 could not be done, 2 wrong usage, 130 interrupted (what was done is kept)"


def subcommands() -> list[str]:
    """Names of the modules in `crcm_jax.cli`."""
    import pkgutil

    from crcm_jax import cli

    return sorted(module.name for module in pkgutil.iter_modules(cli.__path__) if not module.name.startswith("_"))


def usage() -> str:
    """What `crcm --help` prints."""
    import importlib

    lines = [
        "usage: crcm COMMAND [--help] …",
        "",
        "Causal-rCM in JAX: distil a video diffusion model into one that streams.",
        "",
    ]
    modules = {name: importlib.import_module(f"crcm_jax.cli.{name}") for name in subcommands()}
    lines += [f"  {name:<10} {module.HELP}" for name, module in modules.items()]
    lines += ["", "for example:", *(f"  {module.EXAMPLE}" for module in modules.values())]
    return "\n".join([*lines, "", EXIT_CODES])


def dispatch(argv: list[str]) -> int:
    """Runs the subcommand `argv[0]` with the rest of the arguments and returns its exit code."""
    import difflib
    import importlib

    from crcm_jax.errors import UsageError

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
    """Entry point; ends the process with one of `EXIT_CODES`. SIGTERM, which asks a run to save, ends it with 0."""
    # Before anything else is imported: an interruption is one line from the first moment on.
    interrupts.install()
    code = _run()
    interrupts.finish(code)
    sys.exit(code)


def _run() -> int:
    import errno

    from crcm_jax.errors import UserError

    try:
        # A run that is told to stop saves and returns as if it were done.
        return dispatch(sys.argv[1:]) or (interrupts.CODE if interrupts.seen() else 0)
    except UserError as error:
        print(f"crcm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        interrupts.say()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(f"crcm: the disk is full ({error}): free some space and run the same command again", file=sys.stderr)
            return 1
        # Some libraries raise errors of their own where they are interrupted.
        if not interrupts.seen():
            raise
        interrupts.say()
    return interrupts.CODE


if __name__ == "__main__":
    run()
