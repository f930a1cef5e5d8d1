"""What the compiler should do otherwise on the device at hand."""

from __future__ import annotations

import functools

import jax

_GPU = {
    # cuBLAS multiplies Wan's matrices faster than XLA's own Triton products: a streamed pass takes 3 % less
    # (docs/wan_speed.md).
    "xla_gpu_enable_triton_gemm": False,
}


@functools.cache
def options() -> dict[str, bool] | None:
    """For `jax.jit(compiler_options=…)`; None where the defaults are best or the compiler does not know the options."""
    if jax.default_backend() != "gpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=_GPU).lower().compile()
    except jax.errors.JaxRuntimeError:  # a later XLA has dropped one
        return None
    return _GPU
