"""`crcm data`, from the words of the command line to the files: a published model in small, real mp4 files."""

import json
import os

import imageio.v3 as iio
import jax.numpy as jnp
import latent_sets as sets
import ml_dtypes
import numpy as np
import pytest
import small_release
import tiny
from small_release import SMALL

from crcm_jax import __main__ as program
from crcm_jax.cli import data
from crcm_jax.data import set_manifest, shards, tensor_file, video_files
from crcm_jax.errors import UsageError, UserError
from crcm_jax.evaluate.video import write_video
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.models.vae.wan import WanVAE
from crcm_jax.models.wan import library
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.sampling import generate_whole, teacher_times

PROMPTS = [f"a {word} walks" for word in ("cat", "dog", "horse", "bird", "fish")]
SHAPE = ["--frames=9", "--size=24x16", "--shard-size=2"]


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(library.RELEASES, "small", SMALL)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_release.write(tmp_path_factory.mktemp("weights"))


def moving_bar(seed, frames=24, height=40, width=64):
    """A smooth pattern that moves, so that a video codec keeps it nearly as it is."""
    y, x, t = np.meshgrid(np.arange(height), np.arange(width), np.arange(frames), indexing="ij")
    waves = [np.sin((x + 2 * t + 9 * c) / 9 + seed) * np.cos(y / 11 + c) for c in range(3)]
    return np.stack(waves, -1).transpose(2, 0, 1, 3).astype(np.float32) * 0.8


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five videos with their prompts; the fourth is too short, the fifth no video at all."""
    folder = tmp_path_factory.mktemp("videos")
    for i, prompt in enumerate(PROMPTS):
        write_video(folder / f"{i}.mp4", moving_bar(i, 24 if i != 3 else 5), fps=16, scale=1)
        (folder / f"{i}.txt").write_text(prompt)
    (folder / "4.mp4").write_bytes(b"not a video" * 1000)
    return folder


def build(*words):
    return data.main(["build", "--model=small", *SHAPE, *map(str, words)])


def contents(folder):
    """Every file that is not a lock, by name."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".lock" and p.name != shards.INDEX}


def test_frames_are_scaled_to_cover_and_cropped(videos, tmp_path):
    """Against another decoder, and the scaling of another library."""
    from crcm_jax.data.tfds_source import _cover

    whole = iio.imread(videos / "0.mp4", plugin="FFMPEG")
    assert np.array_equal(video_files.read_clip(videos / "0.mp4", frames=9, height=40, width=64), whole[:9])
    for height, width in ((16, 24), (40, 30), (20, 64)):
        found = video_files.read_clip(videos / "0.mp4", frames=9, height=height, width=width)
        wanted = np.stack([_cover(frame, height, width) for frame in whole[:9]])
        assert found.shape == (9, height, width, 3)
        error = lambda found, wanted=wanted: np.abs(found.astype(int) - wanted).mean()  # noqa: E731
        assert error(found) < 6 and error(np.roll(found, 1, 2)) > 2 * error(found), (height, width)
    later = video_files.read_clip(videos / "0.mp4", frames=9, height=40, width=64, clip=1)
    assert np.array_equal(later, whole[9:18])
    slower = video_files.read_clip(videos / "0.mp4", frames=9, height=40, width=64, fps=8)
    assert np.abs(slower.astype(int) - whole[:17:2]).mean() < 12 < np.abs(slower.astype(int) - whole[:9]).mean()


def test_from_videos(videos, weights, tmp_path, capsys):
    out = tmp_path / "set"
    assert build(f"--videos={videos}", f"--weights={weights}", f"--out={out}") == 0
    told = capsys.readouterr()
    assert "3 of 5 examples, 2 left out" in told.out
    assert "left out 000000003" in told.err and "has 5 of 9 frames" in told.err
    assert "left out 000000004" in told.err and "cannot be decoded" in told.err
    found = shards.open_shards(out)
    params, encode = tiny.parameters(WanVAE(SMALL.vae), 1), tiny.jit(WanVAE(SMALL.vae).encode)
    encoder = library.load_text_encoder(SMALL, weights)
    for i, example in enumerate(found):
        pixels = video_files.read_clip(videos / f"{i}.mp4", frames=9, height=16, width=24)
        wanted = encode(params, jnp.asarray(pixels[None], jnp.float32) / 127.5 - 1)[0]
        assert example.latents.shape == (3, 4, 6, 16) and example.latents.dtype == ml_dtypes.bfloat16
        assert tiny.relative(example.latents, wanted) < 2**-7  # the rounding to bfloat16
        assert tiny.relative(example.text, encoder([PROMPTS[i]])[0]) < 2**-7
        assert (example.key, example.prompt) == (f"{i:09d}", PROMPTS[i])
    manifest = set_manifest.read(out)
    assert manifest["total"]["examples"] == 3 and list(manifest["shards"]) == [f"shard_{i:06d}.tar" for i in range(3)]
    assert manifest["shards"]["shard_000002.tar"]["left_out"].keys() == {"000000004"}
    assert data.main(["check", str(out)]) == 0
    before = contents(out)
    assert build(f"--videos={videos}", f"--weights={weights}", f"--out={out}") == 0  # nothing is left to do
    assert contents(out) == before
    with pytest.raises(UserError, match=r"was begun with fps 16\.0 and not 8\.0: write to a new folder"):
        build(f"--videos={videos}", f"--weights={weights}", f"--out={out}", "--fps=8")


@pytest.fixture(scope="module")
def sampled(weights, tmp_path_factory):
    """A set from prompts: (words of the command, folder)."""
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "negative.txt").write_text("worst")
    words = [
        f"--prompts={folder / 'prompts.txt'}",
        f"--negative-file={folder / 'negative.txt'}",
        "--steps=3",
        "--seed=5",
    ]
    assert build(*words, f"--weights={weights}", f"--out={folder / 'set'}") == 0
    return [*words, f"--weights={weights}"], folder / "set"


def test_from_prompts(sampled, weights):
    """A teacher's samples, each from its own seed, by the published settings."""
    found = shards.open_shards(sampled[1])
    assert len(found) == 5
    encoder = library.load_text_encoder(SMALL, weights)
    network, params = WanTransformer(SMALL.transformer), tiny.parameters(WanTransformer(SMALL.transformer), 0)
    for i in (0, 4):
        noise = np.random.default_rng(5 + i).standard_normal((1, 3, 4, 6, 16), np.float32)
        cond, uncond = (Condition({"text": jnp.asarray(encoder([text]))}) for text in (PROMPTS[i], "worst"))
        wanted = generate_whole(
            Bound(network, params),
            cond,
            noise,
            times=teacher_times(3, 3.0, 5000.0),
            solver="euler",
            uncond=uncond,
            guidance=5.0,
        )
        assert tiny.relative(found[i].latents, wanted[0]) < 2**-7 and found[i].prompt == PROMPTS[i]
    assert not np.array_equal(found[0].latents, found[1].latents)


def test_parts_together_make_the_same_set(sampled, tmp_path):
    words, whole = sampled
    for part in ("1/2", "0/2"):
        assert build(*words, f"--out={tmp_path / 'set'}", f"--part={part}") == 0
    assert contents(tmp_path / "set") == contents(whole)
    (tmp_path / "set" / "shard_000001.tar").unlink()
    assert data.main(["check", str(tmp_path / "set")]) == 1
    assert build(*words, f"--out={tmp_path / 'set'}") == 0  # makes what is missing
    assert contents(tmp_path / "set") == contents(whole)


@pytest.mark.parametrize("kind", ["tar", "array_record"])
def test_stopped_at_any_moment_the_same_command_goes_on(sampled, tmp_path, monkeypatch, kind):
    from crcm_jax.cli import _data_makers as makers
    from crcm_jax.data import build as builder

    words, whole = sampled
    out = tmp_path / "set"
    words = [*words, f"--out={out}", f"--format={kind}"]
    make, add = makers.FromTeacher.make, set_manifest.add
    made = []

    def stop_after(count):
        def interrupted(self, jobs, prepared):
            if len(made) >= count:
                raise KeyboardInterrupt
            made.extend(job.key for job in jobs)
            return make(self, jobs, prepared)

        return interrupted

    for count in (1, 3):
        monkeypatch.setattr(makers.FromTeacher, "make", stop_after(count))
        with pytest.raises(UserError, match="stopped; the same command goes on"):
            build(*words)
    monkeypatch.setattr(makers.FromTeacher, "make", stop_after(99))
    monkeypatch.setattr(builder.set_manifest, "add", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(UserError, match="stopped"):  # between a shard's last byte and its entry
        build(*words)
    (out / ".shard_000001.tar.tmp").write_bytes(b"and before its draft is removed")
    monkeypatch.setattr(builder.set_manifest, "add", add)
    assert build(*words) == 0
    assert sorted(made) == [f"{i:09d}" for i in range(5)]  # nothing was made twice
    if kind == "tar":
        assert contents(out) == contents(whole)
    ours, theirs = shards.open_shards(out), shards.open_shards(whole)
    assert len(ours) == 5 and all(sets.same(a, b) for a, b in zip(ours, theirs)) and not list(out.glob(".*.tmp"))
    assert data.main(["check", str(out)]) == 0


def test_two_processes_cannot_write_one_shard(sampled, tmp_path):
    from crcm_jax.data.tar_shard import TarWriter

    words, _ = sampled
    (tmp_path / "set").mkdir()
    holder = TarWriter(tmp_path / "set" / ".shard_000000.tar.tmp")
    with pytest.raises(UserError, match="another process is writing"):
        build(*words, f"--out={tmp_path / 'set'}")
    holder.close()


def test_embed(weights, tmp_path, capsys):
    words = ["embed", "--model=small", f"--weights={weights}", "--prompt=worst cat", f"--out={tmp_path / 'n.pt'}"]
    assert data.main(words) == 0
    found = tensor_file.loads((tmp_path / "n.pt").read_bytes(), "n.pt")
    wanted = library.load_text_encoder(SMALL, weights)(["worst cat"])[0]
    assert found.shape == (12, 16) and tiny.relative(found, wanted) < 2**-7 and found[0].any() and not found[-1].any()
    assert os.listdir(tmp_path) == ["n.pt"]
    with pytest.raises(UsageError, match=r"must end in \.pt"):
        data.main([*words[:-1], "--out=n.bin"])


@pytest.mark.parametrize("kind", ["tar", "array_record"])
def test_check_names_everything_that_is_damaged(tmp_path, capsys, kind):
    folder = sets.write(tmp_path / "set", kind=kind)
    for path in sorted(folder.glob("shard*")):
        set_manifest.add(folder, path, 4, {})
    assert data.main(["check", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "12 whole examples in 3 shards" in told and "12 × latents 3×2×4×5 bfloat16, text 6×8 bfloat16" in told
    sets.flip(folder / f"shard_000001.{kind}", sets.example(6).text.tobytes())
    (folder / f"shard_000002.{kind}").unlink()
    sets.write(folder / "other", count=1, kind=kind, latents=(4, 2, 4, 5))
    (folder / "other" / f"shard_000000.{kind}").rename(folder / f"shard_000009.{kind}")
    nan = sets.example(20)
    nan.latents[0, 0, 0, 0] = np.nan
    sets.array_record_shard.write(folder / "x", [nan])
    assert data.main(["check", str(folder)]) == 1
    told = capsys.readouterr().out
    damaged = "embed.pt of 000000006" if kind == "tar" else "record 2 of"
    for words in (
        damaged, f"shard_000001.{kind} does not have the checksum", f"shard_000002.{kind} is missing",
        f"shard_000009.{kind} is not in manifest.json", "has latents 4×2×4×5 bfloat16",
    ):  # fmt: skip
        assert words in told, words


def test_there_and_back_every_value_is_the_same(tmp_path, capsys):
    tars, records, back = (tmp_path / name for name in ("tars", "records", "back"))
    sets.write(tars)
    convert = lambda *words: data.main(["convert", *map(str, words)])  # noqa: E731
    assert convert(f"--from={tars}", f"--to={records}", "--format=array_record") == 0
    assert convert(f"--from={records}", f"--to={back}", "--format=tar") == 0
    for folder in (records, back):
        found = shards.open_shards(folder)
        assert len(found) == 12 and all(sets.same(found[i], sets.example(i)) for i in range(12))
        assert data.main(["check", str(folder)]) == 0
    assert all((back / p.name).read_bytes() == p.read_bytes() for p in tars.glob("*.tar"))
    before = contents(records)
    assert convert(f"--from={tars}", f"--to={records}", "--format=array_record") == 0
    assert contents(records) == before
    sets.flip(tars / "shard_000002.tar", sets.example(9).text.tobytes())
    with pytest.raises(UserError, match=r"embed\.pt of 000000009 .*--skip-damaged"):
        convert(f"--from={tars}", f"--to={tmp_path / 'rest'}", "--format=array_record")
    assert convert(f"--from={tars}", f"--to={tmp_path / 'rest'}", "--format=array_record", "--skip-damaged") == 0
    assert "11 examples, 1 damaged ones left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a set that no manifest"):
        convert(f"--from={records}", f"--to={tars}", "--format=tar")


def test_lists_of_videos(tmp_path, videos):
    listed = [(videos / "0.mp4", "one, two"), (videos / "1.mp4", "ünï")]
    rows = [json.dumps({"video": str(video), "prompt": prompt}) for video, prompt in listed]
    (tmp_path / "list.jsonl").write_text("\n".join(rows) + "\n\n")
    (tmp_path / "list.csv").write_text(f'prompt,video\n"one, two",{videos / "0.mp4"}\nünï,{videos / "1.mp4"}\n')
    for name in ("list.jsonl", "list.csv"):
        assert video_files.listing(tmp_path / name) == listed
    assert [prompt for _, prompt in video_files.listing(videos)] == PROMPTS
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "gone.jsonl").write_text('{"video": "x.mp4", "prompt": ""}\n')
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "a.mp4").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("bad.csv", "is no list with a video and a prompt"), ("gone.jsonl", r"1 of 1 videos in .* are missing"),
        ("silent", r"1 of 1 videos have no prompt: write a\.txt"), ("empty", "holds no videos"), ("x", "there is no"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            video_files.listing(tmp_path / name)


@pytest.mark.parametrize(
    "words, message",
    [
        (["build", "--weights=w", "--out=o"], "--videos --prompts is required"),
        (["build", "--videos=v", "--prompts=p", "--weights=w", "--out=o"], "not allowed with"),
        (["build", "--prompts=nowhere.txt", "--weights=w", "--out=o"], r"there is no file nowhere\.txt"),
        (["build", "--videos=v", "--weights=w", "--out=o", "--size=832"], "width x height"),
        (["build", "--videos=v", "--weights=w", "--out=o", "--part=2/2"], "part i/n"),
        (["build", "--videos=v", "--weights=w", "--out=o", "--batch=0"], "--batch=0: use a positive number"),
        (["build", "--videos=nowhere", "--weights=w", "--out=o"], "there is no nowhere"),
        (["frobnicate"], "invalid choice"),
        ([], "COMMAND"),
    ],
)
def test_wrong_command_lines(words, message):
    with pytest.raises(UserError, match=message) as caught:
        data.main(words)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_is_told_before_weights_are_read(videos, tmp_path):
    with pytest.raises(UserError, match=r"holds no vae\.safetensors"):
        build(f"--videos={videos}", f"--weights={tmp_path}", f"--out={tmp_path / 'set'}")
    with pytest.raises(UserError, match="10 frames is not 1 \\+ 4k"):
        build(f"--videos={videos}", f"--weights={tmp_path}", f"--out={tmp_path / 'set'}", "--frames=10")
    with pytest.raises(UserError, match="--model=large is not one of"):
        build(f"--videos={videos}", f"--weights={tmp_path}", f"--out={tmp_path / 'set'}", "--model=large")


def test_every_command_has_help_with_an_example(capsys):
    for name in ("build", "check", "convert", "embed"):
        with pytest.raises(SystemExit) as caught:
            program.dispatch(["data", name, "--help"])
        assert caught.value.code == 0 and f"crcm data {name} " in capsys.readouterr().out.split("for example:")[1]
