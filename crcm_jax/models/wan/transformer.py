"""Wan's video diffusion transformer, bidirectional or causal, through the interface of `models.base`.

One stack of layers serves four views of context. Teacher forcing runs two streams through it, the clean context and the
noisy target, each with its own time: the context never depends on the target, so under `jax.jvp` in (x, t) it carries
no tangent, and none is computed (structural zeros).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from crcm_jax import compiler
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import Cache, Condition, Params
from crcm_jax.models.core import rope
from crcm_jax.models.core.remat import remat
from crcm_jax.models.wan import layers as wan
from crcm_jax.models.wan.config import WanConfig
from crcm_jax.parallel.placement import ONE_DEVICE, Placement, fill
from pallas_kernels.attention import BlockCausal, Cached, Full, TeacherForcing

TIME_SCALE = 1000.0
"""Rectified-flow t in [0, 1] reaches the network as 1000·t (spec causal_rcm 1.3)."""


class Block(nnx.Module):
    """One transformer layer (spec wan21 1.2.4)."""

    def __init__(self, c: WanConfig, rngs: nnx.Rngs, placement: Placement = ONE_DEVICE):
        dtype, near = jnp.dtype(c.dtype), nnx.initializers.truncated_normal(1 / math.sqrt(c.dim))
        heads = {"init": near, "dtype": dtype, "implementation": c.attention, "placement": placement, "rngs": rngs}
        self.modulation = nnx.Param(near(rngs.params(), (6, c.dim), jnp.float32))
        self.self_attn = wan.Attention(c.dim, c.heads, c.eps, image=False, **heads)
        self.cross_attn = wan.Attention(c.dim, c.heads, c.eps, image=c.image_dim is not None, **heads)
        self.norm1, self.norm2 = wan.LayerNorm(c.dim, c.eps, dtype), wan.LayerNorm(c.dim, c.eps, dtype)
        self.norm3 = wan.LayerNorm(c.dim, c.eps, dtype, affine=True)
        init = nnx.initializers.xavier_uniform()
        self.ffn = wan.Mlp(c.dim, c.ffn_dim, c.dim, wan.gelu, init=init, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def modulations(self, e):
        """The six (shift, scale, gate) × 2 of time projections e `[batch, frame or 1, 6, channel]`."""
        m = self.modulation[...].astype(e.dtype) + e
        return [m[:, :, i] for i in range(6)]

    def before(self, x, m, table, tokens: int):
        """Queries, keys and values of the self-attention, of the first `tokens` of each frame."""
        return self.self_attn.project(wan.modulate(self.norm1(x), m[0], m[1]).astype(self.dtype), table, tokens)

    def after(self, x, m, sources, q, k, v, **view):
        """The rest of the layer: self-attention in a view of context, cross-attention, feed-forward."""
        x = self._gated(x, self.self_attn.attend(x, q, k, v, **view), m[2])
        x = x + self.cross_attn.cross(self.norm3(x).astype(self.dtype), *sources)
        h = self.ffn(wan.modulate(self.norm2(x), m[3], m[4]).astype(self.dtype))
        return self._gated(x, h, m[5])

    def sources(self, text, image):
        """Keys and values of everything that cross-attention looks at."""
        found = [self.cross_attn.text_keys(text)]
        return found if image is None else [*found, self.cross_attn.image_keys(image)]

    def _gated(self, x, y, gate):
        return (x + y.astype(gate.dtype) * gate[:, :, None]).astype(x.dtype)


class ImageEmbedding(nnx.Module):
    """LayerNorm, Linear, exact GELU, Linear, LayerNorm: CLIP tokens to text-like tokens (Wan2.1 I2V)."""

    def __init__(self, c: WanConfig, rngs: nnx.Rngs):
        dtype, init = jnp.dtype(c.dtype), nnx.initializers.xavier_uniform()
        exact = functools.partial(jax.nn.gelu, approximate=False)
        self.norm_in = wan.LayerNorm(c.image_dim, 1e-5, dtype, affine=True)
        self.mlp = wan.Mlp(c.image_dim, c.image_dim, c.dim, exact, init=init, dtype=dtype, rngs=rngs)
        self.norm_out = wan.LayerNorm(c.dim, 1e-5, dtype, affine=True)

    def __call__(self, image):
        return self.norm_out(self.mlp(self.norm_in(image)))


class Outside(nnx.Module):
    """Everything outside the layers: embeddings of patches, time, text and image, and the head."""

    def __init__(self, c: WanConfig, rngs: nnx.Rngs):
        dtype, high = jnp.dtype(c.dtype), wan.wide(jnp.dtype(c.dtype))
        xavier, small = nnx.initializers.xavier_uniform(), nnx.initializers.normal(0.02)
        patch = math.prod(c.patch)
        make = functools.partial(wan.Mlp, init=small, rngs=rngs)
        self.patch_embedding = wan.Linear(c.in_channels * patch, c.dim, init=xavier, dtype=dtype, rngs=rngs)
        self.time_embedding = make(c.freq_dim, c.dim, c.dim, jax.nn.silu, dtype=high)
        self.time_projection = wan.Linear(c.dim, 6 * c.dim, init=xavier, dtype=high, rngs=rngs)
        self.text_embedding = make(c.text_dim, c.dim, c.dim, wan.gelu, dtype=dtype)
        if c.image_dim is not None:
            self.image_embedding = ImageEmbedding(c, rngs)
        zeros = nnx.initializers.zeros_init()
        self.head = wan.Linear(c.dim, c.out_channels * patch, init=zeros, dtype=high, rngs=rngs)
        modulation = nnx.initializers.truncated_normal(1 / math.sqrt(c.dim))
        self.head_modulation = nnx.Param(modulation(rngs.params(), (2, c.dim), jnp.float32))
        self.head_norm = wan.LayerNorm(c.dim, c.eps, dtype)
        self.config = c

    def tokens(self, x, cond: Condition | Prepared, filled: int):
        """Latents `[batch, frame, height, width, channel]` → tokens `[batch, frame, token, channel]`, those of nothing
        added up to `filled` a frame."""
        if cond.latents is not None:
            x = jnp.concatenate([x, cond.latents.astype(x.dtype)], -1)
        _, ph, pw = self.config.patch
        # Channel slowest within a patch (spec causal_rcm 10.24).
        patches = rearrange(x, "b f (h p) (w q) c -> b f (h w) (c p q)", p=ph, q=pw)
        return self.patch_embedding(fill(patches, 2, filled))

    def time(self, t):
        """Times `[batch, frame or 1]` → (e `[batch, frame, channel]`, its six-way projection)."""
        c = self.config
        high = wan.wide(jnp.dtype(c.dtype))
        position = t.astype(jnp.promote_types(t.dtype, high)) * TIME_SCALE
        if c.round_time:
            position = position.astype(jnp.bfloat16).astype(position.dtype)
        half = c.freq_dim // 2
        # In float64 wherever jax has it enabled, then to the wide dtype.
        angle = position[..., None] * (rope.BASE ** (-jnp.arange(half, dtype=position.dtype) / half))
        e = self.time_embedding(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1).astype(high))
        projected = self.time_projection(jax.nn.silu(e))
        return e, projected.reshape(*projected.shape[:-1], 6, c.dim)

    def embed(self, cond: Condition):
        """(text, image or None) as the layers' cross-attention wants them."""
        if (cond.image is None) != (self.config.image_dim is None):
            raise ValueError("Condition.image and model.image_dim go together: give both (image-to-video) or neither")
        image = None if cond.image is None else self.image_embedding(cond.image)
        return self.text_embedding(cond.text), image

    def velocity(self, x, e, height: int, width: int):
        """Tokens → latents of the clip's (latent) height and width."""
        high = wan.wide(jnp.dtype(self.config.dtype))
        shift, scale = (self.head_modulation[...].astype(high)[i] + e for i in range(2))
        _, ph, pw = self.config.patch
        x = self.head(wan.modulate(self.head_norm(x), shift, scale))[:, :, : (height // ph) * (width // pw)]
        size = {"h": height // ph, "w": width // pw, "p": ph, "q": pw}
        return rearrange(x, "b f (h w) (p q c) -> b f (h p) (w q) c", **size)


@flax.struct.dataclass
class Prepared:
    """A condition as the layers look at it, worked out once for many passes (`WanTransformer.prepare`).

    sources: (keys, values) of the text and, if there is one, of the image, `[layer, batch, token, head, channel]`; of a
        network `apart`, a list of them.
    latents: as in `Condition`.
    """

    sources: list[tuple[jax.Array, jax.Array]]
    latents: jax.Array | None = None


class _Stream(NamedTuple):
    """Tokens on their way through the layers, with the time and the rotation that go with them."""

    x: jax.Array
    e: jax.Array
    projection: jax.Array
    rope: tuple[jax.Array, jax.Array]

    def lie(self, placement: Placement) -> _Stream:
        """The same, held to where it lies between layers."""
        projection = placement.samples(self.projection)
        return self._replace(x=placement.tokens(self.x), e=placement.samples(self.e), projection=projection)


def unstacked(params: Params) -> Params:
    """Parameters with the layers stacked → those of a network `apart`: a list of one tree a layer."""
    leaves, structure = jax.tree.flatten(params["blocks"])
    return {**params, "blocks": [structure.unflatten(layer) for layer in zip(*map(jnp.unstack, leaves))]}


def _entry(lists, i: int):
    """Entry i of every list in a tree of them."""
    return jax.tree.map(lambda x: x[i], lists, is_leaf=lambda x: isinstance(x, list))


class WanTransformer:
    """The network of `config`; causal over `chunks`, or bidirectional where `chunks` is None.

    placement: the mesh that parameters, latents and caches lie on; the same function on any.
    Parameters are `{"outside": …, "blocks": …}` with the layers stacked on the blocks' leading axis. With `apart`,
    blocks and caches are lists of one tree a layer instead (`unstacked`) and the layers are written out in the program:
    it takes longer to compile, and no pass has to cut each layer's weights out of a stack (docs/wan_speed.md).

    Raises ValueError, before anything is computed, for latents that do not divide into patches or chunks, and for heads
    that do not divide over the mesh.
    """

    def __init__(
        self,
        config: WanConfig,
        chunks: ChunkPattern | None = None,
        placement: Placement = ONE_DEVICE,
        *,
        apart: bool = False,
    ):
        placement.check(config.heads)
        self.config, self.chunks, self.placement, self.apart = config, chunks, placement, apart
        self._outside, _ = nnx.split(nnx.eval_shape(lambda: Outside(config, nnx.Rngs(0))))
        self._block, _ = nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0), placement)))

    def __eq__(self, other):
        return isinstance(other, WanTransformer) and self._identity() == other._identity()

    def __hash__(self):
        return hash(self._identity())

    def _identity(self):
        return self.config, self.chunks, self.placement, self.apart

    def init(self, key) -> Params:
        """Random parameters, float32; the head is zero, so a fresh network predicts zero velocity."""

        def tree(module, key):
            return nnx.to_pure_dict(nnx.split(module(self.config, nnx.Rngs(params=key)))[1])

        first, second = jax.random.split(key)
        blocks = jax.vmap(functools.partial(tree, Block))(jax.random.split(second, self.config.layers))
        params = {"outside": tree(Outside, first), "blocks": blocks}
        return unstacked(params) if self.apart else params

    def for_many_passes(self, params, *, gather_once: bool = True) -> tuple[WanTransformer, Params]:
        """This network and its parameters as many short passes without gradients are fastest.

        On GPUs, with the layers `apart`. gather_once: weights that are cut over fsdp are gathered now, a matrix at a
        time, and kept whole in the compute dtype, instead of by every pass.
        """
        placement, apart = self.placement, self.apart or compiler.layers_apart()
        if apart and not self.apart:
            params = unstacked(params)
        if gather_once and placement.gathers:
            blocks = params["blocks"]
            blocks = list(map(self._whole, blocks)) if apart else jax.lax.map(self._whole, blocks)
            params = {"outside": placement.gather(params["outside"], "outside"), "blocks": blocks}
            placement = dataclasses.replace(placement, gathered=True)
        return WanTransformer(self.config, self.chunks, placement, apart=apart), params

    def put_together(self, cache: Cache) -> Cache:
        """A cache of the network that `for_many_passes` gave as this one takes it."""
        if self.apart or not isinstance(cache, list):
            return cache
        return jax.tree.map(lambda *layers: self.placement.cache(jnp.stack(layers)), *cache)

    def velocity(self, params, x, t, cond, *, context=None, cache=None, chunk=None):
        """See `models.base.Network`. x `[batch, frame, height, width, channel]`, t `[batch, frame or 1]`."""
        if context is not None:
            return self._teacher_forcing(params, x, t, cond, *context)
        if cache is not None:
            return self._cached(params, x, t, cond, cache, chunk)[0]
        frames, tokens = x.shape[1], self._tokens_per_frame(x)
        mask = Full()
        if self.chunks is not None:
            self.chunks.count(frames)
            mask = BlockCausal(**self._units(tokens))
        return self._plain(params, x, t, cond, mask)

    def prepare(self, params, cond: Condition) -> Prepared:
        """What `velocity` with a cache, `append` and `velocity_and_append` take in `cond`'s place, to the same result.

        A sampler that makes many passes with one prompt projects its text to every layer's keys and values once.
        """
        text, image = self._embedded(self._outside_of(params), cond)

        def layer(_, params):
            return None, self._block_of(params).sources(text, image)

        return Prepared(self._scan(layer, None, params["blocks"])[1], cond.latents)

    def append(self, params, x, t, cond, cache, *, chunk):
        """See `models.base.Network`."""
        return self._cached(params, x, t, cond, cache, chunk)[1]

    def velocity_and_append(self, params, x, t, cond, cache, *, chunk):
        """Both in one pass: the noisy-context sampler caches its last denoising pass (spec causal_rcm 6.2)."""
        return self._cached(params, x, t, cond, cache, chunk)

    def init_cache(self, batch, latent_shape, dtype=None) -> Cache:
        """Zeros `[layer, batch, token, head, channel]` for clips of latent shape (frames, height, width); `apart`, a
        list of them without the first axis."""
        frames, height, width = latent_shape
        c = self.config
        tokens = frames * (height // c.patch[1]) * (width // c.patch[2])
        shape = (batch, tokens, c.heads, c.head_dim)

        def zeros(*layers):
            empty = lambda: jnp.zeros((*layers, *shape), dtype or jnp.dtype(c.dtype))  # noqa: E731
            return {name: self.placement.cache(empty()) for name in ("k", "v")}

        return [zeros() for _ in range(c.layers)] if self.apart else zeros(c.layers)

    # How each view of context runs through the layers.

    def _plain(self, params, x, t, cond, mask):
        outside = self._outside_of(params)
        text, image = self._embedded(outside, cond)
        tokens = self._tokens_per_frame(x)

        def layer(stream, params):
            block = self._block_of(params)
            m = block.modulations(stream.projection)
            q, k, v = block.before(stream.x, m, stream.rope, tokens)
            return stream._replace(x=block.after(stream.x, m, block.sources(text, image), q, k, v, mask=mask)), None

        stream, _ = self._scan(layer, self._stream(outside, x, t, cond), params["blocks"])
        return self._velocity(outside, stream, x)

    def _teacher_forcing(self, params, x, t, cond, c, t_c):
        frames, tokens = x.shape[1], self._tokens_per_frame(x)
        if self.chunks is None:
            raise ValueError("teacher forcing needs a causal network: give WanTransformer a ChunkPattern")
        if c.shape != x.shape:
            raise ValueError(f"context has shape {c.shape}, the target {x.shape}: teacher forcing pairs equal clips")
        self.chunks.count(frames)
        units = self._units(tokens)
        outside = self._outside_of(params)
        text, image = self._embedded(outside, cond)

        def layer(streams, params):
            context, target = streams
            block = self._block_of(params)
            sources = block.sources(text, image)
            m_c, m = block.modulations(context.projection), block.modulations(target.projection)
            q_c, k_c, v_c = block.before(context.x, m_c, context.rope, tokens)
            q, k, v = block.before(target.x, m, target.rope, tokens)
            y = block.after(target.x, m, sources, q, k, v, context=(k_c, v_c), mask=TeacherForcing(**units))
            y_c = block.after(context.x, m_c, sources, q_c, k_c, v_c, mask=BlockCausal(**units))
            return (context._replace(x=y_c), target._replace(x=y)), None

        streams = self._stream(outside, c, t_c, cond), self._stream(outside, x, t, cond)
        (_, stream), _ = self._scan(layer, streams, params["blocks"])
        return self._velocity(outside, stream, x)

    def _cached(self, params, x, t, cond, cache, chunk):
        if self.chunks is None:
            raise ValueError("a cache needs a causal network: give WanTransformer a ChunkPattern")
        tokens = self._tokens_per_frame(x)
        # Without a chunk, each of a whole clip: a target whose clean context has been through the layers already.
        start = 0 if chunk is None else self.chunks.start(chunk)
        stop = start * tokens
        mask = TeacherForcing(**self._units(tokens)) if chunk is None else self._cached_mask(chunk, tokens)
        outside = self._outside_of(params)
        prepared = cond.sources if isinstance(cond, Prepared) else None
        text, image = self._embedded(outside, cond) if prepared is None else (None, None)
        stream = self._stream(outside, x, t, cond, start, jax.tree.leaves(cache)[0].shape[-3] // tokens)

        def layer(stream, xs):
            params, context, sources = xs[0], (xs[1]["k"], xs[1]["v"]), xs[2]
            block = self._block_of(params)
            m = block.modulations(stream.projection)
            q, k, v = block.before(stream.x, m, stream.rope, tokens)
            sources = block.sources(text, image) if sources is None else sources
            y = block.after(stream.x, m, sources, q, k, v, context=context, mask=mask)
            return stream._replace(x=y), {"k": k, "v": v}

        stream, own = self._scan(layer, stream, (params["blocks"], cache, prepared))

        def write(old, new):
            return self.placement.cache(jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), stop, -3))

        return self._velocity(outside, stream, x), jax.tree.map(write, cache, own)

    def _cached_mask(self, chunk, tokens: int) -> Cached:
        """What chunk `chunk` sees of the cache: everything before it, or its window and sink."""
        p = self.chunks
        stop = p.start(chunk) * tokens
        if not p.window:
            return Cached(stop=stop)
        least, most = (min, max) if isinstance(chunk, int) else (jnp.minimum, jnp.maximum)
        begin = p.start(most(chunk - (p.window - 1), 0)) * tokens
        # The intervals must not overlap, or the sink's keys would count twice.
        return Cached(stop=stop, start=begin, sink=least(p.start(p.sink) * tokens, begin))

    # Small parts.

    def _outside_of(self, params) -> Outside:
        return nnx.merge(self._outside, self.placement.gather(params["outside"], "outside"))

    def _block_of(self, params) -> Block:
        """The layer of one slice of the blocks; called within it, so that the backward pass gathers weights again."""
        return nnx.merge(self._block, self._whole(params))

    def _whole(self, params):
        """The weights of one slice of the blocks, gathered in the compute dtype."""
        return self.placement.gather(params, "blocks/0", jnp.dtype(self.config.dtype))

    def _embedded(self, outside: Outside, cond: Condition):
        return jax.tree.map(self.placement.samples, outside.embed(cond))

    def _velocity(self, outside: Outside, stream: _Stream, x):
        return self.placement.samples(outside.velocity(stream.x, stream.e, *x.shape[2:4]))

    def _scan(self, body, carry, xs):
        def lie(streams):
            return jax.tree.map(lambda s: s.lie(self.placement), streams, is_leaf=lambda s: isinstance(s, _Stream))

        def layer(carry, xs):
            carry, out = body(lie(carry), xs)
            return lie(carry), out

        layer = remat(layer, self.config.remat, gathers=self.placement.gathers)
        if not self.apart:
            return jax.lax.scan(layer, carry, xs)
        # Traced and lowered once: kernels' lowering is what takes long.
        ys, layer = [], jax.jit(layer)
        for i in range(self.config.layers):
            carry, y = layer(carry, _entry(xs, i))
            ys.append(y)
        return carry, ys

    def _stream(self, outside: Outside, x, t, cond: Condition | Prepared, start=0, total: int | None = None) -> _Stream:
        """x on its way in; its first frame is frame `start` (maybe traced) of a clip of `total` frames."""
        frames, height, width = x.shape[1:4]
        _, ph, pw = self.config.patch
        high = wan.wide(jnp.dtype(self.config.dtype))
        turn = rope.table(start, frames, total or frames, height // ph, width // pw, self.config.head_dim, high)
        filled = self.placement.filled(self._tokens_per_frame(x), frames)
        tokens = outside.tokens(self.placement.samples(x), cond, filled)
        return _Stream(tokens, *outside.time(t), tuple(fill(table, 1, filled) for table in turn))

    def _tokens_per_frame(self, x) -> int:
        _, ph, pw = self.config.patch
        height, width = x.shape[2:4]
        if height % ph or width % pw:
            raise ValueError(f"latents of {height}×{width} do not divide into patches of {ph}×{pw}")
        return (height // ph) * (width // pw)

    def _units(self, tokens: int) -> dict[str, int]:
        """The chunk pattern in the attention mask's units: tokens and chunks."""
        p = self.chunks
        return {"first": p.first * tokens, "chunk": p.size * tokens, "window": p.window, "sink": p.sink}
