"""Timing on a device that runs behind the caller's back.

Short functions: many calls per synchronisation, the median of several. Long ones: the fastest of a few.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np


def milliseconds(function, *args, budget: float = 0.25, repeats: int = 5) -> float:
    """Median time of `function(*args)`, compiled once; about `budget` seconds of calls a repeat, at least three."""
    function = jax.jit(function)
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    calls = int(np.clip(budget / max(time.perf_counter() - start, 1e-6), 3, 100))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return 1e3 * float(np.median(times))


def seconds(function, repeats: int) -> float:
    """The fastest of `repeats` calls, after one that is not timed."""
    return first_and_best(function, repeats)[1]


def first_and_best(function, repeats: int) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and of the fastest of `repeats` calls after it."""
    took = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        took.append(time.perf_counter() - start)
    return took[0], min(took[1:])


def draw(case, dtype, seed: int = 0, scale: float = 1.0):
    """Random inputs of a case: {"q": …, "own": (k, v), "context": (k, v)}."""
    keys = iter(jax.random.split(jax.random.key(seed), 5))

    def normal(tokens, heads):
        return scale * jax.random.normal(next(keys), (case.batch, tokens, heads, case.dim), jnp.float32)

    inputs = {"q": normal(case.queries, case.heads)}
    inputs |= {name: (normal(m, case.kv_heads), normal(m, case.kv_heads)) for name, m in case.segments.items()}
    return jax.tree.map(lambda x: x.astype(dtype), inputs)
