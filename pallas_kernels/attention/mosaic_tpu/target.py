"""What the kernels are being built for: a TPU that is there, one that is only compiled for, or the interpreter.

Kernels are chosen while tracing, so this is a property of the tracing context. On a TPU it is the default device. A
machine without one can still trace for a chip (`compile_for`) or run the kernels slowly (`interpreted`).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU, per device as JAX counts them: a v5p chip is one device of two cores, a tpu7x chip is two.

    name: as in topology names. kinds: the `device_kind` strings. flops: bfloat16 matrix FLOP/s. bandwidth: HBM bytes/s.
    vmem: bytes of VMEM that a core has. Source: `jax.experimental.pallas.tpu.get_tpu_info_for_chip`, times cores.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    bandwidth: float
    vmem: int
    cores: int = 1

    @property
    def vmem_limit(self) -> int:
        """What a kernel may take; the rest is XLA's, for what it keeps there between kernels."""
        return self.vmem * 3 // 4


_MIB = 1 << 20
CHIPS = (
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 0.82e12, 128 * _MIB),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 2.46e12, 64 * _MIB, cores=2),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 920e12, 1.64e12, 128 * _MIB),
    Chip("tpu7x", ("TPU7x", "TPU7"), 1155e12, 3.7e12, 64 * _MIB),
)
INTERPRETER = Chip("interpreter", (), 0.0, 0.0, 64 * _MIB)

_override: contextvars.ContextVar[Chip | None] = contextvars.ContextVar("mosaic_tpu_target", default=None)


def target() -> Chip | None:
    """The chip that a kernel traced now is for, `INTERPRETER`, or None where there is none."""
    if (chip := _override.get()) is not None:
        return chip
    if jax.default_backend() != "tpu":
        return None
    kind = jax.devices()[0].device_kind
    return next((chip for chip in CHIPS if kind in chip.kinds), None)


def interpreted():
    """Context in which the kernels are interpreted on the default device, slowly: for tests without a TPU.

    As with `compile_for`, a function that was jitted and traced outside the context keeps what it was traced to.
    """
    return within(INTERPRETER)


def compile_for(name: str):
    """Context in which calls are traced for a chip that need not be there, for ahead-of-time compilation.

    name: one of the names in `CHIPS`.

    Raises:
      ValueError: for another name.
    """
    for chip in CHIPS:
        if chip.name == name:
            return within(chip)
    raise ValueError(f"name: no chip {name!r}: use one of {', '.join(c.name for c in CHIPS)}")


@contextlib.contextmanager
def within(chip: Chip):
    """Context in which kernels are traced for `chip`, which may differ from those in `CHIPS`, in its VMEM say."""
    token = _override.set(chip)
    try:
        yield chip
    finally:
        _override.reset(token)
