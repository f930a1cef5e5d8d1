"""How tokens and what an update reads are cut, without any device."""

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from crcm_jax.models.wan.rules import RULES
from crcm_jax.parallel.mesh import AXES
from crcm_jax.parallel.placement import ALIGNED, ONE_DEVICE, Placement
from crcm_jax.parallel.rules import Layout


def mesh(**lengths):
    return tiny.abstract_mesh(*(lengths.get(axis, 1) for axis in AXES))


def layout(**lengths):
    return Layout(mesh(**lengths), RULES)


@pytest.mark.parametrize("frames", [1, 3, 21])
@pytest.mark.parametrize("tokens", [1, 6, 390, 1560])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_each_device_has_as_many_tokens_as_kernels_want_and_no_more(tokens, frames, devices):
    filled = Placement(mesh(context=devices)).filled(tokens, frames)
    assert filled >= tokens and filled % devices == 0 and filled // devices * frames % ALIGNED == 0
    assert filled < tokens + devices * ALIGNED


def test_whole_frames_are_not_filled():
    assert ONE_DEVICE.filled(1559, 21) == 1559
    assert Placement(mesh(data=2, fsdp=2, tensor=2)).filled(1559, 21) == 1559


NAME, SHAPE = "blocks/ffn/up/kernel", (2, 128, 24)
SPECS = {
    "players/student/params": P(None, "fsdp", "tensor"),
    "players/critic/params": P(None, "fsdp", "tensor"),
    "teacher": P(None, "fsdp", "tensor"),
    "players/student/averages/ema": P(None, ("fsdp", "context"), "tensor"),
    "players/student/opt/adam/0/mu": P(None, ("fsdp", "context"), "tensor"),
    "players/critic/opt/master": P(None, ("fsdp", "context"), "tensor"),
}


@pytest.mark.parametrize("tree, cut", SPECS.items())
def test_what_only_an_update_reads_is_cut_over_context_too(tree, cut):
    assert layout(fsdp=4, context=2, tensor=2).spec(f"{tree}/{NAME}", SHAPE) == (cut, None)


def test_context_cuts_what_an_update_reads_without_fsdp_and_into_whole_tiles():
    average = f"players/student/averages/ema/{NAME}"
    assert layout(context=4).spec(average, SHAPE)[0] == P(None, "context", None)
    assert layout(fsdp=4, context=4).spec(average, SHAPE) == (P(None, "fsdp", None), None)
    assert layout(fsdp=16, context=3).spec(average, SHAPE) == (P(None, "fsdp", None), None)
    assert layout(context=4).spec(NAME, SHAPE, pieces=True)[0] == P(None, "context", None)


def test_gradients_leave_a_layer_in_pieces():
    placement = Placement(mesh(fsdp=2, context=2))

    def loss(params, x):
        return (x @ placement.gather(params, "blocks/0", RULES)["ffn"]["up"]["kernel"]).sum()

    params = {"ffn": {"up": {"kernel": jax.ShapeDtypeStruct(SHAPE[1:], np.float32)}}}
    program = str(jax.make_jaxpr(jax.grad(loss))(params, jax.ShapeDtypeStruct((4, 128), np.float32)))
    assert "('fsdp', 'context')" in program
