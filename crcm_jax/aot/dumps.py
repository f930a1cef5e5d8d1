"""What TPUs' compiler writes of a program on its way: the optimised HLO, and which buffers it needs.

jaxlib cannot print every program that libtpu makes: of 0.10.2 it is asynchronous instructions with several operands
that it rejects ("async-update instruction should have 1 operands"). libtpu can, as soon as a program is optimised and
its memory is laid out; the machine code, which takes most of the time, comes after that.
"""

from __future__ import annotations

import re
from pathlib import Path

_TEXT = "*.after_optimizations.txt"
_BUFFERS = "*.after_optimizations-buffer-assignment.txt"
_LAST = "*.after_optimizations_after_buffer_assignment.txt"
"""Written once the others are complete."""

_KEPT = "parameter", "output", "maybe-live-out", "preallocated-temp"
# Of main memory alone: buffers elsewhere have a colour.
_BUFFER = re.compile(rf"^allocation \d+: size (\d+), page \d+, ({'|'.join(_KEPT)})", re.MULTILINE)


def options(folder: str, function: str) -> dict[str, str | bool]:
    """Compiler options that make libtpu write into `folder` what it makes of the jitted function of that name."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": f"^jit_{function}$"}


def complete(folder: str) -> bool:
    """Whether `text` and `memory` can be read, though the compiler may be at work still."""
    return any(Path(folder).glob(_LAST))


def text(folder: str) -> str:
    """The optimised program, as `jax.stages.Compiled.as_text` would give it."""
    return _only(folder, _TEXT)


def memory(folder: str) -> tuple[int, int]:
    """(bytes of the arguments, bytes of arguments, results and temporaries together) in a device's main memory."""
    buffers = [(kind, int(size)) for size, kind in _BUFFER.findall(_only(folder, _BUFFERS))]
    return sum(size for kind, size in buffers if kind == "parameter"), sum(size for _, size in buffers)


def _only(folder: str, pattern: str) -> str:
    (path,) = Path(folder).glob(pattern)
    return path.read_text()
