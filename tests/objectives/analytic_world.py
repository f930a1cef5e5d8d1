"""A world where everything is known: data are Gaussian, so velocity, trajectories and consistency function are closed.

A clip has F frames of one pixel and C independent channels; over frames a channel is N(μ, Σ) with AR(1) covariance.
Observing y = (1−t)·x0 + t·ε of some frames, at a time of its own for each, is linear with Gaussian noise, so
E[ε − x0 | y] is linear in y. Given its context, a chunk at one time t is N(m, S) in the clean, and its probability-flow
ODE scales every eigenvector of S by itself: x_s = (1−s)·m + √(((1−s)²S + s²)/((1−t)²S + t²))·(x_t − (1−t)·m).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from nets import Simple, put

from crcm_jax.chunks import ChunkPattern
from crcm_jax.models.base import ITSELF, Condition, OnCache, TeacherForcing

FRAMES, CHANNELS = 4, 2
SHAPE = (FRAMES, 1, 1, CHANNELS)


@dataclasses.dataclass(frozen=True)
class World:
    """N(μ, Σ) over frames, the same for every channel."""

    correlation: float = 0.7
    deviation: float = 0.6
    offset: float = 0.0

    @property
    def mean(self):
        return np.linspace(-0.5, 1.0, FRAMES) + self.offset

    @property
    def covariance(self):
        f = np.arange(FRAMES)
        return self.deviation**2 * self.correlation ** np.abs(f[:, None] - f[None])

    def draw(self, seed, batch):
        """Clips `[batch, frame, 1, 1, channel]`, float64."""
        z = np.random.default_rng(seed).normal(size=(batch, CHANNELS, FRAMES))
        x = self.mean + z @ np.linalg.cholesky(self.covariance).T
        return jnp.asarray(x.transpose(0, 2, 1).reshape(batch, *SHAPE))


def zero_params():
    """The closed form itself; any other value of any of these is wrong."""
    return {name: jnp.zeros((), jnp.float64) for name in ("scale", "shift", "gain", "memory")}


def wrong_params(name, by=0.2):
    """All but one parameter right; of the closed form's types, weak ones too, so that no program compiles again."""
    return {**zero_params(), name: jnp.asarray(by, jnp.float64)}


def condition(batch) -> Condition:
    return Condition({"text": jnp.zeros((batch, 1, 1))})


@dataclasses.dataclass(frozen=True)
class AnalyticNetwork(Simple):
    """The closed form v*, perturbed: (1 + scale)·v* + shift + gain·x + memory·(mean of the chunk given its context).

    consistency: v* is (x − f)/t, f the consistency function, instead of the velocity of the probability flow.
    chunks: None for a network that sees the whole clip at once.
    """

    chunks: ChunkPattern | None = None
    consistency: bool = False
    world: World = World()

    def init(self, key):
        return zero_params()

    def cache(self, batch, shape, policy=None, storage=None):
        return {"x": jnp.zeros((batch, *SHAPE), jnp.float64), "t": jnp.zeros((batch, FRAMES), jnp.float64)}

    def write(self, params, x, t, prepared, cache, chunk):
        v = self.velocity(params, x, t, prepared, OnCache(cache, chunk))
        return v, put(cache, self.chunks, x, t, chunk)

    def velocity(self, params, x, t, prepared, view=ITSELF):
        batch = x.shape[0]
        # Times are drawn in float32; the closed form is exact only if 1 − t is not rounded to it.
        t = jnp.broadcast_to(t, x.shape[:2]).astype(jnp.float64)
        if isinstance(view, OnCache):
            return self._chunk(params, x, t, view.cache["x"], view.cache["t"], self.chunks.start(view.chunk))
        if self.chunks is None:
            nothing = jnp.zeros_like(x), jnp.ones((batch, FRAMES))
            return self._chunk(params, x, t, *nothing, 0)
        c, t_c = (view.context, view.times) if isinstance(view, TeacherForcing) else (x, t)
        t_c = jnp.broadcast_to(t_c, (batch, FRAMES)).astype(jnp.float64)
        parts = [self._chunk(params, x[:, s], t[:, s], c, t_c, s.start) for s in self.chunks.spans(FRAMES)]
        return jnp.concatenate(parts, 1)

    def _chunk(self, params, x, t, c, t_c, start):
        """The velocity of frames start, start+1, … given the context's frames before them."""
        shape, n = x.shape, x.shape[1]
        x, c = (u.reshape(*u.shape[:2], CHANNELS) for u in (x, c))
        own = start + jnp.arange(n)
        # A frame at t = 1 is pure noise and says nothing: so are those that may not be seen.
        hidden = jnp.arange(FRAMES) >= start
        t_c = jnp.where(hidden, 1.0, t_c)
        c = jnp.where(hidden[:, None], 0.0, c)
        mean, prior = self._given(c, t_c, jnp.arange(FRAMES), own)
        if self.consistency:
            v = (x - consistency_function(x, t, mean, prior)) / t[..., None]
        else:
            index = jnp.concatenate([jnp.arange(FRAMES), own])
            v = self._velocity(jnp.concatenate([c, x], 1), jnp.concatenate([t_c, t], 1), index, n)
        v = (1 + params["scale"]) * v + params["shift"] + params["gain"] * x + params["memory"] * mean
        return v.reshape(shape)

    def _given(self, y, t, seen, wanted):
        """Mean `[batch, n, channel]` and covariance `[batch, n, n]` of the clean frames `wanted` given y."""
        sigma, mu = jnp.asarray(self.world.covariance), jnp.asarray(self.world.mean)
        gain = self._gain(sigma[wanted][:, seen] * (1 - t)[:, None], t, seen)
        mean = mu[wanted][:, None] + gain @ (y - ((1 - t) * mu[seen])[..., None])
        reduced = gain @ (sigma[seen][:, wanted] * (1 - t)[..., None])
        return mean, sigma[wanted][:, wanted] - reduced

    def _velocity(self, y, t, index, n):
        """E[ε − x0 | y] of the last n frames observed."""
        sigma, mu = jnp.asarray(self.world.covariance), jnp.asarray(self.world.mean)
        cross = jax.vmap(jnp.diag)(t) - sigma[index][:, index] * (1 - t)[:, None]
        residual = y - ((1 - t) * mu[index])[..., None]
        return -mu[index[-n:]][:, None] + self._gain(cross[:, -n:], t, index) @ residual

    def _gain(self, cross, t, index):
        """cross · Cov(y)⁻¹."""
        sigma = jnp.asarray(self.world.covariance)[index][:, index]
        cov = (1 - t)[:, :, None] * sigma * (1 - t)[:, None] + jax.vmap(jnp.diag)(t**2)
        return solve(cov, cross.swapaxes(1, 2)).swapaxes(1, 2)


def solve(a, b):
    """a⁻¹·b of positive definite a, by elimination: batches of LAPACK calls can hang on a machine of two cores."""
    n = a.shape[-1]

    def eliminate(i, rows):
        pivot = rows[..., i, :] / rows[..., i, i, None]
        rest = rows - rows[..., :, i, None] * pivot[..., None, :]
        return jnp.where((jnp.arange(n) == i)[:, None], pivot[..., None, :], rest)

    return jax.lax.fori_loop(0, n, eliminate, jnp.concatenate([a, b], -1))[..., n:]


def consistency_function(x, t, mean, prior):
    """Where the probability flow takes x at time t (the first frame's) to at time 0."""
    return flow_along(x, t[:, :1, None], 0.0, mean, prior)


def flow_along(x, t, s, mean, prior):
    """x at time t → the same trajectory at time s. x `[batch, frame, channel]`, t `[batch, 1, 1]`, prior its S."""
    # Every sample's context has the same times, hence the same S.
    values, vectors = jnp.linalg.eigh(prior[0])
    values = values[:, None]
    z = vectors.T @ (x - (1 - t) * mean)
    stretch = jnp.sqrt(((1 - s) ** 2 * values + s**2) / ((1 - t) ** 2 * values + t**2))
    return (1 - s) * mean + vectors @ (stretch * z)


def assert_minimum(losses, wrong=0.2, sigmas=4.0, power=12.0, names=("scale", "shift", "gain", "memory")):
    """The closed form is stationary within `sigmas` standard errors, and no neighbour along a parameter is."""
    gradient = tiny.jit(jax.jacfwd(losses))

    def statistics(params):
        each = {name: np.asarray(g) for name, g in gradient(params).items()}
        return {name: (g.mean(), g.std() / np.sqrt(len(g))) for name, g in each.items()}

    for name, (mean, error) in statistics(zero_params()).items():
        assert abs(mean) < sigmas * error + 1e-12, f"{name}: {mean} ± {error}"
    for name in names:
        mean, error = statistics(wrong_params(name, wrong))[name]
        assert mean > power * error, f"{name} off by {wrong}: {mean} ± {error}"
