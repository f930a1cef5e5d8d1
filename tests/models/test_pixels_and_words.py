"""The pixel codec and the word encoder, through the interfaces that learned ones implement."""

import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax.data import digits
from crcm_jax.errors import UserError
from crcm_jax.models.text.words import DIGITS_VOCABULARY, WordEncoder
from crcm_jax.models.vae.pixels import PixelCodec


@pytest.fixture
def video():
    return np.random.default_rng(0).uniform(-1, 1, (2, 5, 6, 8, 3)).astype(np.float32)


def test_latents_are_the_patches_pixels_scaled(video):
    codec = PixelCodec(patch=2, mean=-0.7, std=0.5, channels=3)
    latents = codec.encode(None, video)
    assert latents.shape == (2, *codec.latent_shape(5, 6, 8)) == (2, 5, 3, 4, 12)
    np.testing.assert_allclose(latents[1, 4, 2, 3], (video[1, 4, 4:6, 6:8].reshape(-1) + 0.7) / 0.5, rtol=1e-6)


@pytest.mark.parametrize("kind", [np, jnp])
def test_decode_inverts_encode_and_keeps_the_kind_of_array(video, kind):
    codec = PixelCodec(patch=2, mean=-0.7, std=0.5, channels=3)
    latents = codec.encode(None, kind.asarray(video))
    assert isinstance(latents, kind.ndarray) and latents.dtype == kind.float32
    np.testing.assert_allclose(codec.decode(None, latents), video, atol=1e-6)


def test_streamed_pixels_are_the_whole_clips(video):
    codec = PixelCodec(patch=2, std=0.5, channels=3)
    latents = codec.encode(None, video)
    stream = codec.decode_stream(None, iter([latents[:, :2], latents[:, 2:3], latents[:, 3:]]))
    np.testing.assert_array_equal(np.concatenate(list(stream), axis=1), codec.decode(None, latents))


def test_codec_mistakes_are_named(video):
    with pytest.raises(UserError, match="15×16 pixels does not split into patches of 2×2"):
        PixelCodec(patch=2).latent_shape(9, 15, 16)
    with pytest.raises(UserError, match=r"3 channels and codec\.channels is 1"):
        PixelCodec(patch=2).encode(None, video)
    for bad in (dict(patch=0), dict(std=0.0)):
        with pytest.raises(UserError):
            PixelCodec(**bad)


def test_every_prompt_has_its_own_embedding_that_never_changes():
    prompts = [digits.prompt_of([n], [d]) for n in range(10) for d in digits.DIRECTIONS]
    embedded = WordEncoder(length=6, dim=32)(prompts)
    assert embedded.shape == (80, 6, 32) and embedded.dtype == np.float32
    np.testing.assert_array_equal(embedded, WordEncoder(length=6, dim=32)(prompts))
    flat = embedded.reshape(80, -1)
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + 1e9 * np.eye(80)
    assert distances.min() > 0.9 * np.sqrt(32)  # at least one word apart: √2 · √32 / √2
    np.testing.assert_allclose((embedded[0][:4] ** 2).mean(), 1, rtol=0.05)


def test_words_and_positions_are_orthogonal_and_scaled():
    encoder = WordEncoder(length=14, dim=32)  # 18 words + 14 positions fill the space
    words = encoder(DIGITS_VOCABULARY)[:, 0] - encoder(["a"])[:, 0]  # the position cancels
    gram = words[1:] @ words[1:].T
    np.testing.assert_allclose(gram, 16 * (np.eye(17) + 1), atol=1e-3)  # |w_i − w_a|² = 2·16, cross terms 16


def test_order_matters_and_padding_is_zero():
    encoder = WordEncoder(length=12, dim=32)
    a, b = encoder(["a three moves up and a seven moves left", "a seven moves left and a three moves up"])
    assert np.abs(a.sum(0) - b.sum(0)).max() < 1e-5  # the same words in the same number of places …
    assert np.abs(a - b).max() > 0.5  # … but not the same sentence
    pairs = [{tuple(np.round(row, 4)) for row in e[:9]} for e in (a, b)]
    assert pairs[0] != pairs[1]  # even to a reader that ignores the order of tokens
    assert (a[9:] == 0).all()
    assert (encoder([""]) == 0).all() and encoder([""]).shape == (1, 12, 32)


def test_encoder_mistakes_are_named():
    encoder = WordEncoder(length=4, dim=32)
    with pytest.raises(UserError, match='the word "cat" is not in the vocabulary: a, an, moves'):
        encoder(["a cat moves up"])
    with pytest.raises(UserError, match="has 6 words, the text encoder takes 4"):
        encoder(["a three moves up and left"])
    with pytest.raises(TypeError, match="a sequence of strings"):
        encoder("a three moves up")


def test_vocabulary_covers_the_prompts():
    spoken = {w for n in range(10) for d in digits.DIRECTIONS for w in digits.prompt_of([n, 8], [d, d]).split()}
    assert spoken == set(DIGITS_VOCABULARY)
