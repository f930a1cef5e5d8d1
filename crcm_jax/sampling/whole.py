"""Samplers of the whole clip at once, for bidirectional networks: Euler and UniPC (spec causal_rcm 6.4).

Times decrease from near 1 to exactly 0, the last step landing there. In flow time α = 1 − t and σ = t; UniPC works in
λ = log(α/σ) with the predictions of x0, m = x − t·v. Everything that depends on times alone is worked out on the host
in float64, so that the device sees a short table of coefficients.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import compiler, flow
from crcm_jax.models.base import Condition
from crcm_jax.models.bound import Bound
from crcm_jax.sampling.schedule import decreasing, multi_step

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
"""(latents, scalar time) → velocity, in at least float32."""


def teacher_times(steps: int = 50, s: float = 5.0, sigma_max: float = 5000.0) -> tuple[float, ...]:
    """steps+1 times from σmax/(σmax+1) to 0, with the teacher's defaults."""
    return multi_step(steps, s, sigma_max)


class _Row(NamedTuple):
    """Coefficients of one step: the correction on entering it, then the prediction of the next sample.

    corrected = `keep`·x_before + Σ `correct`·(m_now, m_1, m_2), where m_1 is the prediction one step before;
    predicted = `carry`·x + Σ `predict`·(m_now, m_1).
    """

    keep: np.ndarray
    correct: np.ndarray
    carry: np.ndarray
    predict: np.ndarray


def unipc_table(times: Sequence[float]) -> _Row:
    """The coefficients of second-order UniPC (bh2, predicting x0) along decreasing `times` that end in 0.

    The first step is of order one for want of history, the last one is forced to it and returns the prediction of x0. A
    corrector has the order of the predictor before it. The first row's correction is the identity and is not used.
    ValueError if the times do not decrease to 0.
    """
    times = decreasing(times)
    if times[-1] != 0 or times[0] >= 1 or len(times) < 2:
        raise ValueError(f"UniPC's times must start below 1 and end in 0, not run from {times[0]} to {times[-1]}")
    n = len(times) - 1
    # As the network gets them: near 1, what float32 leaves of 1 − t decides λ.
    t = np.asarray(times, np.float32).astype(np.float64)
    with np.errstate(divide="ignore"):
        λ = np.log1p(-t) - np.log(t)
    rows = _Row(np.zeros(n), np.zeros((n, 3)), np.zeros(n), np.zeros((n, 2)))
    order = [1 if i == 0 or i == n - 1 else 2 for i in range(n)]
    for i in range(n):
        if i:
            rows.keep[i], rows.correct[i] = _corrector(t, λ, i, order[i - 1])
        rows.carry[i], rows.predict[i] = _predictor(t, λ, i, order[i])
    return rows


def _predictor(t, λ, i, order):
    """From t_i to t_{i+1}: how much of the sample stays, and the weights of (m_i, m_{i−1})."""
    now, after = t[i], t[i + 1]
    if after == 0:
        return 0.0, np.array([1.0, 0.0])
    b = math.expm1(-(λ[i + 1] - λ[i]))
    weights = np.array([-(1 - after) * b, 0.0])
    if order == 2:
        half = -(1 - after) * b * 0.5 / ((λ[i - 1] - λ[i]) / (λ[i + 1] - λ[i]))
        weights += [-half, half]
    return after / now, weights


def _corrector(t, λ, i, order):
    """The sample at t_i again: how much of the one at t_{i−1} stays, and the weights of (m_i, m_{i−1}, m_{i−2})."""
    before, now = t[i - 1], t[i]
    h = λ[i] - λ[i - 1]
    b = math.expm1(-h)
    scale = -(1 - now) * b
    if order == 1:
        return now / before, scale * np.array([0.5, 0.5, 0.0])
    r = (λ[i - 2] - λ[i - 1]) / h
    q = -h
    c1 = b / q - 1
    c2 = c1 / q - 0.5
    ρ1, ρ2 = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), np.array([c1, 2 * c2]) / b)
    return now / before, scale * np.array([ρ2, 1 - ρ2 - ρ1 / r, ρ1 / r])


class _Steps(NamedTuple):
    """A solver along given times.

    `begin(noise)` is its state, a tuple with the sample first; `step(velocity, i, state)` is the state after step i,
    which may be traced.
    """

    begin: Callable[[jax.Array], tuple]
    step: Callable[[Velocity, Any, tuple], tuple]


def _euler(times: Sequence[float]) -> _Steps:
    times = jnp.asarray(times, jnp.float32)

    def step(velocity, i, state):
        (x,) = state
        return (flow.euler(x, velocity(x, times[i]), times[i], times[i + 1]),)

    return _Steps(lambda x: (x,), step)


def _unipc(times: Sequence[float]) -> _Steps:
    rows = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), unipc_table(times))
    times = jnp.asarray(times, jnp.float32)

    def begin(x):
        zeros = jnp.zeros_like(x)
        return x, zeros, zeros, zeros

    def step(velocity, i, state):
        x, before, m1, m2 = state
        m = flow.to_clean(x, velocity(x, times[i]), times[i])
        keep, (a, b, c) = rows.keep[i], rows.correct[i]
        x = jnp.where(i > 0, keep * before + a * m + b * m1 + c * m2, x)
        after = rows.carry[i] * x + rows.predict[i, 0] * m + rows.predict[i, 1] * m1
        return after, x, m, m1

    return _Steps(begin, step)


_SOLVERS = {"unipc": _unipc, "euler": _euler}
SOLVERS = tuple(_SOLVERS)


def _steps(solver: str, times: Sequence[float]) -> _Steps:
    if solver not in _SOLVERS:
        raise ValueError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}")
    return _SOLVERS[solver](times)


def solve(solver: str, velocity: Velocity, x: jax.Array, times: Sequence[float]) -> jax.Array:
    """The end of dx/dt = v along `times` from noise x, not scaled, with one evaluation of `velocity` a step.

    solver: "euler", or "unipc" for second-order UniPC (see `unipc_table`), whose predictions are not worked out again
    after the correction of their sample. ValueError for another one.
    """
    begin, step = _steps(solver, times)
    return jax.lax.fori_loop(0, len(times) - 1, lambda i, state: step(velocity, i, state), begin(x))[0]


@dataclasses.dataclass(frozen=True)
class Whole:
    """How a bidirectional diffusion model makes a clip: all frames at once, in many steps (spec causal_rcm 6.4)."""

    solver: str = "unipc"
    steps: int = 50
    shift: float = 5.0
    sigma_max: float = 5000.0

    distilled = False
    draws = 0

    @property
    def times(self) -> tuple[float, ...]:
        """steps + 1 times, the last one 0."""
        return teacher_times(self.steps, self.shift, self.sigma_max)

    def describe(self) -> str:
        """A few words for people."""
        return f"the whole clip at once, {self.solver}, {self.steps} steps, shift {self.shift:g}"


def denoise_whole(
    model: Bound, cond: Condition, noise: jax.Array, *, times: Sequence[float], solver: str = "unipc",
    uncond: Condition | None = None, guidance: float = 5.0,
) -> Iterator[jax.Array]:  # fmt: skip
    """The clip's latents after every step of a bidirectional network's probability-flow ODE.

    noise: `[batch, frame, height, width, channel]`, unit variance; times: for example `teacher_times()`; guidance: as
    in `Bound.guided`. One program, called once a step. ValueError for an unknown solver.
    """
    where = jnp.asarray(noise).sharding
    state = jax.device_put(_steps(solver, times).begin(noise), where)
    step = _program(tuple(times), solver, guidance, where)
    for i in range(len(times) - 1):
        state = step(model, cond, uncond, i, state)
        yield state[0]


@functools.lru_cache(maxsize=8)
def _program(times, solver, guidance, where):
    """One step. Its state stays where it is: left to the compiler it would move, and be another program's input."""

    def step(model, cond, uncond, i, state):
        return _steps(solver, times).step(_velocity(model, cond, uncond, guidance), i, state)

    return jax.jit(step, out_shardings=where, compiler_options=compiler.options())


def _velocity(model: Bound, cond, uncond, guidance) -> Velocity:
    def velocity(x, t):
        v = model.guided(x, jnp.broadcast_to(t, (1, 1)), cond, uncond, guidance)
        return v.astype(x.dtype)

    return velocity


@functools.partial(jax.jit, static_argnames=("times", "solver", "guidance"))
def generate_whole(
    model: Bound, cond: Condition, noise: jax.Array, *, times: tuple[float, ...], solver: str = "unipc",
    uncond: Condition | None = None, guidance: float = 5.0,
) -> jax.Array:  # fmt: skip
    """The last of `denoise_whole`, as one program."""
    return solve(solver, _velocity(model, cond, uncond, guidance), noise, times)
