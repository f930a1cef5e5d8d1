"""Masks of streams that are cut into chunks of tokens, and of a caption ahead of such a stream."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from pallas_kernels.attention.mask import Full, Mask, Visible, namespace, per_entry
from pallas_kernels.attention.rows import pack


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("offset",), meta_fields=("first", "chunk", "window", "sink")
)
@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
    """Chunks of tokens; a query sees its own chunk and earlier ones (spec causal_rcm 3.2, block_causal).

    Chunk 0 has `first` tokens, every other one `chunk` tokens. Keys start at chunk 0, queries at chunk `offset`. With
    `window` K > 0 a query of chunk c sees chunks c−K+1 … c, and with `sink` S > 0 also chunks 0 … S−1 up to its own.

    first, chunk: tokens. window, sink: chunks, 0 is off. offset: chunks, an int or a traced int32 scalar; a traced one
    leaves the check that there are enough keys to the caller.
    """

    first: int
    chunk: int
    window: int = 0
    sink: int = 0
    offset: Any = 0

    def visible(self, queries, own, context):
        _check_chunks(self)
        if context is not None:
            raise ValueError("mask: BlockCausal describes the own segment alone: drop context, or use Intervals")
        if np.ndim(self.offset):
            raise ValueError(f"mask: BlockCausal.offset has shape {np.shape(self.offset)}: use one for the whole batch")
        xp, offset = namespace(self.offset)
        row = np.arange(queries, dtype=np.int32)
        if xp is np and offset < 0:
            raise ValueError(f"mask: BlockCausal.offset is {offset}: it counts the chunks before the queries")
        if xp is np and offset == 0:
            _check_whole_chunks(self, queries, "queries")
        elif xp is np and queries % self.chunk:
            raise ValueError(
                f"mask: {queries} queries from chunk {offset} on are no whole number of chunks of {self.chunk} tokens: "
                "give whole chunks, or change BlockCausal.chunk"
            )
        chunk = xp.where(offset > 0, offset + row // self.chunk, _chunk_of(self, row))
        end = _start(self, chunk + 1, xp)
        if xp is np and int(end[-1]) > own:
            raise ValueError(
                f"mask: the last query's chunk ends at token {int(end[-1])}, and there are {own} own keys: "
                "give keys up to the end of the queries' last chunk, or lower BlockCausal.offset"
            )
        near = _start(self, xp.maximum(chunk - (self.window - 1), 0), xp) if self.window else xp.zeros_like(end)
        far = xp.minimum(_start(self, np.int32(self.sink), np), end) if self.window and self.sink else 0
        return Visible(pack(xp, queries, own, (0, far), (near, end)))


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("first", "chunk", "window", "sink"))
@dataclasses.dataclass(frozen=True)
class TeacherForcing(Mask):
    """Noisy target over `[earlier chunks of the clean context ; own chunk]` (spec causal_rcm 3.2).

    Own is the noisy stream itself; a query of chunk c sees own chunk c and the context's chunks 0 … c−1, with `window`
    K only c−K+1 … c−1, and with `sink` S also 0 … S−1. Queries and own keys have equal length; the context has at least
    all chunks but the last.

    first, chunk: tokens. window, sink: chunks, 0 is off.
    """

    first: int
    chunk: int
    window: int = 0
    sink: int = 0

    def visible(self, queries, own, context):
        _check_chunks(self)
        _check_whole_chunks(self, queries, "queries")
        if own != queries:
            raise ValueError(f"mask: TeacherForcing has {queries} queries and {own} own keys: k and v must match q")
        if context is None:
            raise ValueError("mask: TeacherForcing needs the clean stream: pass context=(k, v)")
        chunk = _chunk_of(self, np.arange(queries, dtype=np.int32))
        start, end = _start(self, chunk, np), _start(self, chunk + 1, np)
        if int(start[-1]) > context:
            raise ValueError(
                f"mask: the last chunk sees context up to token {int(start[-1])}, and the context has {context}: "
                "pass the clean stream of the same clip"
            )
        near = _start(self, np.maximum(chunk - (self.window - 1), 0), np) if self.window else np.zeros_like(start)
        far = np.minimum(_start(self, np.int32(self.sink), np), start) if self.window and self.sink else 0
        return Visible(
            pack(np, queries, own, (start, end), (0, 0)),
            pack(np, queries, context, (0, far), (np.minimum(near, start), start)),
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=("mask", "lengths"), meta_fields=("tokens",))
@dataclasses.dataclass(frozen=True)
class Captioned(Mask):
    """Another mask, and a caption at the front of the context, all of which every query sees.

    The context is `[caption buffer of tokens | what mask calls context]`, or the buffer alone where `mask` has no
    context. Buffers are of one size, captions need not be: beyond a caption's length nobody sees anything.

    mask: `Full`, `BlockCausal` or `TeacherForcing`. lengths: tokens of the captions, an int or a traced int32 scalar;
    or one a batch entry, as for `Cached`. tokens: of the buffer.
    """

    mask: Mask
    lengths: Any
    tokens: int

    def visible(self, queries, own, context):
        if not isinstance(self.mask, (Full, BlockCausal, TeacherForcing)):
            raise ValueError(
                f"mask: Captioned cannot hold {type(self.mask).__name__}: use Full, BlockCausal or TeacherForcing, "
                "or Cached(sink=lengths) or Intervals alone"
            )
        if context is None:
            raise ValueError("mask: Captioned has its caption at the front of the context: pass context=(k, v)")
        rest = context - self.tokens
        if rest < 0:
            raise ValueError(
                f"mask: Captioned.tokens is {self.tokens} and the context has {context}: pass the whole buffer"
            )
        inner = self.mask.visible(queries, own, rest or None)
        xp, lengths = per_entry(self, "lengths")
        if xp is np and not np.all((lengths >= 0) & (lengths <= self.tokens)):
            raise ValueError(f"mask: Captioned.lengths {self.lengths} do not lie in a buffer of {self.tokens} tokens")
        lo, hi = 0, rest
        if inner.context is not None:
            lo, hi, *second = inner.context
            if np.any(second[0] < second[1]):
                raise ValueError(
                    f"mask: {self.mask} and a caption are three key intervals of one row: use window or sink, not both"
                )
        caption, stream = (0, xp.minimum(lengths, self.tokens)), (lo + self.tokens, hi + self.tokens)
        return Visible(inner.own, pack(xp, queries, context, caption, stream))


def _check_chunks(mask):
    if mask.first < 1 or mask.chunk < 1:
        raise ValueError(f"mask: {mask}: first and chunk are lengths in tokens: use at least 1")
    if mask.window < 0 or mask.sink < 0:
        raise ValueError(f"mask: {mask}: window and sink count chunks: use 0 to switch one off")


def _check_whole_chunks(mask, tokens, name):
    rest = tokens - mask.first
    if rest < 0 or rest % mask.chunk:
        raise ValueError(
            f"mask: {tokens} {name} are not a first chunk of {mask.first} and whole chunks of {mask.chunk} tokens: "
            "change the length, or the mask's first / chunk"
        )


def _chunk_of(mask, token):
    return np.where(token < mask.first, 0, 1 + (token - mask.first) // mask.chunk).astype(np.int32)


def _start(mask, chunk, xp):
    return xp.where(chunk > 0, mask.first + (chunk - 1) * mask.chunk, 0)
