"""What tests of the library's core share. Being here also puts this folder's helper modules on the import path."""

import os
from pathlib import Path

import jax
import jaxtyping
import pytest
from shape_checks import CHECKED
from slow_tests import is_slow

jaxtyping.install_import_hook(CHECKED, "shape_checks.check")  # before the first import of any of them

HASTY = "--xla_backend_optimization_level=0"
OLDER = " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
"""At these sizes the time goes into compiling, not into running: leave LLVM's optimisations out, and write fused loops
with XLA's older emitters, which LLVM reads in half the time, where XLA has them: it ends the process at a flag that it
does not know. Processes that tests start inherit both."""

if HURRIED := os.environ.get("JAX_PLATFORMS") == "cpu":  # before the first compilation, which reads it
    os.environ["XLA_FLAGS"] = f"{HASTY}{OLDER} {os.environ.get('XLA_FLAGS', '')}"


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        file = item.path.relative_to(here).as_posix()
        if is_slow("::".join([file, *item.nodeid.split("::")[1:]])):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def unchecked():
    """Calls as a user makes them, who has no checker: what a function itself says of an array that does not fit."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def usual():
    """Compiler options for one program that is to be equal to the bit: older emitters round what is computed for two
    places in two ways."""
    return {"xla_cpu_use_fusion_emitters": True} if HURRIED and OLDER else {}


@pytest.fixture
def x64():
    """float64 for one test: where two programs are claimed to be one function, only rounding may tell them apart."""
    with jax.enable_x64(True):
        yield
