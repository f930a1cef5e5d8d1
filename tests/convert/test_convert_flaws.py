"""What is refused: weights that do not fit, damaged files, files that would run code. Never a half-written output."""

import json
import os
import pickle
import struct
from types import SimpleNamespace

import convert_fakes as fakes
import numpy as np
import pytest

from crcm_jax.cli import convert as cli
from crcm_jax.convert import engine, safetensors_file, sources
from crcm_jax.errors import UserError

MODEL = fakes.TINY["t2v"]


def convert(source, to, layout="ours", **options):
    said = []
    engine.convert(source, to, layout, say=said.append, heads=2, **options)
    return "\n".join(said)


@pytest.fixture
def native():
    return fakes.tensors(MODEL)


@pytest.fixture(autouse=True)
def nothing_half_written(tmp_path):
    """Whatever happens, the target is whole or absent, and no draft stays behind."""
    yield
    assert not list(tmp_path.rglob("*.partial*")) and not (tmp_path / "out.safetensors").exists()


def test_missing_unexpected_and_misshapen(tmp_path, native, capsys):
    del native["blocks.1.ffn.0.weight"], native["head.modulation"]
    native["blocks.2.extra.weight"] = np.ones(3, np.float32)
    native["text_embedding.0.weight"] = native["text_embedding.0.weight"][:, :7]
    native["time_embedding.2.bias"] = native["time_embedding.2.bias"][:5]
    source = fakes.save(tmp_path / "n.safetensors", native)
    with pytest.raises(UserError, match=r"does not fit .*: see missing, unexpected and misshapen above"):
        convert(source, tmp_path / "out.safetensors")
    assert cli.main([f"--from={source}", "--heads=2", "--dry-run"]) == 1
    said = capsys.readouterr().out
    assert "missing: 2, head.modulation, blocks.1.ffn.0.weight" in said or (
        "missing: 2, blocks.1.ffn.0.weight, head.modulation" in said
    )
    assert "unexpected: 1, blocks.2.extra.weight" in said
    assert "time_embedding.2.bias is [5], needed [24]" in said


def test_layers_that_a_published_model_would_have(tmp_path):
    """A file cut after some layers is that model with the rest missing, not a smaller model."""
    model = engine.models.known("wan2.1-t2v-1.3b")
    specs = {n: engine.Spec("BF16", s) for n, s in fakes.shapes(model, "native").items()}
    specs = {n: spec for n, spec in specs.items() if not n.startswith("blocks.29.")}
    found, layout = engine.models.identify(specs, {})
    report = engine.compare(sources.Source(tmp_path, "file", specs, None), found, layout)
    assert len(report.missing) == 27 and all(name.startswith("blocks.29.") for name in report.missing)
    with pytest.raises(UserError, match="of no layout known here"):
        engine.models.identify({f"down.{i}.weight": engine.Spec("F32", (3,)) for i in range(9)}, {})


def test_sizes_that_are_no_model(tmp_path):
    model = fakes.TINY["umt5"]
    for name, shape in (("shared.weight", (5,)), ("relative_attention_bias", (8, 0))):
        specs = {n: engine.Spec("F32", shape if name in n else s) for n, s in fakes.shapes(model, "diffusers").items()}
        with pytest.raises(UserError, match=r"of no possible umt5 .*--model"):
            engine.models.identify(specs, {})
    said = {"heads": 5}
    specs = {n: engine.Spec("F32", s) for n, s in fakes.shapes(MODEL, "native").items()}
    with pytest.raises(UserError, match=r"of no possible wan-transformer .*model\.heads 5"):
        engine.models.identify(specs, said)


def test_another_model_than_the_one_asked_for(tmp_path, native):
    source = fakes.save(tmp_path / "n.safetensors", native)
    with pytest.raises(UserError, match=r"does not fit wan2\.1-t2v-1\.3b"):
        convert(source, tmp_path / "out.safetensors", model="wan2.1-t2v-1.3b")
    with pytest.raises(UserError, match="of no layout known here for umt5-xxl"):
        convert(source, tmp_path / "out.safetensors", model="umt5-xxl")
    with pytest.raises(UserError, match="is not for umt5: use one of native, diffusers, ours"):
        umt5 = fakes.save(tmp_path / "u.safetensors", fakes.tensors(fakes.TINY["umt5"]))
        convert(umt5, tmp_path / "out.safetensors", "rcm")


def with_header(path, change):
    """Rewrites a safetensors file's header text."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def stretched(text):
    header = json.loads(text)
    name = next(iter(header))
    header[name]["shape"] = [n + 1 for n in header[name]["shape"]]
    return json.dumps(header)


def overlapping(text):
    header = json.loads(text)
    names = sorted(header, key=lambda n: header[n]["data_offsets"])
    sizes = {n: header[n]["data_offsets"][1] - header[n]["data_offsets"][0] for n in names}
    first = next(n for n in names[1:] if sizes[n] == sizes[names[0]])
    header[first]["data_offsets"] = header[names[0]]["data_offsets"]
    return json.dumps(header)


def twice(text):
    header = json.loads(text)
    name = next(iter(header))
    return text.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"


FLAWS = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-100]), r"it has \d+ bytes of \d+"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"x"), r"it has \d+ bytes of \d+"),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:50]), "header is cut off"),
    "empty": (lambda p: p.write_bytes(b""), "header is cut off"),
    "something else": (lambda p: p.write_bytes(b"<html>404 not found</html>"), "header is cut off or was never one"),
    "no JSON": (lambda p: with_header(p, lambda text: text.replace(":", ";")), "header is not readable"),
    "no object": (lambda p: with_header(p, lambda text: "[1, 2]"), "header is not readable"),
    "unknown type": (
        lambda p: with_header(p, lambda text: text.replace("BF16", "Q4_K")),
        "as 'Q4_K', a type that",
    ),
    "stretched": (lambda p: with_header(p, stretched), r"has \d+ bytes for \d+"),
    "overlapping": (lambda p: with_header(p, overlapping), "overlap others or leave a gap"),
    "three offsets": (lambda p: with_header(p, lambda text: text.replace('s":[', 's":[0,')), "header is not readable"),
    "twice": (lambda p: with_header(p, twice), "it names .* twice"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_damaged_safetensors(tmp_path, native, flaw):
    damage, why = FLAWS[flaw]
    source = fakes.save(tmp_path / "n.safetensors", native)
    damage(source)
    with pytest.raises(UserError, match=why) as error:
        convert(source, tmp_path / "out.safetensors")
    assert str(source) in str(error.value) and "\n" not in str(error.value)


def test_our_reader_agrees_with_the_library(tmp_path, native):
    source = fakes.save(tmp_path / "n.safetensors", native)
    reader = safetensors_file.Reader(source)
    read = {n: reader.read(n).view(native[n].dtype) for n in reader.specs}
    assert fakes.same(read, native)
    np.testing.assert_array_equal(
        reader.read("blocks.0.ffn.0.weight", (3, 5)), reader.read("blocks.0.ffn.0.weight")[3:5]
    )


@pytest.mark.parametrize("flaw", ["shard lost", "index unreadable", "place wrong", "name unknown", "name extra"])
def test_wrong_index(tmp_path, native, flaw, monkeypatch):
    monkeypatch.setattr(engine.outputs, "_SHARD", 30_000)
    source = fakes.save(tmp_path / "n.safetensors", native)
    convert(source, tmp_path / "d", "diffusers")
    path = tmp_path / "d/diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    places, files = index["weight_map"], sorted(set(index["weight_map"].values()))
    name = next(iter(places))
    if flaw == "shard lost":
        (tmp_path / "d" / files[0]).unlink()
    elif flaw == "place wrong":
        places[name] = next(file for file in files if file != places[name])
    elif flaw == "name unknown":
        del places[name]
    elif flaw == "name extra":
        places["blocks.9.more"] = files[0]
    path.write_text("{" if flaw == "index unreadable" else json.dumps(index))
    why = {
        "shard lost": "speaks of .* which is not beside it", "index unreadable": "not a readable index",
        "place wrong": "which lacks it|places it in", "name unknown": "does not know it",
        "name extra": "which lacks it",
    }[flaw]  # fmt: skip
    with pytest.raises(UserError, match=why):
        convert(tmp_path / "d", tmp_path / "out.safetensors")


def test_folders_that_are_something_else(tmp_path, native):
    (tmp_path / "pipeline/transformer").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    for name in "ab":
        fakes.save(tmp_path / f"two/{name}.safetensors", native)
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp/__0_0.distcp").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for name, why in (
        ("pipeline", r"convert its subfolders \(transformer\)"),
        ("two", r"2 files of weights \(a\.safetensors, b\.safetensors\) and no index\.json"),
        ("dcp", "dcp_to_torch"), ("empty", "is no checkpoint: it holds nothing"), ("notes.txt", "known are .safet"),
        ("nothing", "there is nothing at"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            convert(tmp_path / name, tmp_path / "out.safetensors")


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['CONVERT_PAYLOAD']}",)


def test_pickles_that_would_run_code(tmp_path, native, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs torch (pip install -e .[parity])")
    trace = tmp_path / "ran"
    monkeypatch.setenv("CONVERT_PAYLOAD", str(trace))
    tensors = {name: torch.zeros(array.shape) for name, array in native.items()}
    torch.save({**tensors, "extra": Payload()}, tmp_path / "zip.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Payload()))
    (tmp_path / "text.pth").write_text("hello")
    torch.save(tensors, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-3000])
    torch.save([tensors], tmp_path / "list.pth")
    for name, why in (
        ("zip", r"holds more than tensors \(posix.system\), and loading that could run code: refused"),
        ("raw", "not a file that torch.save has written"), ("old", "not a file that torch.save has written"),
        ("text", "not a file that torch.save has written"), ("cut", "not a whole PyTorch file"),
        ("list", "holds a list, not named tensors"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why) as error:
            convert(tmp_path / f"{name}.pth", tmp_path / "out.safetensors")
        assert "\n" not in str(error.value)
    assert not trace.exists()
    os.system(f"touch {trace}")  # what the payload would have done shows
    assert trace.exists()


def test_tensors_of_other_kinds(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch (pip install -e .[parity])")
    torch.save({"patch_embedding.weight": torch.ones(3, dtype=torch.complex64)}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"is of type torch.complex64"):
        convert(tmp_path / "c.pth", tmp_path / "out.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(tmp_path, native, value):
    native["blocks.1.norm3.bias"][5] = value
    native["blocks.2.ffn.2.weight"][3, 4] = value
    source = fakes.save(tmp_path / "n.safetensors", native)
    with pytest.raises(UserError, match="2 tensors hold NaN or infinity") as error:
        convert(source, tmp_path / "o.safetensors")
    assert "blocks.1.norm3.bias" in str(error.value) and "blocks.2.ffn.2.weight" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["n.safetensors"]


@pytest.mark.parametrize("to, layout", [("x.safetensors", "native"), ("x", "diffusers"), ("x.pth", "native")])
def test_a_failure_midway_leaves_nothing(tmp_path, native, monkeypatch, to, layout):
    if to.endswith(".pth"):
        pytest.importorskip("torch", reason="needs torch (make parity)")
    source, write, calls = fakes.save(tmp_path / "n.safetensors", native), safetensors_file.Writer.write, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        write(self, *arguments)

    monkeypatch.setattr(safetensors_file.Writer, "write", failing)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): free some space"):
        convert(source, tmp_path / to, layout)
    assert [path.name for path in tmp_path.iterdir()] == ["n.safetensors"]


def test_too_little_room(tmp_path, native, monkeypatch):
    source = fakes.save(tmp_path / "n.safetensors", native)
    monkeypatch.setattr(engine.outputs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="GB free and this needs"):
        convert(source, tmp_path / "out.safetensors")
