"""Folders of weights: read where one thing alone can be meant, else named with what to write."""

import json

import convert_fakes as fakes
import pytest

from crcm_jax.convert import engine
from crcm_jax.errors import UserError

MODEL = fakes.TINY["t2v"]


def convert(source, to):
    engine.convert(source, to, "native", say=fakes.quiet, heads=2)
    return fakes.load(to)


@pytest.fixture
def native():
    return fakes.tensors(MODEL)


def split(native, n=3):
    names = sorted(native)
    return [{name: native[name] for name in names[i::n]} for i in range(n)]


def refuses(folder, words):
    with pytest.raises(UserError, match=words) as caught:
        convert(folder, folder.parent / "never.safetensors")
    assert "\n" not in str(caught.value)


def test_shards_by_their_numbers_alone(tmp_path, native):
    for i, part in enumerate(split(native), 1):
        fakes.save(tmp_path / f"d/wan-{i:05}-of-00003.safetensors", part)
    (tmp_path / "d/._wan-00001-of-00003.safetensors").write_bytes(b"a Mac's shadow")
    assert fakes.same(convert(tmp_path / "d", tmp_path / "out.safetensors"), native)
    (tmp_path / "d/wan-00002-of-00003.safetensors").unlink()
    refuses(tmp_path / "d", r"holds wan-00001-of-00003\.safetensors, wan-00003.*, not all shards of one set: fetch the")


def test_an_index_of_any_name(tmp_path, native):
    parts, where = split(native, 2), {}
    for i, part in enumerate(parts):
        fakes.save(tmp_path / f"d/part{i}.safetensors", part)
        where |= dict.fromkeys(part, f"part{i}.safetensors")
    (tmp_path / "d/wan2.1.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert fakes.same(convert(tmp_path / "d", tmp_path / "out.safetensors"), native)
    (tmp_path / "d/other.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    refuses(tmp_path / "d", r"several sets of shards \(other\.safetensors\.index\.json, wan2\.1\.safet")


def test_a_tensor_in_two_shards(tmp_path, native):
    for i in (1, 2):
        fakes.save(tmp_path / f"d/wan-0000{i}-of-00002.safetensors", native)
    refuses(tmp_path / "d", "holds a tensor in two of wan-00001-of-00002.safetensors, wan-00002")


def test_files_that_may_be_meant_are_named(tmp_path, native):
    fakes.save(tmp_path / "d/a.safetensors", native)
    fakes.save(tmp_path / "d/b.safetensors", native)
    refuses(
        tmp_path / "d", r"holds 2 files of weights \(a\.safetensors, b\.safetensors\) .* --from=.*/d/a\.safetensors"
    )
    fakes.save(tmp_path / "e/checkpoints/model.safetensors", native)
    refuses(tmp_path / "e", "holds no weights itself, but checkpoints in it does: --from=.*/e/checkpoints$")
    for name in ("x.gguf", "notes.md"):
        (tmp_path / "f").mkdir(exist_ok=True)
        (tmp_path / "f" / name).write_text("x")
    refuses(
        tmp_path / "f", r"is no checkpoint: it holds notes\.md, x\.gguf; give a run's workdir, or weights that end in"
    )


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs torch (pip install -e .[parity])")


def as_torch(torch, arrays):
    kinds = {2: (torch.int16, torch.bfloat16, "i2"), 4: (torch.int32, torch.float32, "i4")}
    return {n: torch.from_numpy(a.view(kinds[a.itemsize][2])).view(kinds[a.itemsize][1]) for n, a in arrays.items()}


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt", "pytorch_model.bin"])
def test_one_file_of_torch(torch, tmp_path, native, name):
    (tmp_path / "d").mkdir()
    torch.save(as_torch(torch, native), tmp_path / "d" / name)
    (tmp_path / "d/config.json").write_text('{"num_heads": 2}')
    assert fakes.same(convert(tmp_path / "d", tmp_path / "out.safetensors"), native)
    torch.save({}, tmp_path / "d" / "optimizer.pt")
    refuses(tmp_path / "d", "holds 2 files of weights .* --from=")


@pytest.mark.parametrize("index", [True, False])
def test_shards_of_torch(torch, tmp_path, native, index):
    where = {}
    (tmp_path / "d").mkdir()
    for i, part in enumerate(split(native), 1):
        name = f"pytorch_model-{i:05}-of-00003.bin"
        torch.save(as_torch(torch, part), tmp_path / "d" / name)
        where |= dict.fromkeys(part, name)
    if index:
        (tmp_path / "d/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert fakes.same(convert(tmp_path / "d", tmp_path / "out.safetensors"), native)
    torch.save(as_torch(torch, native), tmp_path / "d/pytorch_model-00002-of-00003.bin")
    refuses(tmp_path / "d", "does not know|places it in|which another shard holds too")
