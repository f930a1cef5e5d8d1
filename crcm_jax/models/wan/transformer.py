"""Wan's video diffusion transformer, bidirectional or causal: the whole of `models.base.Network`.

One stack of layers serves all views of context. Teacher forcing runs two streams through it, the clean context and the
noisy target, each with its own time: the context never depends on the target, so under `jax.jvp` in (x, t) it carries
no tangent, and none is computed (structural zeros).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax import cache as caching
from crcm_jax import compiler
from crcm_jax.cache import FULL, PLAIN, CachePolicy, KVCache, Storage
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import ITSELF, Condition, OnCache, Params, Prepared, TeacherForcing, View
from crcm_jax.models.core import rope, stack
from crcm_jax.models.core.declare import Declared
from crcm_jax.models.wan import layers as wan
from crcm_jax.models.wan import prompt
from crcm_jax.models.wan.block import Block
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.models.wan.ends import Ends
from crcm_jax.models.wan.rules import RULES
from crcm_jax.parallel.placement import ONE_DEVICE, Placement, pad_to
from pallas_kernels import attention as masks


class _Stream(NamedTuple):
    """Tokens on their way through the layers, with the time and the rotation that go with them."""

    x: jax.Array
    e: jax.Array
    projection: jax.Array
    rope: tuple[jax.Array, jax.Array]

    def constrain(self, placement: Placement) -> _Stream:
        """The same, held to where it lies between layers."""
        projection = placement.samples(self.projection)
        return self._replace(x=placement.tokens(self.x), e=placement.samples(self.e), projection=projection)


@dataclasses.dataclass(frozen=True)
class WanTransformer:
    """The network of `config`; causal over `chunks`, or bidirectional where `chunks` is None.

    placement: the mesh that parameters, latents and caches lie on; the same function on any.
    unrolled: layers are written out in the program, and parameters and caches are lists of one tree a layer. Otherwise
    parameters are `{"outside": …, "blocks": …}` with the layers stacked on the blocks' leading axis. Either takes both.

    Raises ValueError, before anything is computed, for latents that do not divide into patches or chunks, and for heads
    that do not divide over the mesh.
    """

    config: WanConfig
    chunks: ChunkPattern | None = None
    placement: Placement = ONE_DEVICE
    unrolled: bool = False

    def __post_init__(self):
        self.placement.check(*self.heads)

    @property
    def rules(self):
        """See `models.base.Network`."""
        return RULES

    @property
    def heads(self) -> tuple[int, int]:
        """See `models.base.Network`."""
        return self.config.heads, self.config.heads

    @functools.cached_property
    def _ends(self) -> Declared:
        return Declared(lambda rngs: Ends(self.config, rngs))

    @functools.cached_property
    def _block(self) -> Declared:
        return Declared(lambda rngs: Block(self.config, rngs, self.placement))

    @functools.cached_property
    def _stack(self) -> stack.Stack:
        return stack.Stack(self.config.layers, self.unrolled, self.config.remat, self.placement.gathers)

    def init(self, key) -> Params:
        """Random parameters, float32; the head is zero, so a fresh network predicts zero velocity."""
        first, second = jax.random.split(key)
        blocks = jax.vmap(self._block.init)(jax.random.split(second, self.config.layers))
        return {"outside": self._ends.init(first), "blocks": stack.listed(blocks) if self.unrolled else blocks}

    def for_inference(self, params, *, gather_once: bool = True) -> tuple[WanTransformer, Params]:
        """See `models.base.Network`. On GPUs the layers are unrolled; weights cut over fsdp are gathered a matrix at a
        time, and kept whole in the compute dtype."""
        placement, unrolled = self.placement, self.unrolled or compiler.unrolls_layers()
        blocks = params["blocks"]
        if unrolled and not stack.is_list(blocks):
            blocks = stack.listed(blocks)
        outside = params["outside"]
        if gather_once and placement.gathers:
            blocks = list(map(self._gathered, blocks)) if unrolled else jax.lax.map(self._gathered, blocks)
            outside = placement.gather(outside, "outside", RULES)
            placement = dataclasses.replace(placement, gathered=True)
        network = dataclasses.replace(self, placement=placement, unrolled=unrolled)
        return network, {"outside": outside, "blocks": blocks}

    def condition(self, params, cond: Condition, *, many: bool = True) -> Prepared:
        """See `models.base.Network`. For many passes, the keys and values of every layer's cross-attention; for one,
        embeddings, from which each layer makes its own."""
        prompt.require(cond, self.config)
        tree, ends = cond.prompt, self._bound_ends(params)
        text, image = jax.tree.map(self.placement.samples, ends.embed(tree["text"], tree.get("image")))
        if not many:
            return Prepared({"embedded": (text, image)}, cond.frames, cond.given)

        def layer(_, params):
            return None, self._bound_block(params).sources(text, image)

        return Prepared({"sources": self._run(layer, None, params["blocks"])[1]}, cond.frames, cond.given)

    def velocity(self, params, x, t, prepared: Prepared, view: View = ITSELF):
        """See `models.base.Network`. x `[batch, frame, height, width, channel]`, t `[batch or 1, frame or 1]`."""
        if isinstance(view, TeacherForcing):
            return self._teacher_forcing(params, x, t, prepared, view)
        if isinstance(view, OnCache):
            return self._cached(params, x, t, prepared, self._in_form(view.cache), view.chunk)[0]
        streams, ends = self._through(params, x, t, prepared, self.config.layers)
        return self._velocity(ends, streams, x)

    def write(self, params, x, t, prepared: Prepared, cache: KVCache, chunk) -> tuple[jax.Array, KVCache]:
        """See `models.base.Network`."""
        cache = self._in_form(cache)
        velocity, own = self._cached(params, x, t, prepared, cache, chunk)
        cache = caching.write(cache, self._causal("a cache"), own["k"], own["v"], chunk)
        k, v = jax.tree.map(self.placement.cache, (cache.k, cache.v))
        return velocity, cache.replace(k=k, v=v)

    def cache(self, batch, shape, policy: CachePolicy = FULL, storage: Storage = PLAIN) -> KVCache:
        """See `models.base.Network`."""
        chunks, (frames, height, width), c = self._causal("a cache"), shape, self.config
        slots, tokens = policy.slots(chunks, frames), self._tokens_of(height, width)
        layers = () if self.unrolled else (c.layers,)

        def empty():
            packed = storage.empty((*layers, batch, slots * tokens, c.heads, c.head_dim), jnp.dtype(c.dtype))
            return jax.tree.map(self.placement.cache, packed)

        def whole():
            return [empty() for _ in range(c.layers)] if self.unrolled else empty()

        return KVCache(whole(), whole(), policy, storage, slots, tokens)

    def features(self, params, x, t, prepared: Prepared, layers: Sequence[int]) -> list[jax.Array]:
        """See `models.base.Network`."""
        for layer in layers:
            if not 0 <= layer < self.config.layers:
                raise ValueError(f"there is no layer {layer}: this network's are 0 to {self.config.layers - 1}")
        found: dict[int, jax.Array] = {}
        stream: Any = None
        ends: Any = None
        for layer in sorted(set(layers)):
            before = max(found, default=-1) + 1
            stream, ends = self._through(params, x, t, prepared, layer + 1, before, stream, ends)
            found[layer] = stream.x[:, :, : self._tokens_per_frame(x)]
        return [found[layer] for layer in layers]

    # How each view of context runs through the layers.

    def _through(self, params, x, t, prepared, stop, start=0, stream=None, ends=None) -> tuple[_Stream, Ends]:
        """x that sees itself, through layers start … stop − 1; `stream` is where it stands, if it is on its way."""
        tokens, mask = self._tokens_per_frame(x), masks.Full()
        if self.chunks is not None:
            self.chunks.count(x.shape[1])
            mask = masks.BlockCausal(**self._units(tokens))
        ends = ends or self._bound_ends(params)

        def layer(stream, xs):
            params, sources = xs
            block = self._bound_block(params)
            m = block.modulations(stream.projection)
            q, k, v = block.qkv(stream.x, m, stream.rope, tokens)
            return stream._replace(x=block.finish(stream.x, m, sources(block), q, k, v, mask=mask)), None

        stream = stream or self._stream(ends, x, t, prepared)
        return self._run(layer, stream, params["blocks"], prepared, part=(start, stop))[0], ends

    def _teacher_forcing(self, params, x, t, prepared, view: TeacherForcing):
        chunks, tokens, c = self._causal("teacher forcing"), self._tokens_per_frame(x), view.context
        if c.shape != x.shape:
            raise ValueError(f"context has shape {c.shape}, the target {x.shape}: teacher forcing pairs equal clips")
        chunks.count(x.shape[1])
        units, ends = self._units(tokens), self._bound_ends(params)

        def layer(streams, xs):
            (context, target), (params, sources) = streams, xs
            block = self._bound_block(params)
            sources = sources(block)
            m_c, m = block.modulations(context.projection), block.modulations(target.projection)
            q_c, k_c, v_c = block.qkv(context.x, m_c, context.rope, tokens)
            q, k, v = block.qkv(target.x, m, target.rope, tokens)
            y = block.finish(target.x, m, sources, q, k, v, context=(k_c, v_c), mask=masks.TeacherForcing(**units))
            y_c = block.finish(context.x, m_c, sources, q_c, k_c, v_c, mask=masks.BlockCausal(**units))
            return (context._replace(x=y_c), target._replace(x=y)), None

        streams = self._stream(ends, c, view.times, prepared), self._stream(ends, x, t, prepared)
        (_, stream), _ = self._run(layer, streams, params["blocks"], prepared)
        return self._velocity(ends, stream, x)

    def _cached(self, params, x, t, prepared, cache: KVCache, chunk):
        """(velocity, the chunk's own keys and values in every layer)."""
        chunks, tokens = self._causal("a cache"), self._tokens_per_frame(x)
        # Without a chunk, each of a whole clip: a target whose clean context has been through the layers already.
        if chunk is None:
            now, mask = 0, masks.TeacherForcing(**self._units(tokens))
        else:
            seen = cache.see(chunks, chunk)
            now = seen.now
            mask = masks.Cached(stop=seen.stop * tokens, start=seen.start * tokens, sink=seen.sink * tokens)
        ends = self._bound_ends(params)
        endless = cache.policy.limit(chunks, cache.slots) is None
        stream = self._stream(ends, x, t, prepared, now, None if endless else cache.slots)

        def layer(stream, xs):
            (params, (k_c, v_c)), sources = xs[0], xs[1]
            context = cache.storage.read(k_c), cache.storage.read(v_c)
            block = self._bound_block(params)
            m = block.modulations(stream.projection)
            q, k, v = block.qkv(stream.x, m, stream.rope, tokens)
            y = block.finish(stream.x, m, sources(block), q, k, v, context=context, mask=mask)
            return stream._replace(x=y), {"k": k, "v": v}

        stream, own = self._run(layer, stream, (params["blocks"], (cache.k, cache.v)), prepared)
        own = {name: [layer[name] for layer in own] for name in ("k", "v")} if stack.is_list(own) else own
        return self._velocity(ends, stream, x), own

    # Small parts.

    def _in_form(self, cache: KVCache) -> KVCache:
        """A cache that either form of this network has written, as this one's layers take it."""
        if stack.is_list(cache.k) == self.unrolled:
            return cache
        if self.unrolled:
            return cache.replace(k=stack.listed(cache.k), v=stack.listed(cache.v))
        k, v = jax.tree.map(self.placement.cache, stack.stacked((cache.k, cache.v)))
        return cache.replace(k=k, v=v)

    def _causal(self, what: str) -> ChunkPattern:
        if self.chunks is None:
            raise ValueError(f"{what} needs a causal network: give WanTransformer a ChunkPattern")
        return self.chunks

    def _bound_ends(self, params) -> Ends:
        return self._ends.bind(self.placement.gather(params["outside"], "outside", RULES))

    def _bound_block(self, params) -> Block:
        """The layer of one slice of the blocks; called within it, so that the backward pass gathers weights again."""
        return self._block.bind(self._gathered(params))

    def _gathered(self, params):
        """The weights of one slice of the blocks, gathered in the compute dtype."""
        return self.placement.gather(params, "blocks/0", RULES, jnp.dtype(self.config.dtype))

    def _velocity(self, ends: Ends, stream: _Stream, x):
        return self.placement.samples(ends.velocity(stream.x, stream.e, *x.shape[2:4]))

    def _run(self, body, carry, xs, prepared: Prepared | None = None, part: tuple[int, int] | None = None):
        """body through the stack, or the layers [start, stop) of it. With a prepared condition, body's xs are a pair:
        its own, and a function of the block that gives the sources of its cross-attention."""

        def constrain(streams):
            return jax.tree.map(
                lambda s: s.constrain(self.placement), streams, is_leaf=lambda s: isinstance(s, _Stream)
            )

        def layer(carry, xs):
            carry, out = body(constrain(carry), sources(*xs))
            return constrain(carry), out

        def sources(own, kept):
            if prompt_of is None:
                return own
            return own, (lambda block: block.sources(*prompt_of["embedded"]) if kept is None else kept)

        prompt_of = None if prepared is None else prepared.prompt
        xs = xs, None if prompt_of is None else prompt_of.get("sources")
        layers = self._stack
        if part is not None and part != (0, self.config.layers):
            start, stop = part
            xs = jax.tree.map(lambda x: x[start:stop], xs, is_leaf=stack.is_list)
            layers = dataclasses.replace(layers, layers=stop - start)
        return layers.run(layer, carry, xs)

    def _stream(self, ends: Ends, x, t, prepared: Prepared, start=0, total: int | None = -1) -> _Stream:
        """x on its way in; its first frame is frame `start` (maybe traced) of a clip of `total` frames, None for a
        stream without end, by default its own."""
        frames, height, width = x.shape[1:4]
        _, ph, pw = self.config.patch
        high = wan.wide(jnp.dtype(self.config.dtype))
        total = frames if total == -1 else total
        turn = rope.table(start, frames, total, height // ph, width // pw, self.config.head_dim, high)
        padded = self.placement.filled(self._tokens_per_frame(x), frames)
        tokens = ends.tokens(self.placement.samples(x), prepared.frames.get(prompt.EXTRA), padded)
        (e, projection), (cos, sin) = ends.time(t), (pad_to(table, 1, padded) for table in turn)
        return _Stream(tokens, e, projection, (cos, sin))

    def _tokens_per_frame(self, x) -> int:
        return self._tokens_of(*x.shape[2:4])

    def _tokens_of(self, height: int, width: int) -> int:
        _, ph, pw = self.config.patch
        if height % ph or width % pw:
            raise ValueError(f"latents of {height}×{width} do not divide into patches of {ph}×{pw}")
        return (height // ph) * (width // pw)

    def _units(self, tokens: int) -> dict[str, int]:
        """The chunk pattern in the attention mask's units: tokens and chunks."""
        p = self._causal("a mask of chunks")
        return {"first": p.first * tokens, "chunk": p.size * tokens, "window": p.window, "sink": p.sink}
