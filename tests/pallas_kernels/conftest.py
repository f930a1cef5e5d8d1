"""One suite for every backend: the `backend` fixture runs a test once per implementation that this machine can run."""

import contextlib
import importlib
import importlib.util

import jax
import pytest

from pallas_kernels.attention import IMPLEMENTATIONS


def why_not(name):
    """Why a backend cannot run here, or None."""
    if importlib.util.find_spec(f"pallas_kernels.attention.{name}") is None:
        return "this backend is not part of the package"
    if name == "mosaic_gpu" and jax.default_backend() != "gpu":
        return "needs a Hopper GPU"
    if name != "reference":
        module = importlib.import_module(f"pallas_kernels.attention.{name}")
        if not hasattr(module, "backward"):
            return "this backend is not complete"
    return None


def run_mode(name):
    """The context in which a backend runs here: TPU kernels are interpreted where there is no TPU."""
    if name == "mosaic_tpu" and jax.default_backend() != "tpu":
        return importlib.import_module("pallas_kernels.attention.mosaic_tpu").interpreted()
    return contextlib.nullcontext()


@pytest.fixture(autouse=True)
def compile_quickly():
    """Most of the time here goes into compiling small programs for a CPU; compiling them well gains nothing."""
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def backend(request):
    """Name of an implementation, ready to be called."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    with run_mode(request.param):
        yield request.param
