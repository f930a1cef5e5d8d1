"""Prompts to text embeddings: cleaning, a tokenizer from local files, and the encoder behind `models.base.TextEncoder`.

See spec wan21 3. Nothing is downloaded. The negative prompt that Wan's models share is not part of this code:
read it from the model's own configuration.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crcm_jax.errors import UserError, need
from crcm_jax.models.base import Params
from crcm_jax.models.text.umt5 import UMT5Encoder
from crcm_jax.models.wan.family import TOKENS
from crcm_jax.saving.files import visible
from crcm_jax.saving.reading import reading


def clean_prompt(text: str, *, fix_unicode: bool = True) -> str:
    """The prompt as Wan saw prompts in training: broken unicode mended, HTML unescaped twice, spaces collapsed.

    Raises MissingPackage where ftfy is missing and `fix_unicode` is on: skipping the mending could change embeddings.
    """
    if fix_unicode:
        text = need("ftfy", extra="text").fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


class Tokenizer:
    """Prompts → token ids, cut to length (a line on stderr says so), ended by the end-of-sequence token, padded."""

    def __init__(self, encode: Callable[[str], Sequence[int]], *, end: int, pad: int, path: str | Path = "tokenizer"):
        """path: the file that it was read from, for messages."""
        self._encode, self.end, self.pad, self.path = encode, end, pad, path

    def __call__(self, prompts: Sequence[str], length: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, mask bool), both `[batch, length]`; the mask is True for the prompt's own tokens and its end.

        UserError where the tokenizer's library fails.
        """
        ids = np.full((len(prompts), length), self.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, prompt in enumerate(prompts):
            with reading(self.path, "a tokenizer"):
                tokens = list(self._encode(prompt))
            if len(tokens) >= length:
                told = f"the prompt {prompt[:40]!r} has {len(tokens) + 1} tokens, of which the model sees {length}"
                print(f"crcm: {told}: it is cut", file=sys.stderr)
            tokens = [*tokens[: length - 1], self.end]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        return ids, mask


def open_tokenizer(path: str | Path) -> Tokenizer:
    """`load_tokenizer`, to be called before gigabytes of weights are read: UserError for what encoding will lack."""
    try:
        clean_prompt("")
        return load_tokenizer(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in `path`: a `tokenizer.json`, a sentencepiece `*.model`, or a folder with one of them.

    Raises FileNotFoundError where there is none, MissingPackage where its library is missing, ValueError where it has
    no padding or end-of-sequence token, and UserError where the file is none, damaged, or a large-file pointer.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        found = [*path.glob("tokenizer.json"), *visible(path.glob("*.model"))]
        file = found[0] if found else path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer.json and no sentencepiece *.model at {path}")
    library = need("tokenizers" if file.suffix == ".json" else "sentencepiece", extra="text")
    with reading(file, "a tokenizer"):
        encode, end, pad = (_tokenizers if file.suffix == ".json" else _sentencepiece)(library, file)
        # What is damaged may load, and fail at the first words.
        encode("a prompt")
    if end is None or pad is None:
        raise ValueError(f"{file} has no end-of-sequence token </s> or no padding token <pad>: not a UMT5 tokenizer")
    return Tokenizer(encode, end=end, pad=pad, path=file)


def _tokenizers(library: Any, file: Path) -> tuple[Callable[[str], Sequence[int]], int | None, int | None]:
    tokenizer = library.Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end, pad = (tokenizer.token_to_id(name) for name in ("</s>", "<pad>"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, end, pad


def _sentencepiece(library: Any, file: Path) -> tuple[Callable[[str], Sequence[int]], int | None, int | None]:
    model = library.SentencePieceProcessor(model_file=str(file))
    # Minus one stands for a token that the model lacks.
    end, pad = (None if i < 0 else i for i in (model.eos_id(), model.pad_id()))
    return model.encode, end, pad


class WanTextEncoder:
    """`models.base.TextEncoder`: clean, tokenise, encode, `batch` prompts at a time.

    fix_unicode: see `clean_prompt`.
    """

    def __init__(
        self,
        encoder: UMT5Encoder,
        params: Params,
        tokenizer: Tokenizer,
        *,
        length: int = TOKENS,
        batch: int = 4,
        fix_unicode: bool = True,
    ):
        self.encoder, self.params, self.tokenizer = encoder, params, tokenizer
        self.length, self.batch, self.fix_unicode = length, batch, fix_unicode

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeddings `[batch, length, channel]` float32 of the prompts, zeros past each one's end. UserError for a
        token that the encoder has no row for."""
        ids, mask = self.tokenizer([clean_prompt(p, fix_unicode=self.fix_unicode) for p in prompts], self.length)
        known = self.encoder.config.vocabulary
        if ids.size and not 0 <= ids.min() <= ids.max() < known:
            raise UserError(
                f"{self.tokenizer.path} gives token {ids.max()}, and the text encoder knows {known}: it is of another "
                "model, or damaged; fetch the one that was published with these weights"
            )
        out = np.zeros((*ids.shape, self.encoder.config.dim), np.float32)
        # A last group that is not full is filled up with its last prompt, so that one program serves all groups.
        size = min(self.batch, len(prompts))
        for start in range(0, len(prompts), max(size, 1)):
            rows = np.minimum(np.arange(start, start + size), len(prompts) - 1)
            embeddings = np.asarray(self.encoder(self.params, ids[rows], mask[rows]), np.float32)
            out[rows] = embeddings
        return out
