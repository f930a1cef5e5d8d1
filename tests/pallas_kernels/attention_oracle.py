"""Attention, its tangent and its gradients in NumPy float64, straight from the formulas and the predicates of
spec causal_rcm 3.2.

Shares nothing with the package but the mask descriptions' fields. With `round_to` the operands of every matrix product,
and the output that the derivatives read back, are first rounded to that dtype: what an ideal kernel with low-precision
operands and exact accumulation would give.
"""

import dataclasses
import functools

import numpy as np

from pallas_kernels.attention import BlockCausal, Cached, Captioned, Full, Intervals, TeacherForcing


def allowed(case):
    """Boolean `[queries, keys]` per segment, from the mask's predicate; with a batch axis where entries differ."""
    mask, queries = case.mask, case.queries
    i = np.arange(queries)[:, None]
    j = {name: np.arange(length)[None] for name, length in case.segments.items()}
    everything = {name: np.ones((queries, length), bool) for name, length in case.segments.items()}

    def block(token):
        return np.where(token < mask.first, 0, 1 + (token - mask.first) // mask.chunk)

    def in_reach(bq, bk, before):
        near = before & ((bk >= bq - (mask.window - 1)) if mask.window else True)
        return near | (before & (bk < mask.sink))

    if isinstance(mask, Full):
        return everything
    if isinstance(mask, BlockCausal):
        bq = block(i) if mask.offset == 0 else mask.offset + i // mask.chunk
        bk = block(j["own"])
        return {"own": in_reach(bq, bk, bk <= bq)}
    if isinstance(mask, TeacherForcing):
        bq, bk = block(i), block(j["context"])
        return {"own": block(j["own"]) == bq, "context": in_reach(bq, bk, bk < bq)}
    if isinstance(mask, Cached):
        k = j["context"]
        stop, start, sink = (np.reshape(x, (*np.shape(x), 1, 1)) for x in (mask.stop, mask.start, mask.sink))
        seen = (k < stop) & ((k < sink) | (k >= start))
        return everything | {"context": np.broadcast_to(seen, (*seen.shape[:-2], *everything["context"].shape))}
    if isinstance(mask, Captioned):
        inner = allowed(dataclasses.replace(case, mask=mask.mask, context=case.context - mask.tokens))
        stream = inner.get("context", np.zeros((queries, 0), bool))
        lengths = np.reshape(mask.lengths, (*np.shape(mask.lengths), 1, 1))
        caption = np.broadcast_to(np.arange(mask.tokens) < lengths, (*lengths.shape[:-2], queries, mask.tokens))
        return inner | {"context": _joined([caption, stream])}
    assert isinstance(mask, Intervals)
    for name in everything:
        pairs = getattr(mask, name)
        if pairs is not None:
            columns = [[np.broadcast_to(e, (*np.shape(e)[:-1], queries))[..., None] for e in pair] for pair in pairs]
            parts = [(j[name] >= lo) & (j[name] < hi) for lo, hi in columns]
            everything[name] = functools.reduce(np.logical_or, parts, np.zeros_like(everything[name]))
    return everything


def _joined(parts):
    """Parts `[queries, keys]` and `[batch, queries, keys]` side by side."""
    leading = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return np.concatenate([np.broadcast_to(part, (*leading, part.shape[-1])) for part in parts], axis=-1)


class Oracle:
    """One call in float64. inputs: {"q", "own": (k, v), "context": (k, v)}, arrays `[B, N, H, D]`."""

    def __init__(self, case, inputs, round_to=None):
        self.case, self.round_to = case, round_to
        self.groups = case.heads // case.kv_heads
        self.scale = case.dim**-0.5
        self.q = self._queries(inputs["q"])
        k, v = zip(*(inputs[name] for name in case.segments))
        self.k, self.v = self._keys(k), self._keys(v)
        seen = _joined(list(allowed(case).values()))
        seen = seen if seen.ndim == 2 else seen[:, None]  # over heads
        scores = np.where(seen, self.scale * self.q @ self.k.swapaxes(-1, -2), -np.inf)
        top = np.where(seen.any(-1)[..., None], scores.max(-1, keepdims=True), 0)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        safe = np.where(total == 0, 1, total)
        self.p = weights / safe
        self.weights, self.safe = weights, safe
        self.out = self._round(self._round(weights) @ self.v / safe)
        with np.errstate(divide="ignore"):
            self.lse = (top + np.log(total))[..., 0]

    @property
    def o(self):
        """The output `[B, N, H, D]`."""
        return self._rows(self.out)

    def tangent(self, tangents):
        """ȯ and the lse's tangent."""
        dq = self._queries(tangents["q"])
        dk, dv = (self._keys(x) for x in zip(*(tangents[name] for name in self.case.segments)))
        moved = self.weights * self.scale * (dq @ self.k.swapaxes(-1, -2) + self.q @ dk.swapaxes(-1, -2))
        mean = moved.sum(-1, keepdims=True) / self.safe
        acc = (self._round(moved) @ self.v + self._round(self.weights) @ dv) / self.safe
        return self._rows(acc - mean * self.out), mean[..., 0]

    def backward(self, do, dlse):
        """Gradients in the layout of the inputs."""
        g = self._queries(do)
        dp = g @ self.v.swapaxes(-1, -2)
        delta = (g * self.out).sum(-1, keepdims=True)
        ds = self._round(self.p * (dp - delta + np.asarray(dlse, np.float64)[..., None]) * self.scale)
        dq = self._rows(ds @ self.k)
        dk = self._sum_heads(ds.swapaxes(-1, -2) @ self.q)
        dv = self._sum_heads(self._round(self.p).swapaxes(-1, -2) @ g)
        grads, start = {"q": dq}, 0
        for name, length in self.case.segments.items():
            grads[name] = tuple(x[:, start : start + length] for x in (dk, dv))
            start += length
        return grads

    def _round(self, x):
        return x if self.round_to is None else x.astype(self.round_to).astype(np.float64)

    def _queries(self, x):
        return np.asarray(x, np.float64).swapaxes(1, 2)

    def _keys(self, parts):
        joined = np.concatenate([np.asarray(x, np.float64) for x in parts], axis=1).swapaxes(1, 2)
        return np.repeat(joined, self.groups, axis=1)

    def _rows(self, x):
        return self._final(x.swapaxes(1, 2))

    def _sum_heads(self, x):
        b, _, m, d = x.shape
        return self._final(x.reshape(b, self.case.kv_heads, self.groups, m, d).sum(2).swapaxes(1, 2))

    def _final(self, x):
        return self._round(x)


def relative_error(value, truth):
    """‖value − truth‖ / ‖truth‖, absolute where the truth is zero; NaN and infinities must agree in place."""
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    finite = np.isfinite(truth)
    assert np.array_equal(np.isfinite(value), finite), "non-finite entries where there should be none"
    difference = np.linalg.norm(value[finite] - truth[finite])
    return difference / (np.linalg.norm(truth[finite]) or 1.0)
