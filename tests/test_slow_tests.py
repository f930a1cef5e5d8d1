"""The list of slow tests is about tests that are there."""

from pathlib import Path

import pytest
from slow_tests import SLOW, is_slow


@pytest.mark.parametrize("entry", SLOW)
def test_every_entry_is_a_test(entry):
    name, _, test = entry.partition("::")
    path = Path(__file__).parent / name
    assert path.exists()
    assert not test or f"def {test}(" in path.read_text()


def test_an_entry_means_all_that_is_in_it_and_nothing_else():
    assert is_slow("sampling/test_stream.py::test_it") and is_slow("test_demo.py::test_it[case]")
    name = "test_rollout.py::test_replaying_is_differentiating"
    assert is_slow(name) and is_slow(f"{name}[case]") and not is_slow(f"{name}_at_once")
