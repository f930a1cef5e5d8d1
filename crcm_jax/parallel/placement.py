"""How a network's activations lie on a mesh, and how its weights come to them.

Samples are cut over data and fsdp. Between attentions the tokens *of each frame* are cut over context, so that every
frame, chunk and rollout is balanced and whatever is per frame stays whole; within self-attention the heads are, over
tensor and context (Ulysses: an all-to-all before, one after). Weights lie cut over fsdp and are gathered a layer at a
time; their gradients go back into the pieces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crcm_jax.parallel import rules
from pallas_kernels.attention.mask import entries

SAMPLES = ("data", "fsdp")
"""The axes over which a batch is cut."""
TOKENS = "context"
"""The axis over which the tokens of a frame are cut."""
HEADS = "tensor"
"""The axis over which heads and feed-forward width are cut; in self-attention heads are cut over TOKENS as well."""


ALIGNED = 8
"""Of how many tokens a device's share of a clip is a multiple. cuBLAS's fast kernels take bfloat16 matrices whose sides
are; where they are not, XLA copies every matrix into one whose sides are, before every product."""


def indivisible(shape: Mapping[str, int], heads: int | None, kv_heads: int | None = None) -> str | None:
    """That a mesh of `shape` cannot cut so many heads, as a sentence's beginning; or None.

    heads: of queries, kv_heads: of keys and values, where there are fewer; None leaves one out.
    """
    across = shape[HEADS] * shape[TOKENS]
    cut = f"mesh.{HEADS}={across}" if shape[TOKENS] == 1 else f"mesh.{HEADS} × mesh.{TOKENS} = {across}"
    for count, kind in ((heads, "heads"), (kv_heads, "key/value heads")):
        if count is not None and count % across:
            return f"{cut} does not divide the {count} {kind}"
    return None


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh with the axes of `mesh.AXES`, or None for one device, where every method leaves things as they are.

    A batch that does not divide over its axes stays whole on them: right, and the same work done by each.
    gathered: weights have been gathered by whoever passes them, and are taken as they come.
    """

    mesh: Mesh | None = None
    gathered: bool = False

    def __post_init__(self):
        if self.mesh is not None and self.mesh.size == 1:
            object.__setattr__(self, "mesh", None)

    def check(self, heads: int | None, kv_heads: int | None = None) -> None:
        """ValueError where so many heads, of queries or of keys and values, cannot be cut over the mesh."""
        if self.mesh is not None and (lack := indivisible(self.mesh.shape, heads, kv_heads)):
            raise ValueError(f"{lack}: use a divisor")

    # Activations.

    def samples(self, x):
        """x `[batch, …]`, cut by samples and whole otherwise."""
        return self._pin(x, P(self._over_samples(x.shape[0])))

    def tokens(self, x):
        """x `[batch, frame, token, …]`, as it lies between attentions."""
        return self._pin(x, P(self._over_samples(x.shape[0]), None, TOKENS))

    def filled(self, tokens: int, frames: int) -> int:
        """How many tokens a frame of a clip has between attentions, of which the first `tokens` count.

        Each device gets equally many, and of the clip a multiple of `ALIGNED`.
        """
        if self.mesh is None or self._tokens_whole():
            return tokens
        devices = self.mesh.shape[TOKENS]
        share = -(-tokens // devices)
        while share * frames % ALIGNED:
            share += 1
        return share * devices

    def cache(self, x):
        """Keys or values `[…, batch, token, key/value head, channel]`, cut by heads: no pass against them gathers any.

        ValueError where the heads do not divide over the mesh.
        """
        self.check(None, x.shape[-2])
        return self._pin(x, P(*[None] * (x.ndim - 4), *self._by_heads(x.shape[-4])))

    def to_heads(self, x, tokens: int):
        """`[batch, frame, token, head, channel]`, tokens cut → `[batch, frame·token, head, channel]`, heads cut, of the
        first `tokens` of each frame."""
        if self._tokens_whole():
            return _flat(x)

        def exchange(x):
            return _flat(jax.lax.all_to_all(x, TOKENS, 3, 2, tiled=True)[:, :, :tokens])

        samples = self._over_samples(x.shape[0])
        return self._map(exchange, (P(samples, None, TOKENS, HEADS),), self._by_heads(x.shape[0]))(x)

    def to_tokens(self, x, frames: int, filled: int):
        """The inverse of `to_heads` for a clip of `frames`, with zeros up to `filled` tokens a frame."""

        def unflat(x):
            return x.reshape(x.shape[0], frames, -1, *x.shape[2:])

        if self._tokens_whole():
            return unflat(x)

        def exchange(x):
            return jax.lax.all_to_all(pad_to(unflat(x), 2, filled), TOKENS, 2, 3, tiled=True)

        samples = self._over_samples(x.shape[0])
        return self._map(exchange, (self._by_heads(x.shape[0]),), P(samples, None, TOKENS, HEADS))(x)

    def attend(self, attention: Callable, q, k, v, *, context=None, mask):
        """`attention(q, k, v, context=…, mask=…)` of each device's samples and heads, as `to_heads` has laid them.

        The compiler cannot cut a kernel's call, so that each device makes a call of its own. What a mask holds for each
        sample is cut as samples are. ValueError where heads do not divide over the mesh, or a mask fits another batch.
        """
        if self.mesh is None:
            return attention(q, k, v, context=context, mask=mask)
        self.check(q.shape[2], k.shape[2])
        values, structure, by_entry = entries(mask, q.shape[0])
        samples = self._over_samples(q.shape[0])
        # A mask of integers stays one, for kernels to plan with; traced and cut values are arguments like any other.
        moves = [
            any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)) or (each and samples is not None)
            for x, each in zip(values, by_entry)
        ]
        moving = [jnp.asarray(x) for x, move in zip(values, moves) if move]
        specs = [P(samples) if each else P() for each, move in zip(by_entry, moves) if move]

        def local(arrays, moving):
            q, k, v, context = arrays
            moving = iter(moving)
            mask = structure.unflatten([next(moving) if move else x for x, move in zip(values, moves)])
            return attention(q, k, v, context=context, mask=mask)

        by_heads = self._by_heads(q.shape[0])
        return self._map(local, (by_heads, specs), by_heads)((q, k, v, context), moving)

    def attend_across(self, attention: Callable, q, k, v):
        """`attention(q, k, v)` of tokens q `[batch, frame, token, head, channel]`, cut, over the keys of a text or
        image, `[batch, token, head, channel]`; shaped like q."""

        def local(q, k, v):
            return attention(_flat(q), k, v).reshape(q.shape)

        if self.mesh is None:
            return local(q, k, v)
        samples = self._over_samples(q.shape[0])
        queries, keys = P(samples, None, TOKENS, HEADS), P(samples, None, HEADS)
        return self._map(local, (queries, keys, keys), queries)(q, k, v)

    # Weights.

    @property
    def gathers(self) -> bool:
        """Whether weights lie cut and are gathered where they are used."""
        return self.mesh is not None and self.mesh.shape["fsdp"] > 1 and not self.gathered

    def gather(self, params: Any, name: str, table: rules.Table, dtype=None):
        """The weights of one layer, or of what is outside the layers, whole but for tensor.

        params: a tree whose leaves' names, after `name`, are those that `table` knows.
        dtype: what matrices are cast to before they travel, or None to leave them as they are.
        """
        mesh = self.mesh
        if mesh is None or self.gathered:
            return params

        layout = rules.Layout(mesh, table)

        def leaf(path, x):
            of = f"{name}/{rules.leaf_name(path)}", x.shape
            (cut, _), (pieces, _) = layout.spec(*of), layout.spec(*of, pieces=True)
            if cut == pieces and "fsdp" not in cut:
                return x
            whole = P(*(None if axis == "fsdp" else axis for axis in cut))
            # The transpose of a plain constraint would be the same one: a gradient held whole on every device.
            gather, scatter = (lambda _, x, to=to: self._pin(x, to) for to in (whole, pieces))
            return linear_call(gather, scatter, (), self._pin(x if dtype is None else x.astype(dtype), cut))

        return jax.tree_util.tree_map_with_path(leaf, params)

    # Small parts.

    def _over_samples(self, batch: int):
        if self.mesh is None or batch % (self.mesh.shape[SAMPLES[0]] * self.mesh.shape[SAMPLES[1]]):
            return None
        return SAMPLES

    def _by_heads(self, batch: int) -> P:
        return P(self._over_samples(batch), None, (HEADS, TOKENS))

    def _tokens_whole(self) -> bool:
        return self.mesh is None or self.mesh.shape[TOKENS] == 1

    def _pin(self, x, spec: P):
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def _map(self, function, in_specs, out_specs):
        # Kernel calls do not say how their results vary over the mesh, so it cannot be checked.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


ONE_DEVICE = Placement()


def pad_to(x, axis: int, length: int):
    """x with zeros at the end of an axis, to that length."""
    return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])


def _flat(x):
    """Frames and tokens as one axis."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])
