"""What tests of the library's core share. Being here also puts this folder's helper modules on the import path."""

import jax
import pytest


@pytest.fixture
def x64():
    """float64 for one test: where two programs are claimed to be one function, only rounding may tell them apart."""
    with jax.enable_x64(True):
        yield
