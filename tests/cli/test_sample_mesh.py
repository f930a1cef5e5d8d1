"""`crcm sample` over many devices makes the clips that it makes on one; which mesh it takes by itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crcm_jax.cli import _sample_mesh

ROUNDING = 1e-4
"""Pixels in [−1, 1], float32 sums in another order. Measured 1.5e-5 at most."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("ftfy", reason="needs ftfy (pip install -e .[text])")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    paths = os.pathsep.join(str(Path(__file__).parents[i]) for i in (1, 2))
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [
        sys.executable,
        str(Path(__file__).with_name("sample_mesh_worker.py")),
        str(tmp_path_factory.mktemp("w")),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def test_clips_do_not_depend_on_the_mesh(report):
    assert len(report) == 2
    for which, row in report.items():
        assert row["clips"] == 3 and row["error"] < ROUNDING, (which, row)
        assert row["power"] > 1000 * ROUNDING and row["inside"] > 0.1
    # Whole on each device where samples or tokens are cut, in pieces where it is asked for.
    assert report["streaming "]["share"] == 1
    assert report["at once fsdp=2,tensor=2"]["share"] < 0.5


def usual(devices, prompts, fits=True, heads=12):
    shape = _sample_mesh._usual(devices, prompts, heads, fits)
    return {axis: n for axis, n in shape.items() if n > 1}


def test_the_usual_mesh():
    assert usual(1, 5) == {}
    assert usual(8, 8) == usual(8, 100) == {"data": 8}
    assert usual(8, 2) == usual(8, 3) == {"data": 2, "context": 4}
    assert usual(4, 1) == {"context": 4}
    assert usual(8, 1) == {"context": 6}  # twelve heads: two devices have nothing to do
    assert usual(8, 1, heads=40) == {"context": 8}
    assert usual(8, 2, fits=False) == {"fsdp": 2, "tensor": 4}
    assert usual(8, 8, fits=False) == {"fsdp": 8}
