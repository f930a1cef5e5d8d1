"""Weights read by slices: each process its own, nobody more than the largest tensor; altered bytes are still found."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from crcm_jax.errors import UserError
from crcm_jax.saving import tensors, weights
from crcm_jax.saving.tensors import TensorFile


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": rng.standard_normal((8, 6)).astype(np.float32), "bias": np.ones(6, ml_dtypes.bfloat16)},
        "scale": np.float32(3.5).reshape(()), "none": np.zeros((0, 3), np.float32),
    }  # fmt: skip


def test_every_shape_and_type_comes_back(tmp_path):
    weights.save_params(tmp_path / "w.safetensors", tree(), {"training": "tf"})
    loaded = weights.load_params(tmp_path / "w.safetensors")
    for given, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree())):
        assert given.dtype == wanted.dtype and given.shape == wanted.shape
        np.testing.assert_array_equal(np.asarray(given), wanted)
    assert weights.load_meta(tmp_path / "w.safetensors")["training"] == "tf"
    half = weights.load_params(tmp_path / "w.safetensors", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_only_the_pieces_that_a_process_holds_are_read(tmp_path, monkeypatch):
    """A sharding over a mesh asks for a device's rows; another process's rows are never asked for."""
    weights.save_params(tmp_path / "w.safetensors", tree(), {})
    asked, read = [], TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, *args: asked.append(args[:2]) or read(self, *args))
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    expect = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree())
    expect["a"]["kernel"] = expect["a"]["kernel"].update(sharding=NamedSharding(mesh, P("x")))
    loaded = weights.load_params(tmp_path / "w.safetensors", expect=expect)
    assert dict(asked)["a/kernel"][0].indices(8)[:2] == (0, 8) and len(asked) == 4
    np.testing.assert_array_equal(loaded["a"]["kernel"], tree()["a"]["kernel"])
    file = TensorFile(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(read(file, "a/kernel", (slice(2, 4), slice(None))), tree()["a"]["kernel"][2:4])


def test_no_more_is_held_than_the_largest_tensor_and_what_is_kept(tmp_path):
    """Counted by Python's own tracing, which NumPy reports to; what JAX keeps on the device is not in it."""
    size = 1 << 20
    save_file({f"t{i:02}": np.full(size, i, np.float32) for i in range(12)}, tmp_path / "w.safetensors")
    file = TensorFile(tmp_path / "w.safetensors")
    tracemalloc.start()
    kept = [file.read(f"t{i:02}", (slice(0, size // 4),), jnp.bfloat16) for i in range(12)]
    digest = file.digest()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(part.nbytes for part in kept) == 12 * size // 2
    assert peak < 12 * size // 2 + 4 * size + (1 << 20)
    assert digest == tensors.digest_of((f"t{i:02}", np.full(size, i, np.float32)) for i in range(12))


def test_altered_bytes_are_found_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_AT_ONCE", 7)  # so that tensors have many pieces, and last ones
    path = tmp_path / "w.safetensors"
    weights.save_params(path, tree(), {})
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    assert TensorFile(path).digest() == TensorFile(path).meta["sha256"]
    for at in range(start, len(whole), 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(UserError, match="has altered bytes"):
            weights.load_params(path)


@pytest.mark.parametrize(
    "header, why",
    [
        ({"a": ("F32", [1]), "a/b": ("F32", [1])}, "names a/b, and a tensor above it|tensors below it"),
        ({"a/b": ("F32", [1]), "a": ("F32", [1])}, "names a, and tensors below it|a tensor above it"),
        ({"a": ("F4", [8])}, "is of type F4|is not a whole"),
        ({"a": ("I32", [1])}, "holds a as int32, which are no weights"),
    ],
)
def test_files_of_other_kinds_are_one_sentence(tmp_path, header, why):
    entries = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [4 * i, 4 * i + 4]}
        for i, (name, (dtype, shape)) in enumerate(header.items())
    }
    text = json.dumps(entries).encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 * len(entries)))
    with pytest.raises(UserError, match=why) as caught:
        weights.load_params(tmp_path / "w.safetensors", expect={"a": jax.ShapeDtypeStruct((1,), jnp.float32)})
    assert "\n" not in str(caught.value)
