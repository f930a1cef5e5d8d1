"""Prompts to text embeddings: cleaning, a tokenizer from local files, and the encoder behind `models.base.TextEncoder`.

See spec wan21 3. Nothing is downloaded. The negative prompt that Wan's models share is not part of this code:
read it from the model's own configuration.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from crcm_jax.errors import UserError, need
from crcm_jax.models.base import Params
from crcm_jax.models.text.umt5 import UMT5Encoder
from crcm_jax.models.wan.family import TOKENS


def clean_prompt(text: str, *, fix_unicode: bool = True) -> str:
    """The prompt as Wan saw prompts in training: broken unicode mended, HTML unescaped twice, spaces collapsed.

    Raises MissingPackage where ftfy is missing and `fix_unicode` is on: skipping the mending could change embeddings.
    """
    if fix_unicode:
        text = need("ftfy", extra="text").fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


class Tokenizer:
    """Prompts → token ids, cut to length, ended by the end-of-sequence token, padded."""

    def __init__(self, encode: Callable[[str], Sequence[int]], *, end: int, pad: int):
        self._encode, self.end, self.pad = encode, end, pad

    def __call__(self, prompts: Sequence[str], length: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, mask bool), both `[batch, length]`; the mask is True for the prompt's own tokens and its end."""
        ids = np.full((len(prompts), length), self.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, prompt in enumerate(prompts):
            tokens = [*self._encode(prompt)[: length - 1], self.end]
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

    Raises FileNotFoundError where there is none, MissingPackage where its library is missing, and ValueError where it
    has no padding or end-of-sequence token.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        found = [*path.glob("tokenizer.json"), *sorted(path.glob("*.model"))]
        file = found[0] if found else path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer.json and no sentencepiece *.model at {path}")
    if file.suffix == ".json":
        tokenizer = need("tokenizers", extra="text").Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        end, pad = (tokenizer.token_to_id(name) for name in ("</s>", "<pad>"))
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    else:
        model = need("sentencepiece", extra="text").SentencePieceProcessor(model_file=str(file))
        # Minus one stands for a token that the model lacks.
        end, pad = (None if i < 0 else i for i in (model.eos_id(), model.pad_id()))
        encode = model.encode
    if end is None or pad is None:
        raise ValueError(f"{file} has no end-of-sequence token </s> or no padding token <pad>: not a UMT5 tokenizer")
    return Tokenizer(encode, end=end, pad=pad)


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
        """Embeddings `[batch, length, channel]` float32 of the prompts, zeros past each one's end."""
        ids, mask = self.tokenizer([clean_prompt(p, fix_unicode=self.fix_unicode) for p in prompts], self.length)
        out = np.zeros((*ids.shape, self.encoder.config.dim), np.float32)
        # A last group that is not full is filled up with its last prompt, so that one program serves all groups.
        size = min(self.batch, len(prompts))
        for start in range(0, len(prompts), max(size, 1)):
            rows = np.minimum(np.arange(start, start + size), len(prompts) - 1)
            embeddings = np.asarray(self.encoder(self.params, ids[rows], mask[rows]), np.float32)
            out[rows] = embeddings
        return out
