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


def unrolls_layers() -> bool:
    """Whether many short passes run faster with layers written out than with a scan over them: on GPUs, where a scan
    copies each layer's weights out of their stack before it multiplies."""
    return jax.default_backend() == "gpu"
