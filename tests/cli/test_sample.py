"""`crcm sample`, from the words of the command line to the file: a published model in small, and a run's checkpoint."""

import imageio.v3 as iio
import jax
import numpy as np
import pytest
import tiny

from configs.digits import get_config
from crcm_jax import build
from crcm_jax.cli import sample
from crcm_jax.errors import UsageError, UserError
from crcm_jax.models.wan import library
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.models.wan.transformer import WanTransformer
from crcm_jax.models.wan.umt5 import UMT5Config, UMT5Encoder
from crcm_jax.models.wan.vae import WanVAE
from crcm_jax.models.wan.vae_config import WanVAEConfig
from crcm_jax.train.identity import as_json
from crcm_jax.train.weights import save_params

SMALL = library.Release(
    WanConfig(dim=24, ffn_dim=32, heads=2, layers=2, freq_dim=16, text_dim=16, dtype="float32", remat="none"),
    WanVAEConfig.wan21(
        encoder_dim=8, decoder_dim=8, multipliers=(1, 1, 1), temporal=(True, True), blocks=1, dtype="float32"
    ),
    UMT5Config(vocabulary=60, dim=16, heads=2, head_dim=8, ffn_dim=24, layers=1, dtype="float32"),
    tokens=12,
)
"""The published model's parts, small: 4 pixels and 4 frames a latent one, so that 9 frames are 3 latent ones."""

SIZE = ["--size=16x24", "--frames=9"]


def words(folder, *more):
    return ["--model=small", f"--weights={folder}", "--prompt=a cat walks", *SIZE, *more]


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(library.RELEASES, "small", SMALL)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder as `crcm convert` and a tokenizer make it."""
    pytest.importorskip("ftfy", reason="needs ftfy (pip install -e .[text])")
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers (pip install -e .[text])")
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(["a cat walks over the street", "a dog sees a ball"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    parts = {
        "transformer": WanTransformer(SMALL.transformer),
        "vae": WanVAE(SMALL.vae),
        "text_encoder": UMT5Encoder(SMALL.text),
    }
    for seed, (name, network) in enumerate(parts.items()):
        save_params(folder / f"{name}.safetensors", tiny.parameters(network, seed), {})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A digits student."""
    config = get_config("sf_dmd")
    config.model.update(dict(dim=16, ffn_dim=16, heads=2, layers=1))
    path = tmp_path_factory.mktemp("runs") / "student.safetensors"
    params = tiny.parameters(build.network(config))
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


def test_a_run(run, tmp_path, capsys):
    words = [f"--checkpoint={run}", "--prompt=a three moves up", "--prompt=a one moves left", "--steps=2,1"]
    assert sample.main([*words, f"--out={tmp_path / 'a.gif'}"]) == 0
    assert "frames/s" in capsys.readouterr().out
    frames = iio.imread(tmp_path / "a.gif")
    assert len(frames) == 9 and frames.shape[1] == 2 * frames.shape[2]  # one above the other


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
        (["--checkpoint=x", "--prompt=a", "--shift=5"], "--shift belongs to --ode"),
        (["--checkpoint=x", "--prompt=a", "--steps=2", "--mid=1/0"], "not a list of numbers"),
        (["--checkpoint=x", "--prompt=a", "--steps=2", "--ode=3"], "not allowed with"),
        (["--model=m", "--weights=w", "--prompt=a", "--size=832"], "'832' is not like 832x480"),
        (["--model=m", "--weights=w", "--prompt=a"], "--model=m is not one of wan2.1-t2v-1.3b"),
        (["--model=wan2.1-i2v-14b", "--weights=w", "--prompt=a"], "CLIP"),
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
        (["--steps=2", "--guidance=3"], "--guidance belongs to --ode"),
        ([], "no folder of weights at"),
    ],
)
def test_impossible_clips_and_schedules_are_named_before_anything_is_read(more, message):
    with pytest.raises(UserError, match=message) as caught:
        sample.main(words("nowhere", *more))
    assert "\n" not in str(caught.value)


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
    params = library.load_transformer(SMALL, weights)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    assert kinds == {"float32"}
    half = library.Release(WanConfig(**{**vars(SMALL.transformer), "dtype": "bfloat16"}), SMALL.vae, SMALL.text)
    params = library.load_transformer(half, weights)
    assert params["blocks"]["ffn"]["up"]["kernel"].dtype == "bfloat16"
    assert params["blocks"]["modulation"].dtype == params["outside"]["head"]["kernel"].dtype == "float32"
