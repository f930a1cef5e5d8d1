"""Every reader of files against hundreds of damaged ones: right, or one sentence that names the file; never much memory
or time. CRCM_FUZZ=5000 tries more of each."""

import io
import json
import os
import resource
import tarfile
import tempfile
import time
from pathlib import Path

import latent_sets as sets
import numpy as np
import pytest
from mutations import mutations
from PIL import Image, ImageCms

from crcm_jax.data import lists, pictures, set_manifest, shards, tensor_file, texts, video_files
from crcm_jax.data.example import DamagedExample
from crcm_jax.errors import UserError
from crcm_jax.evaluate.report import read_losses
from crcm_jax.evaluate.video import write_video
from crcm_jax.saving import manifest, weights

COUNT = int(os.environ.get("CRCM_FUZZ", 500))
SLOWEST = 10.0
"""Seconds for one file at most: a hundred times what any takes, since a machine may be busy."""
MEMORY = 600 << 20

WEIGHTS = {
    "a": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.ones(4, np.float32)},
    "b": np.ones((2, 2)),
}


@pytest.fixture
def folder():
    """In memory where there is such a place: a disk takes milliseconds for a file."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def picture(kind, **options):
    def make(path):
        pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        exif = image.getexif()
        exif[0x0112] = 6
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        file = io.BytesIO()
        image.convert(options.get("mode", "RGB")).save(
            file, kind, **({} if kind == "GIF" else {"exif": exif, "icc_profile": profile})
        )
        path.write_bytes(file.getvalue())

    return make


def see(path):
    image = pictures.read(path)
    assert image.mode == "RGB" and image.size[0] > 0


def write_tensor(path):
    path.write_bytes(tensor_file.dumps(np.arange(60, dtype=np.float32).reshape(3, 4, 5)))


def read_tensor(path):
    array = tensor_file.loads(path.read_bytes(), str(path))
    np.testing.assert_array_equal(array, np.arange(60, dtype=np.float32).reshape(3, 4, 5))


def write_set(kind):
    def make(path):
        sets.write(path.parent / "made", count=3, kind=kind)
        next((path.parent / "made").glob("shard*")).rename(path)

    return make


def read_set(path):
    """Examples that are given are whole ones; what is not given has been named."""
    (path.parent / shards.INDEX).unlink(missing_ok=True)
    found, lost = shards.open_shards(path), 0
    for index in range(len(found)):
        try:
            given = found[index]
        except DamagedExample as error:
            one_sentence(error, path)
            lost += 1
            continue
        wanted = [sets.example(i) for i in range(3)]
        assert any(
            given.latents.tobytes() == one.latents.tobytes() and given.text.tobytes() == one.text.tobytes()
            for one in wanted
        )
    if path.suffix == ".tar" and not found.flaws():
        with tarfile.open(path) as tar:
            keys = {name.removesuffix(".latent.pt") for name in tar.getnames() if name.endswith(".latent.pt")}
        assert len(found) == len(keys)
    elif not lost and not found.flaws():
        assert len(found) == 3


def write_weights(path):
    weights.save_params(path.with_suffix(".new.safetensors"), WEIGHTS, {"training": "tf"})
    path.with_suffix(".new.safetensors").rename(path)


def read_weights(path):
    """Of a file that no longer names its checksum, nothing is known."""
    if "sha256" not in weights.load_meta(path):
        weights.load_params(path, expect=WEIGHTS)
        return
    for leaf, wanted in zip(jax_leaves(weights.load_params(path, expect=WEIGHTS)), jax_leaves(WEIGHTS)):
        np.testing.assert_array_equal(leaf, wanted)


def jax_leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def read_foreign(path):
    from crcm_jax.convert.sources import open_source

    source = open_source(path)
    for name in source.specs:
        source.read(name, None)


def write_manifest(path):
    folder = path.parent / "set"
    folder.mkdir(exist_ok=True)
    (folder / "a").write_bytes(b"abc")
    set_manifest.claim(folder, {"fps": 16})
    set_manifest.add(folder, folder / "a", 3, {"000": "is too short"})
    path.write_bytes((folder / set_manifest.NAME).read_bytes())


def read_manifest(path):
    assert path.name == set_manifest.NAME
    found = set_manifest.read(path.parent)
    assert all(entry["examples"] >= -(1 << 62) for entry in found["shards"].values())


def write_seal(path):
    (path.parent / "a").write_bytes(b"abc")
    manifest.seal(path.parent)


def read_seal(path):
    flaw = manifest.damage(path.parent)
    assert flaw is None or "\n" not in flaw


def write_index(path):
    sets.write(path.parent, count=3)
    shards.open_shards(path.parent)


def read_index(path):
    """It is made anew: whatever it says, the examples are the right ones."""
    found = shards.open_shards(path.parent)
    assert len(found) == 3 and all(sets.same(found[i], sets.example(i)) for i in range(3))


def text(content):
    return lambda path: path.write_bytes(content.encode("utf-8"))


LOG = "".join(json.dumps({"iteration": i, "student/loss": 1 / i}) + "\n" for i in range(1, 5))
ROWS = 'video,prompt\n"a.mp4","a cat, and a dog"\nb.mp4,ünï\n'
OBJECTS = '{"video": "a.mp4", "prompt": "a \\u00fc cat"}\n\n{"video": "b.mp4", "prompt": "x"}\n'
READERS = {
    "png": ("a.png", picture("PNG"), see),
    "jpeg": ("a.jpg", picture("JPEG"), see),
    "tiff": ("a.tiff", picture("TIFF"), see),
    "webp": ("a.webp", picture("WEBP"), see),
    "gif": ("a.gif", picture("GIF", mode="P"), see),
    "cmyk": ("a.jpg", picture("JPEG", mode="CMYK"), see),
    "tensor": ("a.pt", write_tensor, read_tensor),
    "tar": ("a.tar", write_set("tar"), read_set),
    "array_record": ("a.array_record", write_set("array_record"), read_set),
    "weights": ("a.safetensors", write_weights, read_weights),
    "foreign weights": ("a.safetensors", write_weights, read_foreign),
    "lines": ("a.txt", text("a cat\r\nünï\n\na dog"), lists.prompts),
    "utf-16": ("a.txt", lambda path: path.write_bytes("a cat\nünï".encode("utf-16")), texts.lines),
    "csv": ("a.csv", text(ROWS), lambda path: lists.entries(path, ("video", "prompt"))),
    "jsonl": ("a.jsonl", text(OBJECTS), lambda path: lists.entries(path, ("video", "prompt"))),
    "log": ("metrics.jsonl", text(LOG), read_losses),
    "set's manifest": (set_manifest.NAME, write_manifest, read_manifest),
    "seal": (manifest.NAME, write_seal, read_seal),
    "index": (shards.INDEX, write_index, read_index),
}


def one_sentence(error, path):
    message = str(error)
    assert ("\n" not in message and len(message) < 600 and path.name in message) or path.parent.name in message, message


def attack(path, content, read, count):
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    refused = 0
    for number, altered in enumerate(mutations(content, count)):
        path.write_bytes(altered)
        began = time.perf_counter()
        try:
            read(path)
        except UserError as error:
            refused += 1
            one_sentence(error, path)
        except BaseException as error:
            error.add_note(f"mutation {number}")
            raise
        slowest = max(slowest, time.perf_counter() - began)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert slowest < SLOWEST and grown < MEMORY, (slowest, grown)
    return refused


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.filterwarnings("error")
def test_damaged_files_are_read_right_or_named(folder, kind):
    name, make, read = READERS[kind]
    path = folder / name
    make(path)
    content = path.read_bytes()
    read(path)
    refused = attack(path, content, read, COUNT)
    # The attack has power: it is not the file as it was that was read.
    assert refused > COUNT // 20 or kind in ("lines", "seal", "index", "tar", "array_record")


def json_tokenizer(path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers (pip install -e .[text])")
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(words, unk_id=2))
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    tokenizer.save(str(path))


def sentencepiece_tokenizer(path):
    library = pytest.importorskip("sentencepiece", reason="needs sentencepiece (pip install -e .[text])")
    (path.parent / "words.txt").write_text("a cat walks over the street\na dog sees a ball\n" * 20)
    library.SentencePieceTrainer.train(
        input=str(path.parent / "words.txt"), model_prefix=str(path.with_suffix("")), vocab_size=20, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip


@pytest.mark.parametrize("name, make", [("tokenizer.json", json_tokenizer), ("spiece.model", sentencepiece_tokenizer)])
def test_damaged_tokenizers(folder, name, make):
    pytest.importorskip("ftfy", reason="needs ftfy (pip install -e .[text])")
    from crcm_jax.models.text.wan import open_tokenizer

    make(folder / name)
    read = lambda path: open_tokenizer(path)(["a cat", "ünï"])  # noqa: E731
    assert attack(folder / name, (folder / name).read_bytes(), read, COUNT) > COUNT // 20


def test_damaged_videos(folder):
    """Fewer: each starts a process."""
    path = write_video(folder / "a.mp4", np.zeros((3, 16, 16, 3)), scale=1)
    content, refused = path.read_bytes(), 0
    for altered in mutations(content, COUNT // 3):
        path.write_bytes(altered)
        found = video_files.read_clip(path, frames=2, height=8, width=8, fps=8)
        refused += isinstance(found, str)
        assert "\n" not in found if isinstance(found, str) else found.shape == (2, 8, 8, 3)
    assert refused > COUNT // 12
