"""Every layout to ours and back: the same bytes of every tensor."""

import convert_fakes as fakes
import jax
import numpy as np
import pytest

from crcm_jax.convert import engine, models, safetensors_file
from crcm_jax.convert.arrays import Spec, blocks
from crcm_jax.errors import UserError
from crcm_jax.saving import storage
from crcm_jax.saving.weights import load_meta, load_params

SUFFIX = {"native": ".safetensors", "rcm": ".safetensors", "diffusers": "", "ours": ".safetensors"}
WAYS = [(name, layout) for name, model in fakes.TINY.items() for layout in model.family.layouts]


def convert(source, to, layout, **options):
    options.setdefault("heads", 2)
    return engine.convert(source, to, layout, say=fakes.quiet, **options)


@pytest.mark.parametrize("name, layout", WAYS)
def test_any_layout_to_ours_and_back(tmp_path, name, layout):
    model = fakes.TINY[name]
    original = fakes.tensors(model)
    native = fakes.save(tmp_path / "native.safetensors", original)
    start = native
    if layout != "native":
        start = tmp_path / f"start{SUFFIX[layout]}"
        convert(native, start, layout)
    assert convert(start, tmp_path / "ours.safetensors", "ours").layout == layout
    end = tmp_path / f"end{SUFFIX[layout]}"
    convert(tmp_path / "ours.safetensors", end, layout)
    assert fakes.same(fakes.load(end), fakes.load(start))
    convert(end, tmp_path / "again.safetensors", "native")
    assert fakes.same(fakes.load(tmp_path / "again.safetensors"), original)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", fakes.TINY)
def test_our_file_is_what_the_project_loads(tmp_path, name):
    model = fakes.TINY[name]
    original = fakes.tensors(model)
    convert(fakes.save(tmp_path / "n.safetensors", original), tmp_path / "ours.safetensors", "ours")
    expect = jax.eval_shape(model.family.network(model.config).init, jax.random.key(0))
    stored = load_params(tmp_path / "ours.safetensors")
    loaded = load_params(tmp_path / "ours.safetensors", expect=expect)
    for slot, place in engine.places(model, "native").items():
        leaf = dict(storage.leaves(stored))[slot[0]]
        part = np.asarray(leaf if slot[1] is None else leaf[slot[1]])
        rows = place.rows(Spec("F32", original[place.name].shape))
        theirs = original[place.name][slice(*(rows or (None,)))]
        assert part.dtype == theirs.dtype
        assert sorted(part.astype(np.float32).ravel()) == sorted(theirs.astype(np.float32).ravel())
    assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expect)))
    meta = load_meta(tmp_path / "ours.safetensors")
    fields = {**meta["model"], **model.family.fixed}
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    assert all(getattr(model.config, key) == value for key, value in fields.items())
    data = bytearray((tmp_path / "ours.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "ours.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="altered bytes"):
        load_params(tmp_path / "ours.safetensors")


def test_the_patch_embedding_of_rcm_is_the_convolution_reshaped(tmp_path):
    original = fakes.tensors(fakes.TINY["t2v"])
    convert(fakes.save(tmp_path / "n.safetensors", original), tmp_path / "r.safetensors", "rcm")
    rcm = fakes.load(tmp_path / "r.safetensors")
    assert {name.removeprefix("net.") for name in rcm} == set(original)
    flat = rcm["net.patch_embedding.weight"]
    assert flat.shape == (24, 64)
    np.testing.assert_array_equal(flat, original["patch_embedding.weight"].reshape(24, 64))


def test_published_models_are_recognised():
    """By names and shapes alone, in every layout, our own too."""
    counts = {"wan2.1-t2v-1.3b": 825, "wan2.1-t2v-14b": 1095, "wan2.1-i2v-14b": 1095 + 40 * 5 + 8,
              "wan2.2-i2v-a14b": 1095, "wan2.1-vae": 194, "wan2.2-vae": 196, "umt5-xxl": 2 + 24 * 10,
              "clip-vit-h14": 8 + 32 * 12}  # fmt: skip
    fused = {("clip-vit-h14", "diffusers"): 32 * 4}  # three projections apart, with their biases
    for name in models.KNOWN:
        model = models.known(name)
        for layout in model.family.layouts:
            specs = {n: Spec("BF16", shape) for n, shape in fakes.shapes(model, layout).items()}
            assert len(specs) == counts[name] + fused.get((name, layout), 0)
            found, seen = models.identify(specs, {})
            assert (found.name, seen, found.leaves) == (name, layout, model.leaves)
        specs = {leaf: Spec("BF16", shape) for leaf, shape in model.leaves.items()}
        found, seen = models.identify(specs, {})
        assert (found.name, seen) == (name, "ours")
    specs = {n: Spec("F32", s) for n, s in fakes.shapes(models.known("wan2.1-t2v-1.3b"), "native").items()}
    assert specs["patch_embedding.weight"].shape == (1536, 16, 1, 2, 2)
    assert specs["blocks.29.ffn.0.weight"].shape == (8960, 1536)
    assert specs["blocks.0.modulation"].shape == (1, 6, 1536) and specs["head.head.weight"].shape == (64, 1536)


def test_every_leaf_of_every_family_is_named_once():
    for model in (*fakes.TINY.values(), *map(models.known, models.KNOWN)):
        for layout in model.family.all_layouts:
            places = engine.places(model, layout)
            assert {slot[0] for slot in places} == set(model.leaves)
            assert len({(place.name, place.part) for place in places.values()}) == len(places)


def test_a_type_can_be_chosen(tmp_path):
    original = fakes.tensors(fakes.TINY["t2v"], kind="F32")
    source = fakes.save(tmp_path / "n.safetensors", original)
    convert(source, tmp_path / "low.safetensors", "native", dtype="BF16")
    low = fakes.load(tmp_path / "low.safetensors")
    assert fakes.same(low, {name: a.astype(fakes.TYPES["BF16"]) for name, a in original.items()})
    original["blocks.1.ffn.0.weight"] = original["blocks.1.ffn.0.weight"].astype(np.float16)
    mixed = fakes.save(tmp_path / "mixed.safetensors", original)
    with pytest.raises(UserError, match=r"layers of blocks/ffn/up/kernel are of types F32 and F16: give --dtype"):
        convert(mixed, tmp_path / "o.safetensors", "ours")
    convert(mixed, tmp_path / "o.safetensors", "ours", dtype="F32")
    assert {a.dtype for a in fakes.load(tmp_path / "o.safetensors").values()} == {np.dtype(np.float32)}


def test_large_arrays_move_in_small_pieces():
    big = np.arange(9 * 400_000, dtype=np.uint32).reshape(9, 400_000)
    for array in (big, big.T, big.reshape(1, 3, 1_200_000), np.uint8(3), big[:0]):
        pieces = list(blocks(np.asarray(array)))
        assert all(p.flags.c_contiguous and p.nbytes <= 5 << 20 for p in pieces)
        np.testing.assert_array_equal(np.concatenate([p.ravel() for p in pieces] or [[]]), np.asarray(array).ravel())


def test_memory_stays_near_the_largest_tensor(tmp_path):
    """Whatever NumPy allocates, seen by tracemalloc; the file is twenty times the bound."""
    import tracemalloc

    config = {**fakes.SIZES, "dim": 192, "ffn_dim": 768, "layers": 60, "text_dim": 64}
    model = models.Model(models.TRANSFORMER, "wan-transformer", models.WanConfig(**config))
    source, specs = tmp_path / "n.safetensors", fakes.shapes(model, "native")
    writer = safetensors_file.Writer(source, {n: Spec("F32", shape) for n, shape in specs.items()}, {})
    writer.close()
    convert(source, tmp_path / "warm.safetensors", "ours")
    largest = max(4 * int(np.prod(shape)) for shape in specs.values())
    tracemalloc.start()
    convert(source, tmp_path / "ours.safetensors", "ours")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The tensor, pieces of two megabytes and their checks, and names; measured 4.3 MB.
    bound = 2 * largest + (4 << 20)
    assert source.stat().st_size > 20 * bound
    assert peak < bound, peak
