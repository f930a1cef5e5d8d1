"""The TPU kernels through the TPU's own compiler, at the size of Wan2.1, on a machine without a TPU.

Each chip compiles in a process of its own: loading libtpu is for good. `compile_report` compiles everything.
"""

import json
import os
import subprocess
import sys

import pytest

from pallas_kernels.attention.mosaic_tpu import aot

SCRIPT = """
import dataclasses, json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from jax.sharding import SingleDeviceSharding
from pallas_kernels.attention.mosaic_tpu import aot, compile_report
from pallas_kernels.attention.shapes import WAN, WAN_CAPTIONS, case

chip = aot.chip_named(sys.argv[1])
sharding = SingleDeviceSharding(aot.devices(chip.name)[0])
shape = case(sys.argv[2], WAN + WAN_CAPTIONS)
args = compile_report.arguments(shape, sharding)
functions = compile_report.functions(shape)
found = {}
for kernel in sys.argv[3].split(","):
    memory = aot.compiled(functions[kernel], args, chip).memory_analysis()
    found[kernel] = memory.temp_size_in_bytes / (memory.argument_size_in_bytes + memory.output_size_in_bytes)
if len(sys.argv) > 4:
    compile_report.sharded(chip.name)
    found["sharded"] = 0.0
print("found", json.dumps(found))
"""


def compile_for(chip, case, kernels, *more):
    """Temporaries over arguments and results, by kernel."""
    if reason := aot.why_not():
        pytest.skip(reason)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, chip, case, kernels, *more],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("found ")]
    assert lines, run.stderr[-3000:]
    return json.loads(lines[0].removeprefix("found "))


@pytest.mark.parametrize(
    "chip, case, kernels, more",
    [
        ("v5e", "tf_target_1", "forward,tangent,backward_q,backward_kv", ()),
        ("v5p", "tf_target_3", "forward_tangent", ("sharded",)),
        ("v6e", "tf_target_1", "forward_tangent,backward_kv", ()),
        ("tpu7x", "decode_3", "forward", ()),
        ("v5e", "tf_captions_3", "forward,forward_tangent,tangent,backward_q,backward_kv", ()),
    ],
    ids=["v5e", "v5p", "v6e", "tpu7x", "captions"],
)
def test_kernels_compile_at_wan_size_in_linear_memory(chip, case, kernels, more):
    """Scores of one head would be 20 times the arguments: temporaries are copies of arrays in other layouts."""
    found = compile_for(chip, case, kernels, *more)
    assert set(kernels.split(",")) <= set(found)
    assert max(found.values()) < 2
