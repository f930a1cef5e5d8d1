"""A network with its parameters, and one with its prompt: what objectives and samplers hold."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from crcm_jax.cache import FULL, PLAIN, CachePolicy, Storage
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import ITSELF, Condition, Network, OnCache, Params, Prepared, View


class Bound(flax.struct.PyTreeNode):
    """A network and its parameters, which are differentiated, frozen or replaced as one value."""

    network: Network = flax.struct.field(pytree_node=False)
    params: Params

    @property
    def chunks(self) -> ChunkPattern:
        """The pattern of a causal network; ValueError of a bidirectional one."""
        if self.network.chunks is None:
            raise ValueError("this needs a causal network, and one without a chunk pattern is bidirectional")
        return self.network.chunks

    def velocity(self, x, t, cond: Condition, view: View = ITSELF) -> jax.Array:
        """Velocity of x `[batch, frame, height, width, channel]` at times t `[batch or 1, frame or 1]`: one pass."""
        prepared = self.network.condition(self.params, cond, many=False)
        return self.network.velocity(self.params, x, t, prepared, view)

    def guided(self, x, t, cond: Condition, uncond: Condition | None, scale: float, view: View = ITSELF) -> jax.Array:
        """v_u + scale·(v_c − v_u) (spec causal_rcm 1.5), or plain velocity where scale ≤ 1 or there is no `uncond`.

        Both branches are one batch of twice the size, or two passes where their prompts' shapes differ.
        """
        if scale <= 1 or uncond is None:
            return self.velocity(x, t, cond, view)
        batch, uncond = x.shape[0], completed(uncond, cond)
        if not alike(cond, uncond):
            v_u = self.velocity(x, t, spread(uncond, batch), view)
            return combine(self.velocity(x, t, cond, view), v_u, scale)

        def twice(leaf):
            return leaf if leaf.shape[0] == 1 and batch > 1 else jnp.concatenate([leaf, leaf])

        v = self.velocity(twice(x), twice(jnp.asarray(t)), both(cond, uncond), jax.tree.map(twice, view))
        return combine(v[:batch], v[batch:], scale)

    def frozen(self) -> Bound:
        """The same, with parameters that nothing differentiates."""
        return self.replace(params=jax.lax.stop_gradient(self.params))

    def for_inference(self, *, gather_once: bool = True) -> Bound:
        """The same, frozen, in the form in which many short passes are fastest (`Network.for_inference`)."""
        return Bound(*self.network.for_inference(self.frozen().params, gather_once=gather_once))

    def prompted(self, cond: Condition, uncond: Condition | None = None, scale: float = 1.0) -> Prompted:
        """The network with a prompt worked through for many passes, guided if scale > 1 and there is an `uncond`."""
        prepare = self.network.condition
        if scale <= 1 or uncond is None:
            return Prompted(self, (prepare(self.params, cond),), 1.0, 1)
        uncond = completed(uncond, cond)
        if alike(cond, uncond):
            return Prompted(self, (prepare(self.params, both(cond, uncond)),), scale, 2)
        batch = jax.tree.leaves(cond.prompt)[0].shape[0]
        return Prompted(self, tuple(prepare(self.params, c) for c in (cond, spread(uncond, batch))), scale, 2)


class Prompted(flax.struct.PyTreeNode):
    """A network that has heard its prompt: what all passes of a rollout or a stream share.

    prepared: one condition; guided, one with both branches in its batch, or one a branch where shapes differ. Guided,
    caches hold both branches as `prepared` does. x, t and velocities are always those of one branch.
    """

    bound: Bound
    prepared: tuple[Prepared, ...]
    scale: float = flax.struct.field(pytree_node=False)
    branches: int = flax.struct.field(pytree_node=False)

    def cache(
        self, batch: int, shape: tuple[int, int, int], policy: CachePolicy = FULL, storage: Storage = PLAIN
    ) -> tuple[Any, ...]:
        """Empty caches for `batch` clips of latent shape (frame, height, width)."""
        rows = batch * self.branches // len(self.prepared)
        return tuple(self.bound.network.cache(rows, shape, policy, storage) for _ in self.prepared)

    def on(self, frames: dict[str, jax.Array], given: jax.Array | None = None) -> Prompted:
        """The same prompt with what accompanies other frames, `[batch, frame, …]`."""
        frames, given = jax.tree.map(self._rows, (frames, given))
        return self.replace(prepared=tuple(p.replace(frames=frames, given=given) for p in self.prepared))

    def velocity(self, x, t, cache: tuple[Any, ...], chunk) -> jax.Array:
        """The (guided) velocity of chunk `chunk` on its caches."""
        network, params = self.bound.network, self.bound.params
        x, t = self._rows(x), self._times(t)
        return self._merge([network.velocity(params, x, t, p, OnCache(c, chunk)) for p, c in zip(self.prepared, cache)])

    def write(self, x, t, cache: tuple[Any, ...], chunk) -> tuple[jax.Array, tuple[Any, ...]]:
        """The (guided) velocity of chunk `chunk`, and the caches with it."""
        network, params = self.bound.network, self.bound.params
        x, t = self._rows(x), self._times(t)
        vs, caches = zip(*(network.write(params, x, t, p, c, chunk) for p, c in zip(self.prepared, cache)))
        return self._merge(list(vs)), caches

    def _rows(self, leaf):
        """One branch's rows as the passes take them: once more for the other branch, where one batch holds both."""
        return leaf if len(self.prepared) == self.branches else jnp.concatenate([leaf, leaf])

    def _times(self, t):
        """As `_rows`; times of one row serve both branches."""
        return t if t.shape[0] == 1 else self._rows(t)

    def _merge(self, velocities: list[jax.Array]) -> jax.Array:
        if self.branches == 1:
            return velocities[0]
        v_cond, v_uncond = velocities if len(velocities) == 2 else jnp.split(velocities[0], 2)
        return combine(v_cond, v_uncond, self.scale)


def combine(v_cond, v_uncond, scale: float):
    """Guidance of two velocities, in at least float32."""
    v_cond, v_uncond = (v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in (v_cond, v_uncond))
    return v_uncond + scale * (v_cond - v_uncond)


def alike(cond: Condition, uncond: Condition) -> bool:
    """Whether two conditions differ in nothing but their rows, so that one batch can hold both."""

    def shapes(c):
        return jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), c)

    same: bool = jax.tree.structure(cond) == jax.tree.structure(uncond)  # type: ignore[operator]  # compares to bool
    return same and shapes(cond) == shapes(uncond)


def completed(uncond: Condition, cond: Condition) -> Condition:
    """A negative condition with `cond`'s frames, where it has none of its own, and with its given frames."""
    return uncond.replace(given=cond.given) if uncond.frames else cond.replace(prompt=uncond.prompt)


def spread(cond: Condition, batch: int) -> Condition:
    """A condition of one row for a whole batch."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape[1:])), cond)


def both(cond: Condition, uncond: Condition) -> Condition:
    """A condition and a negative one in one batch of twice the size."""
    return jax.tree.map(lambda c, u: jnp.concatenate([c, jnp.broadcast_to(u, c.shape)]), cond, uncond)
