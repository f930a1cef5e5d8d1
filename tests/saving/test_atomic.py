"""Whole or nothing: whatever the house writes, a failure leaves the old file, no draft, and one sentence."""

import contextlib
import errno
import json
import os
import re
import resource
import stat
from pathlib import Path

import imageio_ffmpeg
import jax.numpy as jnp
import latent_sets as sets
import numpy as np
import pytest
from safetensors.numpy import save_file

from crcm_jax.data import convert as data_convert
from crcm_jax.data import set_manifest, shards
from crcm_jax.errors import UserError
from crcm_jax.evaluate import report, run, video
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.saving import files, manifest, weights

ROOM = 8 << 10
"""Bytes that a file may have on the small disk."""


@contextlib.contextmanager
def small_disk():
    """No file can grow beyond `ROOM`: the system refuses, other programs are ended, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def clip(seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (12, 40, 56, 3))


def page(path):
    log = path.with_name("log.jsonl")
    log.write_text('{"iteration": 1, "student/loss": 2.0}\n{"iteration": 2, "student/loss": 1.0}\n')
    report.write_report(
        path, title="t", summary="s", prompts=["p"], clips={"a": clip()[None]}, scores={}, losses={"tf": log}
    )


def foreign(layout):
    from crcm_jax.convert import engine

    return lambda path: engine.convert(
        path.with_name("source.safetensors"), path, layout, heads=2, say=lambda line: None
    )


def shard(kind):
    return lambda path: data_convert.convert(path.with_name("source"), path.parent, kind)


@pytest.fixture
def sources(tmp_path):
    """What converters read: a foreign transformer, and a set of latents."""
    from crcm_jax.convert import engine, models

    model = models.Model(models.TRANSFORMER, "", WanConfig(24, 48, 2, 3, freq_dim=32, text_dim=20))
    shapes = {
        place.name: engine.tensor_shape(model, slot, place) for slot, place in engine.places(model, "native").items()
    }
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "source.safetensors")
    sets.write(tmp_path / "source", count=6, shard=6, latents=(3, 16, 16, 5))
    shards.open_shards(tmp_path / "source")


PARAMS = {"a": {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((80, 80)), jnp.float32)}}
WRITERS = {
    "a.mp4": lambda path: video.write_video(path, clip()),
    "a.gif": lambda path: video.write_video(path, clip()),
    "a.apng": lambda path: video.write_video(path, clip()),
    "a.png": lambda path: video.write_video(path, clip()),
    "a.json": lambda path: run.write_json(path, list(range(9000))),
    "a.html": page,
    "a.txt": lambda path: manifest.write_text(path, "a" * 2 * ROOM),
    "a.pt": lambda path: files.write_bytes(path, bytes(2 * ROOM)),
    "manifest.json": lambda path: set_manifest.add(
        path.parent, Path(__file__), 1, {str(i): "too short" for i in range(900)}
    ),
}
"""By the name of the file that is there already."""
NEW = {
    "w.safetensors": lambda path: weights.save_params(path, PARAMS, {}),
    "w": lambda path: weights.save_params(path, PARAMS, {}),
    "n.safetensors": foreign("native"),
    "o.safetensors": foreign("ours"),
    "diffusers": foreign("diffusers"),
    "shard_000000.tar": shard("tar"),
    "shard_000000.array_record": shard("array_record"),
}
"""Of writers that refuse a place where something is."""


def everything(folder):
    """The folder's files, but for locks and what the writers read."""
    apart = (".lock", "source", "source.safetensors", "log.jsonl")
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(apart))


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(tmp_path, name):
    path = tmp_path / name
    if name == "manifest.json":
        set_manifest.claim(tmp_path, {})
    else:
        path.write_bytes(b"old")
    before, old = everything(tmp_path), path.read_bytes()
    with small_disk(), pytest.raises(UserError) as caught:
        WRITERS[name](path)
    assert "\n" not in str(caught.value) and f"{name} cannot be written (" in str(caught.value)
    assert "what was there before is kept" in str(caught.value) and "partial" not in str(caught.value)
    assert path.read_bytes() == old and everything(tmp_path) == before
    WRITERS[name](path)  # with room enough it is written
    assert path.stat().st_size > ROOM and everything(tmp_path) == before


@pytest.mark.parametrize("name", NEW)
@pytest.mark.usefixtures("sources")
def test_a_full_disk_leaves_nothing_half_written(tmp_path, name):
    path = tmp_path / name
    with small_disk(), pytest.raises(UserError) as caught:
        NEW[name](path)
    assert "\n" not in str(caught.value) and f"{name} cannot be written (" in str(caught.value)
    assert [entry for entry in everything(tmp_path) if entry != "manifest.json"] == []
    NEW[name](path)
    assert path.exists()


def test_an_encoder_that_hides_its_failure_is_seen(tmp_path, monkeypatch):
    """As seen: the disk is full, the encoder's exit code is 0, and the file does not play."""
    path = video.write_video(tmp_path / "a.mp4", clip(1))
    old = path.read_bytes()
    liar = tmp_path / "ffmpeg"
    liar.write_text(
        f'#!/bin/sh\n{imageio_ffmpeg.get_ffmpeg_exe()} "$@" 2>/dev/null\n'
        'for last; do :; done\ncase "$last" in file:*) truncate -s "$LEFT" "${last#file:}";; esac\nexit 0\n'
    )
    liar.chmod(liar.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(liar))
    for left in (0, 1000, len(old) - 200):
        monkeypatch.setenv("LEFT", str(left))
        with pytest.raises(UserError, match=r"a\.mp4 cannot be written \(only \d+ of 12 frames .* kept"):
            video.write_video(path, clip())
        assert path.read_bytes() == old and sorted(os.listdir(tmp_path)) == ["a.mp4", "ffmpeg"]


def test_an_encoders_own_words_are_told(tmp_path, monkeypatch):
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\ncat >/dev/null\necho 'Unknown encoder libx264' >&2\nexit 1\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
    with pytest.raises(UserError, match=r"\(the video's encoder failed: Unknown encoder libx264\)"):
        video.write_video(tmp_path / "a.mp4", clip())


def test_no_ffmpeg_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"ffmpeg at .*nowhere cannot be started"):
        video.write_video(tmp_path / "a.mp4", clip())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, UserError("told already"), RuntimeError("other")])
def test_any_other_end_leaves_the_old_file_too(tmp_path, failure):
    (tmp_path / "a").write_text("old")
    with (
        pytest.raises(type(failure) if isinstance(failure, Exception) else failure),
        files.atomic(tmp_path / "a") as draft,
    ):
        draft.write_text("half")
        raise failure
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_full_disks_of_other_languages_are_known_by_their_words(tmp_path):
    for error in (
        RuntimeError("write() failed: No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ):
        with pytest.raises(UserError, match="free some space"), files.atomic(tmp_path / "a"):
            raise error
    with pytest.raises(UserError, match=r"\(Is a directory: x\).*write elsewhere"), files.atomic(tmp_path / "a"):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", "x")


def test_places_and_links(tmp_path):
    files.write_text(tmp_path / "new" / "folders" / "a.txt", "1\r\n")
    assert (tmp_path / "new" / "folders" / "a.txt").read_bytes() == b"1\r\n"
    (tmp_path / "link").symlink_to("new/folders/a.txt")
    files.write_text(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new" / "folders" / "a.txt").read_text() == "2"
    with pytest.raises(UserError, match="new is a folder with something in it"):
        files.write_text(tmp_path / "new", "3")
    with pytest.raises(UserError, match=r"x/b cannot be written"):
        files.write_text(tmp_path / "link" / "x" / "b", "3")
    long = tmp_path / ("ü" * 120 + ".json")
    run.write_json(long, {"a": 1})
    assert json.loads(long.read_text()) == {"a": 1}
    with files.atomic(tmp_path / "folder") as draft:
        draft.mkdir()
        (draft / "a").write_text("in it")
        assert not (tmp_path / "folder").exists()
    assert os.listdir(tmp_path / "folder") == ["a"]


def test_there_is_one_home():
    """Nothing else in the house puts files in the place of others, or writes to a file's own name in one go."""
    root, found = Path(files.__file__).parents[2], set()
    for path in [*(root / "crcm_jax").rglob("*.py"), *(root / "convert").rglob("*.py")]:
        for line in path.read_text(encoding="utf-8").splitlines():
            moved = re.search(r"os\.(replace|rename)\(|shutil\.move\(", line)
            written = re.search(r"\.write_(text|bytes)\(", line) and not re.search(
                r"draft|(files|manifest)\.write", line
            )
            if moved or written:
                found.add(path.relative_to(root).as_posix())
    # A shard grows over many runs, and takes its place when its last example is in it.
    assert found == {"crcm_jax/saving/files.py", "crcm_jax/data/build.py"}
