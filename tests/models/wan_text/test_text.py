"""Prompt cleaning, tokenizers from local files, and the text encoder as a whole."""

import sys

import jax
import numpy as np
import pytest

from crcm_jax.errors import MissingPackage, UserError
from crcm_jax.models.text.umt5 import UMT5Config, UMT5Encoder
from crcm_jax.models.text.wan import Tokenizer, WanTextEncoder, clean_prompt, load_tokenizer, open_tokenizer

CORPUS = ["a cat walks over the wet street", "the dog sees a red ball", "waves roll on to the beach at dusk"] * 20


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers (pip install -e .[text])")
    folder = tmp_path_factory.mktemp("json")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    ending = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.post_processor = ending
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece (pip install -e .[text])")
    folder = tmp_path_factory.mktemp("model")
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=3,
    )
    return folder


def test_clean_prompt():
    assert clean_prompt("  a \n\t cat&amp;amp;dog  ", fix_unicode=False) == "a cat&dog"
    assert clean_prompt("&amp;lt;b&amp;gt;", fix_unicode=False) == "<b>"
    pytest.importorskip("ftfy", reason="needs ftfy (pip install -e .[text])")
    assert clean_prompt("sch\u00c3\u00b6n \u2019 a\u3000b") == "schön ' a b"


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)  # which makes importing it fail
    with pytest.raises(MissingPackage, match=r"needs ftfy: pip install 'causal-rcm-jax\[text\]'"):
        clean_prompt("a cat")


def test_json_tokenizer_pads_and_cuts_as_transformers_does(json_folder):
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(json_folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    prompts = ["a cat", "the dog walks to the beach and on and on to the street at dusk", ""]
    for length in (12, 64):
        expected = theirs(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
        ids, mask = load_tokenizer(json_folder)(prompts, length)
        np.testing.assert_array_equal(ids, expected["input_ids"])
        np.testing.assert_array_equal(mask, expected["attention_mask"])


def test_sentencepiece_tokenizer(model_folder):
    tokenizer = load_tokenizer(model_folder)
    ids, mask = tokenizer(["a cat", "", "the dog sees a red ball at the beach"], 12)
    assert ids.shape == mask.shape == (3, 12)
    assert ids[1].tolist() == [1] + [0] * 11 and mask[1].tolist() == [True] + [False] * 11
    assert ids[2, -1] == 1 and mask[2].all()
    length = mask[0].sum()
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(model_folder / "spiece.model"))
    assert model.decode(ids[0, : length - 1].tolist()) == "a cat" and ids[0, length - 1] == 1


def test_no_tokenizer_and_a_wrong_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json and no sentencepiece"):
        load_tokenizer(tmp_path)
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers (pip install -e .[text])")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="not a UMT5 tokenizer"):
        load_tokenizer(tmp_path)


def test_text_encoder():
    config = UMT5Config(
        vocabulary=128, dim=16, heads=2, head_dim=8, ffn_dim=24, layers=2, buckets=8, max_distance=16, dtype="float32"
    )
    network = UMT5Encoder(config)
    params = network.init(jax.random.key(0))
    letters = Tokenizer(lambda text: [ord(c) for c in text], end=1, pad=0)
    encode = WanTextEncoder(network, params, letters, length=12, batch=2, fix_unicode=False)
    prompts = ["a cat", "  a \n cat ", "a very long prompt that is cut"]
    out = encode(prompts)
    assert out.shape == (3, 12, 16) and out.dtype == np.float32
    # Cleaning makes the first two one prompt; a prompt's embedding does not depend on its neighbours.
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_allclose(encode(prompts[:1])[0], out[0], atol=1e-5)
    assert np.abs(out[0, :6]).min(-1).all() and not out[0, 6:].any() and np.abs(out[2]).max(-1).all()
    assert encode([]).shape == (0, 12, 16)


def test_a_missing_library_is_said_before_weights_are_read(monkeypatch, json_folder):
    """ftfy is needed by the first prompt only, which comes after gigabytes."""
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match=r"needs ftfy: pip install 'causal-rcm-jax\[text\]'"):
        open_tokenizer(json_folder)
