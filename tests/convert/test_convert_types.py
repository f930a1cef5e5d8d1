"""Element types: every one that the formats have is cast, handed on, or refused in one sentence; and what a cast makes
is looked at."""

import json
import math
import struct
from pathlib import Path

import convert_fakes as fakes
import jax
import ml_dtypes
import numpy as np
import pytest

from crcm_jax.convert import arrays, engine, torch_file
from crcm_jax.convert.arrays import Spec
from crcm_jax.errors import UserError
from crcm_jax.saving.weights import load_params

MODEL = fakes.TINY["t2v"]
NARROW = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
NO_FLOATS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
UNREADABLE = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "MXFP9": 8}
"""Bits of an element."""
MATRIX = "blocks.0.ffn.0.weight"


def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> Path:
    """A .safetensors file of any types, by the format's description alone."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def source(path: Path, kind: str, names=lambda name: "ffn" in name, value: float = 1.5) -> tuple[Path, dict]:
    """A transformer with those tensors in `kind`, all else in bfloat16; and what the numbers are."""
    rng, tensors, numbers = np.random.default_rng(0), {}, {}
    for name, shape in fakes.shapes(MODEL, "native").items():
        dtype = kind if names(name) else "BF16"
        count = math.prod(shape)
        if dtype in UNREADABLE:
            tensors[name] = dtype, shape, bytes(count * UNREADABLE[dtype] // 8)
            continue
        numeric = arrays.FLOATS.get(dtype, np.uint8)
        values = np.where(rng.random(count) < 0.5, value if dtype == kind else 1.5, 2.0).astype(numeric)
        raw = values.tobytes() if dtype in arrays.FLOATS else bytes(count * arrays.WIDTHS[dtype])
        tensors[name], numbers[name] = (dtype, shape, raw), values.astype(np.float64).reshape(shape)
    return write(path, tensors), numbers


def convert(path, to, layout="ours", **options):
    said = []
    engine.convert(path, to, layout, say=said.append, heads=2, **options)
    return "\n".join(said)


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("to, dtype", [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")])
def test_narrow_floats_are_widened_and_what_is_written_can_be_loaded(tmp_path, kind, to, dtype):
    path, numbers = source(tmp_path / "n.safetensors", kind)
    convert(path, tmp_path / "native.safetensors", "native", dtype=to)
    found = fakes.load(tmp_path / "native.safetensors")
    assert {str(a.dtype) for a in found.values()} == {dtype}
    for name, wanted in numbers.items():
        np.testing.assert_array_equal(found[name].astype(np.float64), wanted, name)
    convert(path, tmp_path / "ours.safetensors", dtype=to)
    expect = jax.eval_shape(MODEL.family.network(MODEL.config).init, jax.random.key(0))
    loaded = load_params(tmp_path / "ours.safetensors", expect=expect)
    np.testing.assert_array_equal(np.asarray(loaded["blocks"]["ffn"]["up"]["kernel"][0], np.float64), numbers[MATRIX].T)


@pytest.mark.parametrize("kind", NARROW)
def test_without_a_type_what_no_network_computes_with_is_refused(tmp_path, kind):
    path, _ = source(tmp_path / "n.safetensors", kind)
    with pytest.raises(UserError, match=f"is of type {kind}, which no network here .* give --dtype=bfloat16"):
        convert(path, tmp_path / "out.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["n.safetensors"]
    # Other layouts are handed on as they are, to the bit.
    convert(path, tmp_path / "native.safetensors", "native")
    convert(tmp_path / "native.safetensors", tmp_path / "again.safetensors", "native")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "native.safetensors").read_bytes()
    assert kind.encode() in (tmp_path / "native.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [None, "BF16"])
@pytest.mark.parametrize("kind", NO_FLOATS)
def test_what_is_no_floating_point_number_is_refused(tmp_path, kind, dtype):
    path, _ = source(tmp_path / "n.safetensors", kind)
    with pytest.raises(UserError, match=f"is of type {kind}, no floating-point one: quantised weights cannot"):
        convert(path, tmp_path / "out.safetensors", dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["n.safetensors"]


@pytest.mark.parametrize("kind", UNREADABLE)
def test_types_that_cannot_be_read_are_named(tmp_path, kind):
    path, _ = source(tmp_path / "n.safetensors", kind)
    with pytest.raises(UserError, match=f"n.safetensors holds .* as '{kind}', a type that cannot be read: get the"):
        convert(path, tmp_path / "out.safetensors", dtype="BF16")


def test_every_type_of_the_format_is_dealt_with():
    assert {*arrays.FLOATS, *NO_FLOATS} == set(arrays.WIDTHS)
    assert set(NARROW) == arrays.FLOATS.keys() - arrays.WIDE.keys()
    assert torch_file._NAMES.keys() == arrays.WIDTHS.keys()
    for kind, numeric in arrays.FLOATS.items():
        assert np.dtype(numeric).itemsize == arrays.WIDTHS[kind]


def test_a_cast_that_makes_a_number_infinite_is_refused(tmp_path):
    path, _ = source(tmp_path / "n.safetensors", "BF16", value=1e6)
    with pytest.raises(UserError, match="holds numbers that are too large for F16: give --dtype=bfloat16 or float32"):
        convert(path, tmp_path / "out.safetensors", dtype="F16")
    assert [p.name for p in tmp_path.iterdir()] == ["n.safetensors"]
    assert "warning" not in convert(path, tmp_path / "fine.safetensors", dtype="F32")
    path, _ = source(tmp_path / "wide.safetensors", "F64", value=1e300)
    with pytest.raises(UserError, match="too large for BF16"):
        convert(path, tmp_path / "out.safetensors", dtype="BF16")


@pytest.mark.parametrize("kind", [*NARROW, *arrays.WIDE])
def test_what_is_no_number_is_seen_in_every_type(tmp_path, kind):
    one = np.ones(3, arrays.FLOATS[kind])
    assert not arrays.unusual(one.view(arrays.raw(kind)), kind)
    one[1] = np.nan
    assert arrays.unusual(one.view(arrays.raw(kind)), kind)
    path, _ = source(tmp_path / "n.safetensors", kind, value=np.nan)
    named = "" if kind == "BF16" else "blocks.0.ffn"
    with pytest.raises(UserError, match=rf"tensors hold NaN or infinity \({named}"):
        convert(path, tmp_path / "fine.safetensors", dtype="F32")
    assert not (tmp_path / "fine.safetensors").exists()


def test_casts_are_those_of_the_types_own_library():
    rng = np.random.default_rng(0)
    for kind in NARROW:
        codes = np.arange(256, dtype=np.uint8)
        for to in ("F32", "F16", "BF16"):
            found = arrays.cast(codes, kind, to).view(arrays.FLOATS[to]).astype(np.float64)
            exact = codes.view(arrays.FLOATS[kind]).astype(np.float64)
            with np.errstate(over="ignore"):  # what a narrower type cannot hold is infinite in both
                held = exact.astype(arrays.FLOATS[to]).astype(np.float64)
            np.testing.assert_array_equal(found, held)
    values = rng.normal(size=1000).astype(np.float32)
    found = arrays.cast(values.view(np.uint32), "F32", "BF16").view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found, values.astype(ml_dtypes.bfloat16))


def test_torch_that_is_missing_or_too_old_is_told_of_before_the_work(tmp_path, monkeypatch):
    class Old:
        __version__ = "2.6.0"
        bfloat16 = object()

    monkeypatch.setattr(torch_file, "_torch", lambda: Old)
    path, _ = source(tmp_path / "n.safetensors", "F8_E8M0")
    with pytest.raises(UserError, match=r"is of type F8_E8M0, which torch 2\.6\.0 does not know: give --dtype"):
        convert(path, tmp_path / "out.pth", "native")
    torch_file.require({"a": Spec("BF16", (3,))})
    assert [p.name for p in tmp_path.iterdir()] == ["n.safetensors"]
