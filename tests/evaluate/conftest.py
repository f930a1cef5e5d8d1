"""One judge for all tests of this folder: its classifier takes seconds to train."""

import pytest
from ml_collections import ConfigDict

from crcm_jax.data import digits
from crcm_jax.evaluate import run


@pytest.fixture(scope="session")
def config():
    return ConfigDict(dict(data=digits.default_config()))


@pytest.fixture(scope="session")
def judge(config):
    return run.judge(config, clips=120, seeds=2)
