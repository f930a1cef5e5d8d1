"""What a tar holds is read, or named, or counted: by check, by convert, in training. Nothing is left out in silence."""

import io
import tarfile

import latent_sets as sets
import numpy as np
import pytest

from crcm_jax.cli import data
from crcm_jax.data import set_manifest, shards, tar_shard, tensor_file
from crcm_jax.data.latents import LatentSource
from crcm_jax.errors import UserError


def contents(index):
    one = sets.example(index)
    latents = tensor_file.dumps(np.moveaxis(one.latents, -1, 0))
    return {"latent.pt": latents, "embed.pt": tensor_file.dumps(one.text), "prompt.txt": one.prompt.encode()}


def add(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def write(path, keys, *more, without=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, key in enumerate(keys):
            for part, content in contents(index).items():
                if f"{key}.{part}" not in without:
                    add(tar, f"{key}.{part}", content)
        for name, content in more:
            add(tar, name, content)
    return path


@pytest.mark.parametrize(
    "keys", [("clip_0.v1.0", "clip_1.v1.0"), ("000", "my.video1"), ("a", "a.b"), ("x/y.z/a.b", "x/y.z/c")]
)
def test_keys_with_dots_are_read(tmp_path, keys, capsys):
    folder = write(tmp_path / "set" / "a.tar", keys).parent
    found = shards.open_shards(folder)
    assert len(found) == 2 and found.flaws() == []
    for index, key in enumerate(keys):
        assert found[index].key == key and sets.same(found[index], sets.example(index), key=False)
    assert data.main(["check", str(folder)]) == 0 and "2 whole examples" in capsys.readouterr().out
    assert data.main(["convert", f"--from={folder}", f"--to={tmp_path / 'to'}", "--format=tar"]) == 0
    again = shards.open_shards(tmp_path / "to")
    assert [again[i].key for i in range(2)] == list(keys)
    assert len(LatentSource({"path": str(folder)})) == 2


INCOMPLETE = {
    "has no latent.pt of b": {"without": ("b.latent.pt",)},
    "has no embed.pt of b": {"without": ("b.embed.pt",)},
    "has no latent.pt and no embed.pt of b": {"without": ("b.latent.pt", "b.embed.pt")},
    "has no latent.pt and no embed.pt of c, only c.latents.pth": {"more": [("c.latents.pth", b"x")]},
    "has no latent.pt and no embed.pt of c, only c.v1.mp4": {"more": [("c.v1.mp4", b"x")]},
    "has latent.pt of b more than once": {"more": [("b.latent.pt", contents(5)["latent.pt"])]},
}


@pytest.mark.parametrize("flaw", INCOMPLETE)
def test_what_is_incomplete_is_named_and_counted_everywhere(tmp_path, flaw, capsys):
    case = INCOMPLETE[flaw]
    write(tmp_path / "set" / "a.tar", ("a", "b"), *case.get("more", []), without=case.get("without", ()))
    whole = 2 if "of c" in flaw else 1
    assert data.main(["check", str(tmp_path / "set")]) == 1
    told = capsys.readouterr().out
    assert f"a.tar {flaw}" in told and f"{whole} whole examples" in told and "1 damaged" in told
    words = ["convert", f"--from={tmp_path / 'set'}", f"--to={tmp_path / 'to'}", "--format=tar"]
    with pytest.raises(UserError, match="--skip-damaged"):
        data.main(words)
    assert data.main([*words, "--skip-damaged"]) == 0
    told = capsys.readouterr()
    assert f"{whole} examples, 1 damaged ones left out" in told.out and flaw in told.err
    assert len(set_manifest.read(tmp_path / "to")["shards"]["a.tar"]["left_out"]) == 1
    assert len(LatentSource({"path": str(tmp_path / "set")})) == whole
    assert flaw in capsys.readouterr().err


def test_members_of_other_kinds_are_counted(tmp_path, capsys):
    more = [("a.json", b"{}"), ("b.json", b"{}"), ("b.v2.json", b"{}"), ("._a.latent.pt", b"x"), (".DS_Store", b"x"),
            ("__MACOSX/._b.embed.pt", b"x"), ("__about__.json", b"{}")]  # fmt: skip
    folder = write(tmp_path / "set" / "a.tar", ("a", "b"), *more).parent
    (folder / "._a.tar").write_bytes(b"\0\5\x16\7")
    (folder / ".DS_Store").write_bytes(b"x")
    assert data.main(["check", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "2 whole examples in 1 shards" in told and "not read: 5 hidden, 2 json, 1 v2.json" in told
    assert len(LatentSource({"path": str(folder)})) == 2 and "not read: 5 hidden" in capsys.readouterr().err


def test_a_hidden_shard_does_not_claim_a_folder(tmp_path):
    (tmp_path / "._a.tar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no \.tar and no \.array_record"):
        shards.open_shards(tmp_path)
    set_manifest.claim(tmp_path, {})  # a new set can be built here


def test_hard_links_are_read_and_other_links_are_named(tmp_path):
    """GNU tar stores a file that it has met before as a hard link; so do sets that share one empty prompt."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in ("a", "b", "c"):
            for part, content in contents(0).items():
                linked = {"type": tarfile.LNKTYPE, "linkname": f"a.{part}"} if key == "b" else {}
                linked = {"type": tarfile.SYMTYPE, "linkname": f"a.{part}"} if key == "c" else linked
                add(tar, f"{key}.{part}", b"" if linked else content, **linked)
    found = shards.open_shards(tmp_path)
    assert len(found) == 2 and sets.same(found[1], sets.example(0), key=False)
    assert found.flaws() == [f"{tmp_path / 'a.tar'} has latent.pt of c as no file"]


@pytest.mark.parametrize("kind", ["tar", "array_record"])
def test_a_shard_without_examples_does_not_pass(tmp_path, kind, capsys):
    sets.write(tmp_path / "set", count=4, kind=kind)
    path = tmp_path / "set" / f"shard_000001.{kind}"
    if kind == "tar":
        tar_shard.TarWriter(path).close()
    else:
        sets.array_record_shard.write(path, [])
    assert data.main(["check", str(tmp_path / "set")]) == 1
    assert f"{path} holds no examples" in capsys.readouterr().out
    # Unless the build has said so: all of them were left out, and counted there.
    set_manifest.add(tmp_path / "set", tmp_path / "set" / f"shard_000000.{kind}", 4, {})
    set_manifest.add(tmp_path / "set", path, 0, {"000000004": "has 5 of 9 frames"})
    assert data.main(["check", str(tmp_path / "set")]) == 0


def test_an_empty_set_is_no_training_data(tmp_path):
    tar_shard.TarWriter(tmp_path / "a.tar").close()
    with pytest.raises(UserError, match="holds no whole example"):
        LatentSource({"path": str(tmp_path)})
    assert data.main(["check", str(tmp_path / "a.tar")]) == 1


def test_prompts_in_tars_are_text_like_any_other(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, prompt in (("a", "ü".encode("utf-16")), ("b", "ü".encode("latin-1"))):
            for part, content in (contents(0) | {"prompt.txt": prompt}).items():
                add(tar, f"{key}.{part}", content)
    found = shards.open_shards(tmp_path)
    assert found[0].prompt == "ü"
    with pytest.raises(UserError, match=r"line 1 of prompt\.txt of b of .*a\.tar is not UTF-8"):
        found[1]
