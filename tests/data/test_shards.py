"""Shards of latents: tars as others write them, ours, ArrayRecord; the index; what is damaged is named."""

import errno
import io
import json
import os
import tarfile

import latent_sets as sets
import numpy as np
import pytest
from array_record.python import array_record_module

from crcm_jax.data import array_record_shard, example, shards, tar_shard
from crcm_jax.data.example import DamagedExample
from crcm_jax.errors import UserError


@pytest.fixture(params=["tar", "array_record"])
def folder(request, tmp_path):
    return sets.write(tmp_path / "set", kind=request.param)


def test_every_example_comes_back_in_order(folder):
    found = shards.open_shards(folder)
    assert len(found) == 12 and found.flaws() == []
    for i in range(12):
        assert sets.same(found[i], sets.example(i))
    with pytest.raises(IndexError):
        found[12]
    one = shards.open_shards(sorted(folder.glob("*_000001*"))[0])
    assert len(one) == 4 and sets.same(one[1], sets.example(5))


def test_tars_as_pytorch_and_webdataset_users_write_them(tmp_path):
    """PyTorch's axes, members in any order, in folders, with others between, without prompt; every float type."""
    torch = pytest.importorskip("torch")
    wanted = {}
    with tarfile.open(tmp_path / "shard_000000.tar", "w") as tar:

        def add(name, content):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
            latents, text = torch.randn(16, 3, 4, 5).to(dtype), torch.randn(6, 8).to(dtype)
            for name, tensor in (("embed.pt", text), ("latent.pt", latents)):
                file = io.BytesIO()
                torch.save(tensor, file)
                add(f"./part.1/{i:09d}.{name}", file.getvalue())
            add(f"./part.1/{i:09d}.json", b"{}")
            wanted[f"./part.1/{i:09d}"] = latents.float().permute(1, 2, 3, 0).numpy(), text.float().numpy()
    found = shards.open_shards(tmp_path)
    assert len(found) == 3 and found.flaws() == []
    for i, (key, (latents, text)) in enumerate(wanted.items()):
        assert found[i].key == key and found[i].prompt == ""
        np.testing.assert_array_equal(found[i].latents.astype(np.float32), latents)
        np.testing.assert_array_equal(found[i].text.astype(np.float32), text)


def test_our_tars_are_read_by_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    folder = sets.write(tmp_path, count=1)
    with tarfile.open(folder / "shard_000000.tar") as tar:
        assert sorted(tar.getnames()) == [f"000000000.{part}" for part in ("embed.pt", "latent.pt", "prompt.txt")]
        latents = torch.load(tar.extractfile("000000000.latent.pt"), weights_only=True)
        assert tar.extractfile("000000000.prompt.txt").read().decode() == sets.example(0).prompt
    np.testing.assert_array_equal(
        latents.float().numpy(), np.moveaxis(sets.example(0).latents.astype(np.float32), -1, 0)
    )
    assert latents.dtype == torch.bfloat16 and latents.is_contiguous()


def test_tars_are_indexed_once_and_again_when_they_change(tmp_path, monkeypatch):
    folder, scanned = sets.write(tmp_path / "set"), []
    scan = tar_shard.scan
    monkeypatch.setattr(tar_shard, "scan", lambda path: scanned.append(path.name) or scan(path))
    shards.open_shards(folder)
    assert sorted(scanned) == [f"shard_{i:06d}.tar" for i in range(3)]
    assert len(shards.open_shards(folder)) == 12 and len(scanned) == 3
    sets.write(folder, count=2, shard=1)  # the first two shards now hold one example each
    scanned.clear()
    assert len(shards.open_shards(folder)) == 6 and sorted(scanned) == ["shard_000000.tar", "shard_000001.tar"]
    os.utime(folder / "shard_000002.tar", ns=(0, 0))
    shards.open_shards(folder)
    assert scanned[2:] == ["shard_000002.tar"]
    for broken in ("{", json.dumps({"format": 0, "tars": {}}), json.dumps([])):
        (folder / shards.INDEX).write_text(broken)
        assert len(shards.open_shards(folder)) == 6
    assert [path.name for path in folder.iterdir() if "index" in path.name] == [shards.INDEX]


def test_the_index_of_a_folder_that_cannot_be_written_is_cached(tmp_path, monkeypatch):
    folder = sets.write(tmp_path / "set")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write = shards.write_text

    def refuse(path, text):
        if path.parent == folder:
            raise UserError(f"{path} cannot be written")
        write(path, text)

    monkeypatch.setattr(shards, "write_text", refuse)
    shards.open_shards(folder)
    assert not (folder / shards.INDEX).exists() and len(list((tmp_path / "cache" / "crcm").iterdir())) == 1
    monkeypatch.setattr(tar_shard, "scan", None)
    assert len(shards.open_shards(folder)) == 12


def test_an_altered_byte_is_named(folder):
    path = sorted(folder.glob("*_000001.*"))[0]
    stored = sets.example(6).text if path.suffix == ".tar" else sets.example(6).latents
    sets.flip(path, stored.tobytes())
    found = shards.open_shards(folder)
    for i in range(12):
        if i != 6:
            assert sets.same(found[i], sets.example(i))
    name = r"embed\.pt of 000000006 of .*shard_000001\.tar" if path.suffix == ".tar" else r"record 2 of .*shard_000001"
    with pytest.raises(DamagedExample, match=name) as caught:
        found[6]
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_cut_off_gives_its_whole_examples(tmp_path):
    folder = sets.write(tmp_path / "set")
    path = folder / "shard_000001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    for length in range(0, len(whole), 256):
        path.write_bytes(whole[:length])
        found = shards.open_shards(folder)
        kept = len(found) - 8
        assert 0 <= kept <= 4 and sets.same(found[4 + kept], sets.example(8))
        for i in range(kept):
            assert sets.same(found[4 + i], sets.example(4 + i))
        complete = length >= -(-(last.offset_data + last.size) // 512) * 512 + 1024  # two empty blocks mark the end
        assert complete != any("cut off" in flaw for flaw in found.flaws()), length
    path.write_bytes(whole)
    assert shards.open_shards(folder).flaws() == []
    sets.write(tmp_path / "records", kind="array_record")
    path = tmp_path / "records" / "shard_000002.array_record"
    path.write_bytes(path.read_bytes()[:1000])
    found = shards.open_shards(tmp_path / "records")
    assert len(found) == 8 and "shard_000002.array_record cannot be opened" in found.flaws()[0]


def test_incomplete_examples_and_altered_headers_are_named(tmp_path):
    path = tmp_path / "a.tar"
    writer = tar_shard.TarWriter(path)
    for i in range(3):
        writer.write(sets.example(i))
    writer.close()
    content = path.read_bytes().replace(b"000000001.embed.pt", b"000000001.embed.xx", 1)
    member = content.index(b"000000001.embed.xx")
    header = tarfile.TarInfo.frombuf(path.read_bytes()[member : member + 512], "utf-8", "strict")
    header.name = "000000001.embed.xx"
    path.write_bytes(content[:member] + header.tobuf(tarfile.USTAR_FORMAT) + content[member + 512 :])
    table = tar_shard.scan(path)
    assert table["keys"] == ["000000000", "000000002"] and table["flaws"] == []
    assert table["incomplete"] == {"000000001": "has no embed.pt of 000000001"}
    path.write_bytes(content)  # now that header's checksum is wrong, and what follows cannot be found
    table = tar_shard.scan(path)
    assert table["keys"] == ["000000000"] and "unreadable from byte" in table["flaws"][0]


@pytest.mark.parametrize("cut", [1, 700, 2000, 5000])
def test_an_interrupted_tar_is_gone_on_with(tmp_path, cut):
    writer = tar_shard.TarWriter(tmp_path / "a.tar")
    for i in range(4):
        writer.write(sets.example(i))
    writer.close(whole=False)
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:-cut] + bytes(cut // 2))
    if cut == 2000:
        sets.flip(tmp_path / "a.tar", sets.example(1).text.tobytes())  # as a power cut may leave it
    writer = tar_shard.TarWriter(tmp_path / "a.tar")
    assert writer.keys <= {f"{i:09d}" for i in range(1 if cut == 2000 else 4)}
    for i in range(4):
        if f"{i:09d}" not in writer.keys:
            writer.write(sets.example(i))
    writer.close()
    whole = tar_shard.TarWriter(tmp_path / "b.tar")
    for i in range(4):
        whole.write(sets.example(i))
    whole.close()
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize(
    "record",
    [b"", b"\0" * 100, example.to_record(sets.example(0))[:-1], b"\xff" * 8 + b"{}", b"\x02" + bytes(7) + b"{}"],
)
def test_what_is_no_record_is_named(record):
    with pytest.raises(DamagedExample, match=r"^rec is not a record of latents and text"):
        example.from_record(record, "rec")


def test_what_cannot_be_opened_is_told(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        shards.open_shards(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no \.tar and no \.array_record files"):
        shards.open_shards(tmp_path)
    sets.write(tmp_path)
    sets.write(tmp_path, kind="array_record")
    with pytest.raises(UserError, match="holds both"):
        shards.open_shards(tmp_path)


def test_a_full_disk_is_told_as_one(tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            pass

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device; writing x\nmore")

        def close(self):
            pass

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match="No space left") as caught:
        array_record_shard.write(tmp_path / "a.array_record", [sets.example(0)])
    assert caught.value.errno == errno.ENOSPC
