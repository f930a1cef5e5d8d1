"""Keys and values of earlier chunks, as a type: what is kept, where it stands in the clip, and how it is packed."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import flax.struct
import jax

from crcm_jax.chunks import ChunkPattern


class Seen(NamedTuple):
    """What a chunk sees of a cache, in frames: slots [0, sink) and [start, stop); ints, or traced integers.

    now: the position at which the chunk's own first frame stands, in frames, for rotary embeddings.
    """

    start: Any
    stop: Any
    sink: Any
    now: Any


class CachePolicy(Protocol):
    """What is kept of a stream, where, and what of it a chunk sees. Hashable; everything is counted in frames.

    chunk: the number of a chunk in its stream, an int or a traced integer ≥ 0. slots: how many frames the cache holds.
    """

    def slots(self, chunks: ChunkPattern, frames: int) -> int:
        """How many frames a cache holds for streams of `frames`. ValueError where the policy cannot serve them."""

    def limit(self, chunks: ChunkPattern, slots: int) -> int | None:
        """How many chunks a stream on such a cache may have; None for any number."""

    def see(self, chunks: ChunkPattern, chunk: Any, slots: int) -> Seen:
        """What chunk `chunk` sees of the cache before it is written itself."""

    def slot(self, chunks: ChunkPattern, chunk: Any, slots: int) -> Any:
        """The slot that chunk `chunk`'s first frame is written to; those of its other frames follow."""


class Storage(Protocol):
    """How keys and values are packed. Hashable. Arrays are `[…, token, head, channel]`."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Room for arrays of `shape`, of a network that computes in `dtype`."""

    def read(self, packed: Any) -> jax.Array:
        """What attention looks at."""

    def write(self, packed: Any, new: jax.Array, token: Any) -> Any:
        """The packed array with `new` in it from `token` on."""


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of every layer, a value that goes in and comes out.

    k, v: as `storage` packs arrays `[layer, batch, token, head, channel]`, or lists of them, a layer each, without the
        first axis (both are one cache: whoever reads takes either). Tokens are those of slot 0, of slot 1, ….
    slots: frames that it has room for. tokens: of a frame.
    """

    k: Any
    v: Any
    policy: CachePolicy = flax.struct.field(pytree_node=False)
    storage: Storage = flax.struct.field(pytree_node=False)
    slots: int = flax.struct.field(pytree_node=False)
    tokens: int = flax.struct.field(pytree_node=False)

    def see(self, chunks: ChunkPattern, chunk: Any) -> Seen:
        """See `CachePolicy.see`. ValueError for a chunk, named by an int, that is beyond the end."""
        self.require(chunks, chunk)
        return self.policy.see(chunks, chunk, self.slots)

    def require(self, chunks: ChunkPattern, chunk: Any) -> None:
        """ValueError if `chunk` is an int beyond the end. Who traces it has asked with an int before, or gets NaN."""
        limit = self.policy.limit(chunks, self.slots)
        if limit is not None and isinstance(chunk, int) and not 0 <= chunk < limit:
            raise ValueError(
                f"chunk {chunk} lies beyond a cache of {self.slots} frames, which holds {limit} chunks: make it for "
                "longer clips, or take a policy that forgets"
            )


def write(cache: KVCache, chunks: ChunkPattern, k: Any, v: Any, chunk: Any) -> KVCache:
    """The cache with chunk `chunk`'s keys and values, stacked or in a list as the cache's own are."""
    token = cache.policy.slot(chunks, chunk, cache.slots) * cache.tokens

    def each(packed, new):
        if isinstance(new, list):
            return [cache.storage.write(p, n, token) for p, n in zip(packed, new)]
        return cache.storage.write(packed, new, token)

    return cache.replace(k=each(cache.k, k), v=each(cache.v, v))
