"""Compiling ahead of time: what is counted, and what a user is told without waiting for a compiler."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from crcm_jax.cli import aot
from crcm_jax.errors import UsageError, UserError
from crcm_jax.parallel import flops, hlo

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4], /*index=2*/bf16[2,4])) -> (s32[], f32[8,4], /*index=2*/bf16[2,4]) {
  %g = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%w), dimensions={0}
  ROOT %t = (s32[], f32[8,4], /*index=2*/bf16[2,4]) tuple(%i, %x, %w)
}

%condition (p: (s32[], f32[8,4], bf16[2,4])) -> pred[] {
  %n.1 = s32[]{:T(128)} constant(30)
  ROOT %l = pred[]{:T(512)} compare(%i, %n.1), direction=LT, metadata={}
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4], bf16[2,4]) while(%t), condition=%condition, body=%bodyNOTED
  %r = (f32[8,4], f32[8,4]) all-reduce-start(%y), to_apply=%add
  ROOT %d = f32[8,4] all-reduce-done(%r)
}
"""


@pytest.mark.parametrize("noted", [', backend_config={"known_trip_count":{"n":"30"}}', ""])
def test_collectives_count_as_often_as_their_loops_run(noted):
    gather, reduce = hlo.collectives(PROGRAM.replace("NOTED", noted))
    assert gather == hlo.Collective("all-gather", 1, 30, 30 * 64, 64)
    assert reduce == hlo.Collective("all-reduce", 1, 1, 128, 128)


def test_flops_count_scans_and_the_dearest_branch():
    def f(x, w):
        x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)

    traced = jax.make_jaxpr(f)(jnp.ones((2, 3)), jnp.ones((3, 3)))
    assert flops.matmul_flops(traced.jaxpr) == 7 * 2 * 2 * 3 * 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config=configs/digits.py:tf"], "--topology is missing"),
        (["--config=configs/digits.py:tf", "--topology=v5p:2x2x1", "--config.mesh.fsdp=x"], "positive integer"),
        (["--topology=v5p:2x2x1"], "--config=FILE.py is missing"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words, says):
    with pytest.raises(UsageError, match=says):
        aot.main(words)


@needs_libtpu
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topology=v9:2x2"], "--topology=v9:2x2 is not one that libtpu knows"),
        (["--topology=v5p:2x2x1", "--config.mesh.fsdp=8"], "needs 8 devices and there are 4"),
        (["--topology=v5p:2x2x1", "--config.mesh.fsdp=4", "--config.mesh.tnsr=1"], "mesh.tnsr is no axis"),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=4", "--config.model.dim=15360", "--config.model.layers=40"],
         "GiB more than the 16.0 GiB it has: use mesh.fsdp="),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence_before_any_compilation(words, says, monkeypatch):
    for name, value in aot._ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says) as error:
        aot.main(["--config=configs/digits.py:tf", *words])
    assert "\n" not in str(error.value)
