"""Tensor files without PyTorch: torch.save's are read, torch.load reads ours, all else is refused."""

import io
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from crcm_jax.data import tensor_file
from crcm_jax.errors import UserError

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def numbers(dtype, shape=(3, 4, 5)):
    values = np.random.default_rng(0).integers(0, 100, shape)
    return (values % 2 == 0) if dtype == "bool" else values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def rezipped(content: bytes, **changes: bytes) -> bytes:
    """The archive with some entries' content replaced (None: left out), every checksum right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            short = entry.filename.partition("/")[2]
            if changes.get(short, b"") is not None:
                new.writestr(entry.filename, changes.get(short) or old.read(entry))
    return file.getvalue()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorch_reads_and_is_read(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    array = numbers(dtype)
    path = tmp_path / "ours.pt"
    path.write_bytes(tensor_file.dumps(array))
    for mmap in (False, True):
        tensor = torch.load(path, weights_only=True, mmap=mmap)
        assert tensor.dtype == getattr(torch, dtype) and tensor.shape == array.shape
        same(tensor.contiguous().view(torch.uint8).numpy().view(array.dtype), array)
    torch.save(tensor, tmp_path / "theirs.pt")
    same(tensor_file.loads((tmp_path / "theirs.pt").read_bytes(), "x"), array)


def test_views_scalars_and_emptiness(tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(120, dtype=torch.float32).reshape(2, 3, 4, 5)
    for tensor in (whole[1], whole[:, 1:, ::2], whole.permute(3, 0, 2, 1), whole[0, 0, 0, 3], whole[:0],
                   whole[:, :1].expand(2, 3, 4, 5), whole.clone().requires_grad_()):  # fmt: skip
        torch.save(tensor, tmp_path / "t.pt")
        same(tensor_file.loads((tmp_path / "t.pt").read_bytes(), "x"), tensor.detach().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype):
    for shape in ((), (0, 3), (7,), (2, 3, 4)):
        array = numbers(dtype, shape)
        content = tensor_file.dumps(array)
        same(tensor_file.loads(content, "x"), array)
        assert content == tensor_file.dumps(array)
    same(tensor_file.loads(tensor_file.dumps(array.T), "x"), np.ascontiguousarray(array.T))


def test_types_without_a_name_are_refused():
    with pytest.raises(UserError, match="complex64 cannot be saved"):
        tensor_file.dumps(np.zeros(3, np.complex64))


class Evil:
    def __reduce__(self):
        return print, ("code has run",)


def test_no_code_runs(capsys):
    content = rezipped(tensor_file.dumps(numbers("float32")), **{"data.pkl": pickle.dumps(Evil(), 2)})
    with pytest.raises(UserError, match=r"holds more than a tensor \(__builtin__\.print\).*could run code: refused"):
        tensor_file.loads(content, "evil.pt")
    assert capsys.readouterr().out == ""


def test_nothing_but_one_tensor():
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(3)
    for value in ({"a": tensor}, [tensor], torch.nn.Parameter(tensor), torch.zeros(2, dtype=torch.complex64),
                  torch.zeros(2).to_sparse(), torch.zeros(2, dtype=torch.float8_e5m2), "text", 3):  # fmt: skip
        file = io.BytesIO()
        torch.save(value, file)
        with pytest.raises(UserError, match=r"^x\.pt holds more than a tensor .*refused"):
            tensor_file.loads(file.getvalue(), "x.pt")
    file = io.BytesIO()
    torch.save(tensor, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"^x\.pt is not a file that torch\.save has written since PyTorch 1\.6"):
        tensor_file.loads(file.getvalue(), "x.pt")


def test_torn_files_are_named():
    content = tensor_file.dumps(numbers("float32"))
    middle = content.index(numbers("float32").tobytes()) + 50
    torn = {
        "altered bytes": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "not a zip file": content[: len(content) // 2],
        "for 60 elements": rezipped(content, **{"data/0": bytes(200)}),
        "lacks data/0": rezipped(content, **{"data/0": None}),
        "lacks data.pkl": rezipped(content, **{"data.pkl": None}),
    }
    for why, bad in torn.items():
        with pytest.raises(UserError, match=f"^x.pt is not a whole PyTorch file.*{why}") as caught:
            tensor_file.loads(bad, "x.pt")
        assert "\n" not in str(caught.value)


def test_a_shape_larger_than_its_storage_is_refused():
    """Otherwise it would show memory that is not the file's."""
    content = tensor_file.dumps(numbers("float32"))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        program = archive.read("archive/data.pkl")
    larger = program.replace(b"J\x03\x00\x00\x00J\x04", b"J\x04\x00\x00\x00J\x04")
    assert larger != program
    with pytest.raises(UserError, match="reaches past its storage"):
        tensor_file.loads(rezipped(content, **{"data.pkl": larger}), "x.pt")


def test_every_flipped_byte_and_every_cut_is_one_sentence_or_harmless():
    content = tensor_file.dumps(numbers("float32", (2, 3)))
    wanted = numbers("float32", (2, 3))
    for at in range(len(content)):
        for bad in (content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :], content[:at]):
            try:
                same(tensor_file.loads(bad, "x"), wanted)
            except UserError as error:
                assert "\n" not in str(error)
