"""`crcm sample`, from the words of the command line to the file: a published model in small, and a run's checkpoint."""

import dataclasses

import imageio.v3 as iio
import jax
import numpy as np
import pytest
import small_release
import tiny
from small_release import SMALL, SMALL_I2V

from configs.digits import get_config
from crcm_jax import recipes
from crcm_jax.cli import _sample_solver, sample
from crcm_jax.errors import UsageError, UserError
from crcm_jax.evaluate.producer import clip_noise
from crcm_jax.evaluate.video import write_video
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.models.vision.clip import CLIPVision
from crcm_jax.models.wan import library
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.sampling import ContextRule, Few, Ode, Schedule, Whole, generate_whole, teacher_times
from crcm_jax.sampling.schedule import MID_TIMES
from crcm_jax.saving.weights import save_params
from crcm_jax.train.identity import as_json

SIZE = ["--size=16x24", "--frames=9"]


def words(folder, *more, model="small"):
    return [f"--model={model}", f"--weights={folder}", "--prompt=a cat walks", *SIZE, *more]


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(library.RELEASES, "small", SMALL)
        patch.setitem(library.RELEASES, "small-i2v", SMALL_I2V)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_release.write(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A digits student."""
    config = get_config("sf_dmd")
    config.model.update(dict(dim=16, ffn_dim=16, heads=2, layers=1))
    path = tmp_path_factory.mktemp("runs") / "student.safetensors"
    params = tiny.parameters(recipes.student(config))
    save_params(path, params, dict(training=config.training, config=as_json(config)))
    return path


def test_text_in_mp4_out(weights, tmp_path, capsys):
    """As published models stream: four steps, then two with noisy context. Prompt and seed are seen; files repeat."""
    two = ["--steps=4,2", "--mid=15/16,5/6,5/8;5/8", "--noisy-context"]
    files = [tmp_path / f"{name}.mp4" for name in "abc"]
    assert sample.main([*words(weights, *two), "--prompt=a dog", f"--out={files[0]}"]) == 0
    told = capsys.readouterr()
    assert "frames/s, first chunk after" in told.out and "reading the text encoder" in told.err
    assert sample.main([*words(weights, *two), f"--out={files[1]}"]) == 0
    assert sample.main([*words(weights, *two), "--seed=1", f"--out={files[2]}"]) == 0
    first, second = (iio.imread(tmp_path / f"a-{i}.mp4", plugin="FFMPEG") for i in range(2))
    same, other = (iio.imread(file, plugin="FFMPEG") for file in files[1:])
    meta = iio.immeta(files[1], plugin="FFMPEG")
    assert first.shape == (9, 120, 80, 3) and meta["fps"] == 16  # 24 × 16 pixels, enlarged to be seen
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other) and not np.array_equal(first, second)


def test_first_frame_and_guided_ode(weights, tmp_path):
    """An image becomes the clip's first frame; a diffusion model is guided away from the negative prompt."""
    picture = tmp_path / "first.png"
    iio.imwrite(picture, np.random.default_rng(0).integers(0, 255, (24, 16, 3), dtype=np.uint8))
    clips = []
    for scale in (1.0, 4.0):
        out = tmp_path / f"{scale}.png"
        more = [f"--image={picture}", "--ode=2", f"--guidance={scale}", "--negative-prompt=a dog", f"--out={out}"]
        assert sample.main(words(weights, *more)) == 0
        clips.append(iio.imread(out))
    width = clips[0].shape[1] // 9
    np.testing.assert_array_equal(clips[0][:, :width], clips[1][:, :width])  # the given frame
    assert np.abs(clips[0].astype(int) - clips[1]).max() > 8


def test_a_bidirectional_model_makes_the_clip_at_once(weights, tmp_path, capsys):
    """What the command makes is what the sampler makes with the same parts; each option is heard."""
    more = ["--sampler=unipc", "--steps=3", "--shift=4", "--guidance=2", "--negative=a dog", "--seed=5"]
    assert sample.main([*words(weights, *more), "--prompt=a dog", f"--out={tmp_path / 'a.png'}"]) == 0
    told = capsys.readouterr()
    assert "at once, unipc, 3 steps, shift 4, guidance 2" in told.err and "3 steps of" in told.out
    network = WanTransformer(SMALL.transformer)
    encode = library.load_text_encoder(SMALL, weights)
    cond, uncond = (Condition({"text": encode([text])}) for text in ("a cat walks", "a dog"))
    noise = clip_noise([5], (3, 6, 4, 16), 0).initial
    options = {"times": teacher_times(3, 4.0), "uncond": uncond, "guidance": 2.0}
    model = Bound(network, library.load_transformer(network, weights))
    latents = generate_whole(model, cond, noise, **options)
    vae, params = library.load_vae(SMALL, weights)
    write_video(tmp_path / "expected.png", np.asarray(vae.decode(params, latents))[0])
    expected = iio.imread(tmp_path / "expected.png").astype(int)
    found = iio.imread(tmp_path / "a-0.png").astype(int)
    assert np.abs(found - expected).max() <= 1 and expected.std() > 10


def test_image_to_video(weights, tmp_path, capsys):
    """Image in, mp4 out; the input channels, what is in them, and CLIP's tokens have tests of their own."""
    for name in ("vae.safetensors", "text_encoder.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(weights / name)
    save_params(tmp_path / "transformer.safetensors", tiny.parameters(WanTransformer(SMALL_I2V.transformer)), {})
    iio.imwrite(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8))
    more = [f"--image={tmp_path / 'a.png'}", "--steps=2", f"--out={tmp_path / 'first.png'}"]
    with pytest.raises(UserError, match=r"holds no image_encoder\.safetensors"):
        sample.main(words(tmp_path, *more, model="small-i2v"))
    # As transformers' CLIPVisionModel has it, without a projection.
    bare = dataclasses.replace(SMALL_I2V.image, projection=None)
    encoder = tiny.parameters(CLIPVision(bare))
    save_params(tmp_path / "image_encoder.safetensors", encoder, {"model": {"projection": None}})
    assert sample.main(words(tmp_path, *more, model="small-i2v")) == 0
    assert "whole clip at once, unipc, 2 steps, shift 5, guidance 5" in capsys.readouterr().err
    first = iio.imread(tmp_path / "first.png").astype(int)
    # Other weights of the image encoder: the clip is made with what CLIP sees.
    (tmp_path / "image_encoder.safetensors").unlink()
    save_params(
        tmp_path / "image_encoder.safetensors", jax.tree.map(np.negative, encoder), {"model": {"projection": None}}
    )
    sample.main(words(tmp_path, *more, model="small-i2v"))
    assert np.abs(iio.imread(tmp_path / "first.png").astype(int) - first).max() > 2


def test_a_run(run, tmp_path, capsys):
    words = [f"--checkpoint={run}", "--prompt=a three moves up", "--prompt=a one moves left", "--steps=2,1"]
    assert sample.main([*words, f"--out={tmp_path / 'a.gif'}"]) == 0
    assert "frames/s" in capsys.readouterr().out
    frames = iio.imread(tmp_path / "a.gif")
    assert len(frames) == 9 and frames.shape[1] == 2 * frames.shape[2]  # one above the other


def test_a_run_without_its_autoencoder(tmp_path):
    config = {"codec": {"name": "wan_vae"}}
    save_params(tmp_path / "a.safetensors", {"w": np.ones(3)}, {"training": "sf_dmd", "config": config})
    with pytest.raises(UserError, match="crcm convert --layout=ours as transformer"):
        sample.main([f"--checkpoint={tmp_path / 'a.safetensors'}", "--prompt=a"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--prompt=a"], "--checkpoint or --model"),
        (["--checkpoint=x", "--model=y", "--prompt=a"], "one of the two"),
        (["--model=small", "--prompt=a"], "needs --weights=DIR"),
        (["--checkpoint=x", "--frames=9", "--prompt=a"], "--frames belongs to --model"),
        (["--checkpoint=x"], "--prompt is missing"),
        (["--checkpoint=x", "--prompts=nowhere.txt"], "no prompt file nowhere.txt"),
        (["--checkpoint=x", "--prompt=a", "--mid=0.5"], "--mid belongs to --steps"),
        (["--checkpoint=x", "--prompt=a", "--steps=2", "--mid=1/0"], "not a list of numbers"),
        (["--checkpoint=x", "--prompt=a", "--steps=2", "--ode=3"], "not allowed with"),
        (["--model=m", "--weights=w", "--prompt=a", "--size=832"], "'832' is not like 832x480"),
        (["--model=m", "--weights=w", "--prompt=a"], "--model=m is not one of wan2.1-t2v-1.3b"),
        (["--model=small", "--weights=w", "--prompt=a", "--shift=5"], "--shift belongs to --ode and --sampler"),
        (["--model=wan2.1-i2v-14b", "--weights=w", "--prompt=a"], "needs --image=FILE"),
        (["--model=wan2.1-i2v-14b", "--weights=w", "--prompt=a", "--ode=9"], "--ode streams"),
        (["--model=wan2.1-i2v-14b", "--weights=w", "--prompt=a", "--chunks=1-3"], "--chunks is for streaming"),
        (["--model=small", "--weights=w", "--prompt=a", "--sampler=unipc", "--steps=4,2"], "takes one number of steps"),
        (["--model=small", "--weights=w", "--prompt=a", "--sampler=unipc", "--image=x"], "--image is for causal"),
        (
            ["--model=small", "--weights=w", "--prompt=a", "--image=x", "--crop-image"],
            "--crop-image belongs to image-to",
        ),
        (["--checkpoint=x", "--crop-image", "--prompt=a"], "--crop-image belongs to --model"),
        (["--model=small", "--weights=w", "--prompt=a", "--sampler=heun"], "invalid choice"),
        (["--model=small", "--weights=w", "--prompt=a", "--mesh=data:2"], "is not like data=2,context=4"),
        (["--model=small", "--weights=w", "--prompt=a", "--mesh=row=2"], "mesh.row is no axis"),
        (["--model=small", "--weights=w", "--prompt=a", "--mesh=data=99"], "needs 99 devices"),
        (["--model=small", "--weights=w", "--prompt=a", "--out=clip.avi"], "must end in"),
    ],
)
def test_wrong_command_lines(argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        sample.main(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--frames=10"], "10 frames is not 1 \\+ 4k"),
        (["--frames=13", "--chunks=3-3"], "4 latent frames do not split"),
        (["--size=20x24"], "does not divide into patches of 8x8"),
        (["--steps=2,4"], "never increase"),
        (["--steps=3", "--mid=1/2"], "intermediate times"),
        (["--steps=3", "--mid=1/2,3/4"], "decrease"),
        (["--steps=2", "--guidance=3"], "--guidance belongs to --ode and --sampler"),
        ([], "no folder of weights at"),
    ],
)
def test_impossible_clips_and_schedules_are_named_before_anything_is_read(more, message):
    with pytest.raises(UserError, match=message) as caught:
        sample.main(words("nowhere", *more))
    assert "\n" not in str(caught.value)


def chosen(meta, *more, whole=False):
    options, _ = sample.parse(words("nowhere", *more))
    solver, guidance = _sample_solver.choose(options, meta, whole=whole)
    at_once = whole or _sample_solver.whole(options, meta)
    return solver, guidance, _sample_solver.describe(solver, guidance, meta, whole=at_once)


def few(steps, mid, noisy, start):
    return Few(Schedule(steps, mid), ContextRule(noisy, start))


def test_options_and_weights_choose_the_sampler():
    """What the weights record decides where it is there, and gives the defaults; options change them."""
    config = {"rollout": {"steps": [2, 1], "times": [[0.5], []]}, "sample": {"ode_steps": 24, "guidance": 2.5}}
    student, teacher, whole = ({"training": name, "config": config} for name in ("sf_dmd", "tf", "bidirectional"))
    mid = MID_TIMES
    assert chosen({})[:2] == (few((4,), (mid,), False, 1), 1.0)
    assert "the weights do not say what they are: --sampler=unipc is for bidirectional" in chosen({})[2]
    assert chosen({}, "--steps=4,2")[0] == few((4, 2), (mid, (5 / 6,)), False, 1)
    assert chosen({}, "--steps=4,2", "--noisy-context")[0] == few((4, 2), (mid, (5 / 8,)), True, 1)
    assert chosen(student)[:2] == (few((2, 1), ((0.5,), ()), False, 1), 1.0)
    assert chosen(student)[2] == "chunk by chunk, 2,1 steps (trained as sf_dmd)"
    assert chosen(student, "--steps=1", "--mid=1/2", "--context-start=2")[0] == few((1,), ((0.5,),), False, 2)
    assert chosen({}, "--ode=50")[:2] == (Ode(50, 3.0), 3.0)
    assert chosen(teacher)[:2] == (Ode(24, 3.0), 2.5)
    assert chosen(teacher, "--ode=9", "--shift=5", "--guidance=3")[:2] == (Ode(9, 5.0), 3.0)
    assert chosen({}, "--sampler=euler")[:2] == (Whole("euler", 50, 5.0), 5.0)
    assert chosen({}, whole=True)[:2] == chosen({}, "--sampler=unipc", "--steps=50")[:2] == (Whole(), 5.0)
    assert chosen(whole, "--steps=9", "--shift=3", "--guidance=4")[:2] == (Whole("unipc", 9, 3.0), 4.0)
    assert (
        chosen(whole)[2] == "the whole clip at once, unipc, 24 steps, shift 5, guidance 2.5 (trained as bidirectional)"
    )
    for meta, more, message in (
        (student, "--sampler=unipc", "trained as 'sf_dmd': drop it"),
        (teacher, "--sampler=unipc", "trained as 'tf': drop it"),
        (whole, "--ode=9", "--ode streams, and this model is bidirectional"),
        (whole, "--noisy-context", "--noisy-context is for streaming"),
        (student, "--guidance=2", "--guidance belongs to --ode and --sampler"),
    ):
        with pytest.raises(UsageError, match=message):
            chosen(meta, more)


def test_what_weights_record_is_read(weights, tmp_path):
    params = tiny.parameters(WanTransformer(SMALL.transformer))
    save_params(
        tmp_path / "transformer.safetensors", params, {"training": "sf_dmd", "config": {"chunks": {"first": 3}}}
    )
    with pytest.raises(UsageError, match="trained as 'sf_dmd': drop it"):
        sample.main(words(tmp_path, "--sampler=euler"))
    with pytest.raises(UserError, match="first chunk of one latent frame, not 3"):
        sample.main(words(tmp_path, "--image=x.png"))


def test_wrong_weights_are_named(weights, tmp_path):
    for file in weights.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "vae.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no vae\.safetensors: write it with crcm convert"):
        sample.main(words(tmp_path))
    (tmp_path / "vae.safetensors").symlink_to(weights / "transformer.safetensors")
    with pytest.raises(UserError, match=r"vae\.safetensors is of another architecture"):
        sample.main(words(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        sample.main(words(tmp_path))
    with pytest.raises(UserError, match="first chunk of one latent frame"):
        sample.main(words(weights, "--chunks=3-1", "--image=x.png"))


def test_what_is_read_has_the_dtypes_that_are_used(weights):
    params = library.load_transformer(WanTransformer(SMALL.transformer), weights)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    assert kinds == {"float32"}
    half = WanTransformer(dataclasses.replace(SMALL.transformer, dtype="bfloat16"))
    params = library.load_transformer(half, weights)
    assert params["blocks"]["ffn"]["up"]["kernel"].dtype == "bfloat16"
    assert params["blocks"]["modulation"].dtype == params["outside"]["head"]["kernel"].dtype == "float32"
