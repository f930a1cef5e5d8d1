"""One spelling of a mesh on every command line."""

import pytest

from crcm_jax.cli import aot, train
from crcm_jax.errors import UsageError
from crcm_jax.parallel import axes, mesh


def test_a_mesh_is_spelt_by_its_axes():
    assert axes.parse("data=2,context=4") == {"data": 2, "context": 4} and axes.parse("") == {}
    assert mesh.parse is axes.parse
    for text, message in (
        ("data:2", "--mesh=data:2 is not like data=2,context=4"),
        ("data=2,data=2", "is not like"),
        ("data=-1", "is not like"),
        ("row=2", "mesh.row is no axis"),
        ("data=0", "must be a positive integer"),
    ):
        with pytest.raises(UsageError, match=message):
            axes.parse(text)


def test_train_and_aot_take_it(tmp_path):
    config = ["--config=configs/digits.py:tf"]
    found, _ = train.parse([*config, "--mesh=data=2,context=4", f"--workdir={tmp_path}"])
    assert (found.mesh.data, found.mesh.context, found.mesh.fsdp) == (2, 4, 1)
    found, _ = aot.parse([*config, "--topology=v5p:2x2x1", "--mesh=fsdp=4", "--config.mesh.tensor=2"])
    assert (found.mesh.fsdp, found.mesh.tensor) == (4, 2)
    with pytest.raises(UsageError, match="is not like data=2,context=4"):
        train.parse([*config, "--mesh=2x4", f"--workdir={tmp_path}"])
