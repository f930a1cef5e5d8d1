"""Compiling ahead of time: what is counted, and what a user is told without waiting for a compiler."""

import functools
import importlib.util
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from crcm_jax.aot import chips, dumps, flops, hlo
from crcm_jax.aot import compile as ahead
from crcm_jax.cli import aot
from crcm_jax.errors import UsageError, UserError
from pallas_kernels.attention import Full, attention, mosaic_tpu

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the command sets for libtpu, gone after each test."""
    for name, value in aot._ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4], /*index=2*/bf16[2,4])) -> (s32[], f32[8,4], /*index=2*/bf16[2,4]) {
  %g = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%w), dimensions={0}, replica_groups=[2,4]<=[4,2]T(1,0)
  ROOT %t = (s32[], f32[8,4], /*index=2*/bf16[2,4]) tuple(%i, %x, %w)
}

%condition (p: (s32[], f32[8,4], bf16[2,4])) -> pred[] {
  %n.1 = s32[]{:T(128)} constant(30)
  ROOT %l = pred[]{:T(512)} compare(%i, BOUND), direction=LT, metadata={}
}

%all-reduce-scatter.3 (x: f32[16,4]) -> f32[4,4] {
  %r = f32[16,4] all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %s = f32[4,4] dynamic-slice(%r, %i, %j)
}

%called_computation.5 (x: f32[8]) -> f32[8] {
  ROOT %a = f32[8] all-to-all(%x), replica_groups=[4,2]<=[8]
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4], bf16[2,4]) while(%t), condition=%condition, body=%bodyNOTED
  %r = (f32[8,4], f32[8,4]) all-reduce-start(%y), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %s = f32[2,4] reduce-scatter(%y), replica_groups={}, to_apply=%add
  %f = f32[4,4] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
  %e = f32[8] custom-call(%y), custom_call_target="SparseCore", called_computations={%called_computation.5}
  ROOT %d = f32[8,4] all-reduce-done(%r)
}
"""


def _collectives(bound="%n.1", noted="", counted=1):
    text = PROGRAM.replace("NOTED", noted).replace("BOUND", bound)
    # A speed by which a result tells which devices were in the group.
    found = hlo.collectives(text, 8, lambda group: float(1 + group[-1]), counted)
    return {c.kind: c for c in found}


@pytest.mark.parametrize("noted", [', backend_config={"known_trip_count":{"n":"30"}}', ""])
def test_collectives_count_as_often_as_their_loops_run(noted):
    found = _collectives(noted=noted)
    # Groups of four, the first 0, 2, 4, 6: three quarters of the result come from the others.
    assert found["all-gather"] == hlo.Collective("all-gather", 1, 30, 30 * 64, 64, 30 * 48, 30 * 48 / 7)
    # Groups of two, the first 0, 1: half is sent to be summed, half is sent on.
    assert found["all-reduce"] == hlo.Collective("all-reduce", 1, 1, 128, 128, 128, 128 / 2)
    # Of eight, and the same as TPU programs spell it, of four.
    sent = 7 * 32, 3 * 64
    seconds = sent[0] / 8 + sent[1] / 4
    assert found["reduce-scatter"] == hlo.Collective("reduce-scatter", 2, 2, 32 + 64, 64, sum(sent), seconds)
    # What another core of the chip does for the one that runs the program.
    assert found["all-to-all"] == hlo.Collective("all-to-all", 1, 1, 32, 32, 16, 16 / 2)


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        ("{{0,1},{2,3}}", [0, 1]),
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        ("[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", [0, 2]),
        ("{}", list(range(8))),
    ],
)
def test_groups_are_read_however_they_are_written(written, devices):
    assert hlo._group(f" all-gather(%x), replica_groups={written}, dimensions={{0}}", 8) == devices


def test_a_loop_up_to_a_traced_number_counts_as_often_as_said():
    assert _collectives("%n.2", counted=3)["all-gather"].runs == 3


def test_flops_count_loops_and_the_dearest_branch():
    def f(x, w, n):
        x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)
        x = jax.lax.fori_loop(0, n, lambda _, x: x @ w, x)
        x = jax.lax.while_loop(lambda x: jnp.all(x < 1), lambda x: x @ w, x)
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)

    traced = jax.make_jaxpr(f)(jnp.ones((2, 3)), jnp.ones((3, 3)), 4)
    assert flops.matmul_flops(traced.jaxpr, counted=4) == (5 + 4 + 1 + 2) * 2 * 2 * 3 * 3


def test_flops_of_attention_are_those_of_its_tiles_on_every_device():
    mesh = AbstractMesh((2, 3), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    call = functools.partial(attention, mask=Full(), implementation="mosaic_tpu")
    q = jax.ShapeDtypeStruct((2, 1024, 3, 128), jnp.bfloat16)

    def gradient(cut, *qkv):
        split = jax.shard_map(call, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)
        return jax.grad(lambda *qkv: jnp.sum(split(*qkv).astype(jnp.float32)), (0, 1, 2))(*qkv)

    def count(cut):
        with mosaic_tpu.compile_for("v5p"):
            return flops.matmul_flops(jax.make_jaxpr(functools.partial(gradient, cut))(q, q, q).jaxpr)

    # Two products forward, three for dq, and four for dk and dv: scores and the weights' gradients twice.
    once = (2 + 3 + 4) * 2 * (2 * 3 * 1024 * 1024 * 128)
    assert count(P("data", None, "tensor")) == once
    assert count(P("data")) == 3 * once  # every device of the axis does all heads


def test_gpus_come_by_count_and_send_through_their_machines():
    h100 = chips.GPUS[0]
    assert chips.gpus("h100:32") == chips.Gpus(h100, 32, 1)
    assert chips.gpus("h100:8x4") == chips.Gpus(h100, 8, 4)
    assert chips.gpus("v5p:2x2x1") is None
    assert chips.speed(h100, 8, range(8)) == h100.links
    assert chips.speed(h100, 8, range(0, 32, 8)) == h100.network  # one GPU in each machine
    assert chips.speed(h100, 8, range(0, 16, 2)) == 4 * h100.network
    assert chips.speed(h100, 8, range(32)) == 8 * h100.network
    assert chips.speed(chips.TPUS[0], 256, range(256)) == chips.TPUS[0].links


def test_gathers_of_a_mesh_of_gpus_are_of_one_layer():
    """The whole command, in a process of its own: eight layers, so that gathering a stack of them would stand out.

    Or of what the device keeps of a stack, half of it: an update is cut over context as well.
    """
    words = ["--config=configs/digits.py:tf", "--topology=h200:2x2", "--config.mesh.fsdp=2", "--config.mesh.context=2"]
    sizes = {"layers": 8, "dim": 96}
    words += [f"--config.model.{key}={value}" for key, value in sizes.items()]
    command = [sys.executable, "-m", "crcm_jax", "aot", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    gathered = re.search(
        r"largest all-gather ([\d.]+) MB: no more than a (?:layer's|device) .*, ([\d.]+) MB", done.stdout
    )
    assert gathered, done.stdout
    assert 0 < float(gathered[1]) <= float(gathered[2])
    assert re.search(r"all-to-all +\d+", done.stdout)  # heads against tokens
    assert "memory beyond the above is not known" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config=configs/digits.py:tf"], "--topology is missing"),
        (["--config=configs/digits.py:tf", "--topology=v5p:2x2x1", "--config.mesh.fsdp=x"], "is not like data=2"),
        (["--topology=v5p:2x2x1"], "--config=FILE.py is missing"),
        (["--config=configs/digits.py:tf", "--topology=h100:8x"], "--topology=h100:8x: say how many GPUs"),
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
def test_what_cannot_be_is_one_sentence_before_any_compilation(words, says):
    with pytest.raises(UserError, match=says) as error:
        aot.main(["--config=configs/digits.py:tf", *words])
    assert "\n" not in str(error.value)


def test_without_libtpu_the_user_is_told_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    with pytest.raises(UserError, match="pip install"):
        aot.main(["--config=configs/digits.py:tf", "--topology=v5p:2x2x1"])


@pytest.mark.parametrize(
    "found",
    [
        "Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded …",
        "CompileTimeHbmOom: … the total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G). …",
    ],
)
def test_a_step_that_the_compiler_finds_too_large_is_one_sentence(found):
    def refuse():
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {found}")

    program = SimpleNamespace(lower=lambda **_: SimpleNamespace(compile=lambda **_: refuse()))
    mesh = tiny.abstract_mesh(1, 4, 1, 1)
    run = SimpleNamespace(target=SimpleNamespace(on_chip=True), mesh=mesh)
    with pytest.raises(UserError, match=r"student's step does not fit: it needs 20.5 GiB .* 4.8 GiB more .*fsdp=8"):
        ahead._compile(run, "student", program, "")


@needs_libtpu
def test_what_the_compiler_writes_is_what_it_compiles(monkeypatch):
    """The program that it prints has the collectives of the one that JAX gets back, with its kernels, and their memory
    is settled before the machine code is there. In place of a train step one of three small layers."""
    words = ["--config=configs/digits.py:bidirectional", "--topology=v5e:2x2"]
    config, options = aot.parse([*words, "--config.mesh.fsdp=2", "--config.mesh.tensor=2"])
    run = ahead.prepare(config, ahead.target(options.topology))
    place = functools.partial(NamedSharding, run.mesh)
    by_heads = functools.partial(jax.shard_map, mesh=run.mesh, check_vma=False)
    attend = functools.partial(attention, mask=Full(), implementation="mosaic_tpu")

    def layer(x, w):
        x = x @ jax.lax.with_sharding_constraint(w, place(P(None, "tensor")))
        q = jax.lax.with_sharding_constraint(x.reshape(4, 256, 2, 128), place(P("fsdp", None, "tensor")))
        y = by_heads(attend, in_specs=P("fsdp", None, "tensor"), out_specs=P("fsdp", None, "tensor"))(q, q, q)
        return jax.lax.with_sharding_constraint(y.reshape(x.shape), place(P("fsdp"))), None

    @jax.jit
    def student_step(w, x):
        return jax.grad(lambda w: jnp.sum(jax.lax.scan(layer, x, w)[0].astype(jnp.float32)))(w)

    w = jax.ShapeDtypeStruct((3, 256, 256), jnp.bfloat16, sharding=place(P(None, "fsdp", "tensor")))
    x = jax.ShapeDtypeStruct((4, 256, 256), jnp.bfloat16, sharding=place(P("fsdp")))
    with mosaic_tpu.compile_for("v5e"):
        traced = ahead.Traced("student", student_step.trace(w, x), 0, 0, 0)
    compile_program, made = ahead._compile, []

    def watched(run, player, program, folder):
        made.append((compile_program(run, player, program, folder), dumps.complete(folder), dumps.memory(folder)))
        return made[-1][0]

    monkeypatch.setattr(ahead, "_compile", watched)
    full = ahead.compile_step(run, traced)
    ((program, complete, (arguments, peak)),) = made
    assert full.collectives == ahead._collectives(run, program.as_text())
    assert {"all-gather"} < {c.kind for c in full.collectives} and max(c.runs for c in full.collectives) >= 3
    assert full.largest_gather == x.dtype.itemsize * x.size // 2  # a layer's outputs, put together over tensor
    assert complete and arguments == full.arguments and full.code > 0
    # The compiler aligns its temporaries once more.
    assert peak == pytest.approx(full.peak - full.code, abs=1 << 16)


@needs_libtpu
def test_a_program_that_jaxlib_cannot_print_is_reported_whole(capsys):
    words = ["--config=configs/digits.py:sf_dmd", "--topology=v5p:2x2x1", "--config.model.layers=1"]
    assert aot.main([*words, "--config.mesh.fsdp=2", "--config.mesh.context=2", "--no-code", "--row"]) == 0
    rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == 2
    for line, player in zip(rows, ("student", "critic"), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        row = dict(zip(aot.COLUMNS, cells, strict=True))
        assert row["mesh"] == "fsdp 2 × context 2"
        assert row["step"] == player
        peak, _, rest = row["peak, GiB"].partition(" ")
        assert 0 < float(row["kept, GiB"]) < float(peak) < 1
        assert rest == "+ program"
        gathered, layer = (float(n) for n in row["largest gather / layer, MB"].split(" / "))
        assert 0 < gathered <= layer
        assert float(row["all-to-all, GB"]) > 0  # heads against tokens


@needs_libtpu
def test_what_the_user_is_to_know_comes_out_of_the_compilers_own_process(tmp_path):
    run = SimpleNamespace(config=None, target=SimpleNamespace(topology="v9:2x2"))
    with pytest.raises(UsageError, match="v9:2x2 is not one that libtpu knows"):
        ahead._optimise_elsewhere(run, "student", str(tmp_path))
