"""What tests of the library's core share. Being here also puts this folder's helper modules on the import path."""

import os

import jax
import pytest

HASTY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""At these sizes the time goes into compiling, not into running: leave LLVM's optimisations out, and write fused loops
with XLA's older emitters, which LLVM reads in half the time. Processes that tests start inherit it."""

if os.environ.get("JAX_PLATFORMS") == "cpu":  # before the first compilation, which reads it
    os.environ["XLA_FLAGS"] = f"{HASTY} {os.environ.get('XLA_FLAGS', '')}"


@pytest.fixture
def x64():
    """float64 for one test: where two programs are claimed to be one function, only rounding may tell them apart."""
    with jax.enable_x64(True):
        yield
