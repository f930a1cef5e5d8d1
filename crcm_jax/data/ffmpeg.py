"""ffmpeg as a function: what it is given, what it gives back, whether it succeeded."""

from __future__ import annotations

import subprocess
from pathlib import Path

from crcm_jax.errors import UserError, need

_PATIENCE = 3600
"""Seconds after which ffmpeg counts as hanging."""


def run(*options: str, given: memoryview | None = None) -> subprocess.CompletedProcess:
    """Runs ffmpeg, `given` on its standard input; its output, its words and its exit code. UserError if there is none.

    A process that hangs is ended and counts as failed.
    """
    try:
        program = need("imageio_ffmpeg", extra="video").get_ffmpeg_exe()
    except RuntimeError as error:
        raise UserError(f"videos need ffmpeg, and there is none ({error}): pip install imageio-ffmpeg") from None
    command = [program, *(() if given is not None else ("-nostdin",)), "-v", "error", *options]
    try:
        # Without closing files, which Python's own never need, the system starts it and nothing is forked: a fork among
        # JAX's threads may wait for ever.
        return subprocess.run(
            command, input=given, capture_output=True, check=False, timeout=_PATIENCE, close_fds=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, b"", b"ffmpeg did not come to an end")
    except OSError as error:
        raise UserError(f"ffmpeg at {program} cannot be started ({error.strerror})") from None


def url(path: Path) -> str:
    """A file's path as ffmpeg takes it: with a colon in its name it would be an address of another kind."""
    return f"file:{path}"


def words(done: subprocess.CompletedProcess) -> str:
    """Its most telling words, "" if it said none: a full disk is not always what it speaks of last."""
    lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    full = [line for line in lines if "No space left" in line or "File too large" in line]
    return (full or lines[-1:] or [""])[0]
