"""One suite for every backend: the `backend` fixture runs a test once per implementation that this machine can run."""

import contextlib
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
    return None


def run_mode(name):
    """The context in which a backend runs here: TPU kernels are interpreted where there is no TPU."""
    if name == "mosaic_tpu" and jax.default_backend() != "tpu":
        from jax.experimental.pallas import tpu as pltpu

        return pltpu.force_tpu_interpret_mode()
    return contextlib.nullcontext()


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def backend(request):
    """Name of an implementation, ready to be called."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    with run_mode(request.param):
        yield request.param
