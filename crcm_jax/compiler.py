"""What the compiler should do otherwise on the device at hand."""

from __future__ import annotations

import functools

import jax

_GPU = {
    # cuBLAS multiplies Wan's matrices faster than XLA's own Triton products: a streamed pass takes 1 to 2 % less
    # (docs/wan_speed.md).
    "xla_gpu_enable_triton_gemm": False,
    # Where a kernel's result is used and also kept for the backward pass, it would run twice: once for each place that
    # the result goes to (docs/train_speed.md).
    "xla_gpu_enable_dynamic_slice_fusion": False,
}


_GPUS = {
    **_GPU,
    # Exchanges of one stream's tokens then run beside the other's products, which must stay apart for that: train steps
    # with cut tokens take 1 % less (docs/train_speed.md).
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_dot_merger_threshold_mb": 0,
}


@functools.cache
def options(devices: int = 1) -> dict[str, bool | int] | None:
    """For `jax.jit(compiler_options=…)`, of a program on so many devices; None where the defaults are best or the
    compiler does not know the options."""
    if jax.default_backend() != "gpu":
        return None
    wanted = _GPU if devices == 1 else _GPUS
    try:
        jax.jit(lambda: 0, compiler_options=wanted).lower().compile()
    except jax.errors.JaxRuntimeError:  # a later XLA has dropped one
        return None
    return wanted


def layers_apart() -> bool:
    """Whether many short passes run faster with layers written out than with a scan over them: on GPUs, where a scan
    copies each layer's weights out of their stack before it multiplies."""
    return jax.default_backend() == "gpu"
