"""One train step is the same function on every mesh; what a config may ask of a mesh; how leaves are cut."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from crcm_jax import recipes
from crcm_jax.configs.digits import get_config
from crcm_jax.errors import UsageError
from crcm_jax.models.wan.rules import RULES
from crcm_jax.parallel import mesh as meshes
from crcm_jax.parallel import plan
from crcm_jax.parallel.rules import Layout

ROUNDING = 1e-5
"""Float32 sums of some thousand terms in another order: 4e-6 was the most seen; an exchanged sample is 1e-1."""

COMPARED = ("tf_scm fsdp 2 × context 2 × tensor 2", "sf_dmd data 2 × fsdp 2 × context 2")
"""Between them every axis and every view of context, forward, jvp and vjp; `mesh_worker.py all` has the rest."""


@pytest.fixture(scope="module")
def report():
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}
    environment = {**os.environ, **flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(Path(__file__).with_name("mesh_worker.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("which", COMPARED)
def test_losses_and_gradients_do_not_depend_on_the_mesh(report, which):
    assert report[which]["metrics"] < ROUNDING and report[which]["gradient"] < ROUNDING


def test_the_comparison_sees_one_wrong_sample(report):
    powers = [report[name]["gradient"] for name in report if name.endswith("power")]
    assert len(powers) == 2 and min(powers) > 1000 * ROUNDING


def test_the_weights_are_really_cut(report):
    # Matrices lie cut by four; biases and modulation, much of so narrow a network, stay whole.
    assert report["tf_scm fsdp 2 × context 2 × tensor 2"]["share"] < 0.4


def test_nothing_larger_than_a_matrix_is_gathered(report):
    found = report["communication"]
    assert found["fsdp"] == found["matrix"] < found["latents"]
    # Power: left alone with the mesh, the compiler moves activations.
    assert found["fsdp, left alone"] > 2 * found["matrix"]


def test_cut_tokens_are_never_gathered(report):
    # Velocities are put together again, in latents' size; tokens have twelve times as many numbers.
    assert report["communication"]["context"] <= report["communication"]["latents"]


def test_streaming_does_not_depend_on_the_mesh(report):
    assert report["streaming"] < ROUNDING


def config(batch=8, heads=6, **mesh):
    c = get_config("tf")
    c.data.batch_size, c.model.heads, c.model.dim = batch, heads, 8 * heads
    c.mesh = ConfigDict(mesh)
    return c


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ({"fdsp": 2}, "mesh.fdsp is no axis"),
        ({"data": 0}, "positive integer"),
        ({"data": 3}, "needs 3 devices and there are 4"),
        ({"context": 2, "tensor": 2}, "mesh.tensor × mesh.context = 4 does not divide the 6 heads of the student"),
        ({"tensor": 4}, "does not divide the 6 heads of the student"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_sentence(mesh, says):
    with pytest.raises(UsageError, match=says) as error:
        meshes.make(config(**mesh), jax.devices() * 4)
    assert "\n" not in str(error.value)


def test_the_teacher_has_to_divide_as_well():
    c = config(heads=8, tensor=4)
    c.sizes.teacher = ConfigDict({"heads": 6, "dim": 48})
    with pytest.raises(UsageError, match=r"mesh\.tensor=4 does not divide the 6 heads of the teacher"):
        meshes.make(c, jax.devices() * 4)


def test_a_batch_that_does_not_divide_is_one_sentence():
    with pytest.raises(UsageError, match=r"data.batch_size=6 does not divide over mesh.data × mesh.fsdp = 4"):
        meshes.make(config(batch=6, data=2, fsdp=2), jax.devices() * 4)


def test_without_a_mesh_the_first_device_is_taken():
    assert meshes.make(get_config("tf"), jax.devices() * 4).size == 1


@pytest.fixture
def mesh():
    return tiny.abstract_mesh(1, 4, 1, 2)


def test_every_large_leaf_is_cut_wherever_it_lies(mesh):
    network = recipes.student(config())
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    tree = {"players": {"student": {"opt": {"mu": shapes}}}, "teacher": shapes}
    cut = Layout(mesh, network.rules).shardings(tree)
    assert cut["players"]["student"]["opt"]["mu"] == cut["teacher"]
    assert cut["teacher"]["blocks"]["self_attn"]["q"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert cut["teacher"]["blocks"]["ffn"]["down"]["kernel"].spec == P(None, "tensor", "fsdp")
    for leaf, sharding in zip(jax.tree.leaves(shapes["blocks"]), jax.tree.leaves(cut["teacher"]["blocks"])):
        whole = np.prod(leaf.shape)
        assert leaf.ndim < 3 or leaf.shape[1] == 6 or np.prod(sharding.shard_shape(leaf.shape)) * 8 == whole


def test_what_does_not_divide_stays_whole_and_is_said(mesh):
    said = []
    tree = {"blocks": {"ffn": {"up": {"kernel": jax.ShapeDtypeStruct((2, 6, 8), np.float32)}}}}
    cut = Layout(mesh, RULES).shardings(tree, said.append)
    assert cut["blocks"]["ffn"]["up"]["kernel"].spec == P(None, None, "tensor")
    assert said == ["replicated: blocks/ffn/up/kernel [2, 6, 8]: 6 does not divide over fsdp = 4"]


def test_a_plan_that_is_too_large_names_the_mend(mesh):
    lack = plan.shortage({"weights": 3 * plan.GIB, "optimiser": 6 * plan.GIB}, mesh, 4 * plan.GIB)
    assert "9.0 GiB on each device, 5.0 GiB more than the 4.0 GiB it has: use mesh.fsdp=16 or more" in lack
    assert plan.shortage({"weights": plan.GIB}, mesh, 4 * plan.GIB) is None
