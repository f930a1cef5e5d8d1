"""Whatever a library raises over a user's file is one sentence; a large-file pointer is known in every file's place."""

import sys
import types

import numpy as np
import pytest

from crcm_jax.data import pictures, shards, tensor_file, texts, video_files
from crcm_jax.errors import UserError
from crcm_jax.models.text import wan
from crcm_jax.saving import reading, weights

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5243880448\n"
ANNEX = b"/annex/objects/SHA256E-s5243880448--4d7a.safetensors\n"


class Panic(BaseException):
    """As libraries in Rust raise it: no `Exception`."""


@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), Panic("index out of bounds"), KeyError("x"), MemoryError(), EOFError()]
)
def test_whatever_a_library_raises_is_one_sentence(error):
    with (
        pytest.raises(UserError, match=r"^a\.x cannot be read as a thing \(.+\)$") as caught,
        reading.reading("a.x", "a thing"),
    ):
        raise error
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, UserError("told")])
def test_what_is_no_librarys_error_passes(error):
    with pytest.raises(error if isinstance(error, type) else UserError) as caught, reading.reading("a.x", "a thing"):
        raise error
    assert "cannot be read" not in str(caught.value)


def foreign(path):
    from crcm_jax.convert.sources import open_source

    return open_source(path)


READERS = {
    "a.png": pictures.read,
    "a.txt": texts.read,
    "a.tar": lambda path: named(shards.open_shards(path).flaws()),
    "a.array_record": lambda path: named(shards.open_shards(path).flaws()),
    "a.mp4": lambda path: named([f"{path} {video_files.read_clip(path, frames=1, height=8, width=8)}"]),
    "a.pt": lambda path: tensor_file.loads(path.read_bytes(), str(path)),
    "b.safetensors": weights.load_params,
    "c.safetensors": weights.load_meta,
    "d.safetensors": foreign,
    "e.pth": foreign,
    "tokenizer.json": wan.load_tokenizer,
    "spiece.model": wan.load_tokenizer,
    "config.json": lambda path: foreign_folder(path.parent),
}


def named(flaws):
    raise UserError(flaws[0])


def foreign_folder(folder):
    from safetensors.numpy import save_file

    save_file({"a": np.ones(3, np.float32)}, folder / "a.safetensors")
    foreign(folder)


@pytest.mark.parametrize(
    "pointer, told", [(POINTER, "5,243,880,448 bytes that git keeps elsewhere"), (ANNEX, "git annex get")]
)
@pytest.mark.parametrize("name", READERS)
def test_a_large_file_pointer_is_known_everywhere(tmp_path, name, pointer, told, monkeypatch):
    for library in ("tokenizers", "sentencepiece"):
        monkeypatch.setitem(sys.modules, library, types.ModuleType(library))
    path = tmp_path / name
    path.write_bytes(pointer)
    with pytest.raises(UserError, match=rf"{name} is a large-file pointer.*{told}") as caught:
        READERS[name](path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def library(monkeypatch):
    """A tokenizer's library that fails as real ones do; `fail` names the call."""
    fake = types.ModuleType("tokenizers")

    class Tokenizer:
        fail = "from_file"

        @classmethod
        def from_file(cls, path):
            if cls.fail == "from_file":
                raise Exception("expected value at line 1 column 1\nmore")  # as it is: no class of its own
            return cls()

        def no_truncation(self):
            pass

        no_padding = no_truncation

        def token_to_id(self, name):
            return {"<pad>": 0, "</s>": 1}[name]

        def encode(self, text, add_special_tokens):
            if self.fail == "encode":
                raise Panic("called `Option::unwrap()` on a `None` value")
            return types.SimpleNamespace(ids=[ord(letter) for letter in text])

    fake.Tokenizer = Tokenizer
    monkeypatch.setitem(sys.modules, "tokenizers", fake)
    monkeypatch.setattr(wan, "clean_prompt", lambda text, **_: text)
    return Tokenizer


@pytest.mark.parametrize("fail", ["from_file", "encode"])
def test_a_broken_tokenizer_is_one_sentence_when_it_is_opened(tmp_path, library, fail):
    library.fail = fail
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a tokenizer \(") as caught:
        wan.open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused_and_a_long_prompt_is_told(tmp_path, library, capsys):
    library.fail = ""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "._spiece.model").write_bytes(b"hidden, and no tokenizer")
    tokenizer = wan.open_tokenizer(tmp_path)
    ids, mask = tokenizer(["abc", "a" * 12], 8)
    assert ids[1].tolist() == [97] * 7 + [1] and mask.sum() == 4 + 8
    told = capsys.readouterr().err
    assert told == "crcm: the prompt 'aaaaaaaaaaaa' has 13 tokens, of which the model sees 8: it is cut\n"
    encoder = types.SimpleNamespace(config=types.SimpleNamespace(vocabulary=98, dim=4))
    with pytest.raises(UserError, match=r"tokenizer\.json gives token 99, and the text encoder knows 98"):
        wan.WanTextEncoder(encoder, None, tokenizer, length=8)(["abc"])


def test_a_hidden_tokenizer_is_passed_over(tmp_path):
    (tmp_path / "._spiece.model").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        wan.load_tokenizer(tmp_path)
