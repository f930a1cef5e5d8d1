"""The axes of a mesh, and their one spelling on every command line: `--mesh=data=2,context=4`. Loads without JAX."""

from __future__ import annotations

from crcm_jax.errors import UsageError

AXES = ("data", "fsdp", "context", "tensor")
"""data: samples. fsdp: samples, and every large array cut up. context: the tokens of each frame. tensor: heads and
feed-forward width."""

_DIGITS = 9
"""Of a length, at most: no machine has more devices, and Python reads no thousands of digits."""

HELP = "devices by axis: data, fsdp, context, tensor, such as data=2,context=4"


def parse(text: str) -> dict[str, int]:
    """Axis → length of `data=2,context=4`, as `config.mesh` takes it; nothing of an empty text.

    UsageError for another spelling, an axis that is none or is named twice, and a length that is not positive.
    """
    found: dict[str, int] = {}
    for word in filter(None, text.split(",")):
        name, _, length = word.partition("=")
        name = name.strip()
        if not length.isdecimal() or len(length) > _DIGITS or name in found:
            raise UsageError(f"--mesh={text} is not like data=2,context=4")
        found[name] = int(length)
    check(found)
    return found


def check(mesh: dict[str, int]) -> None:
    """UsageError for a name that is no axis, and for a length that is not a positive integer."""
    for name, value in mesh.items():
        if name not in AXES:
            raise UsageError(f"mesh.{name} is no axis: use {', '.join(AXES)}")
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"mesh.{name}={value!r} must be a positive integer")
