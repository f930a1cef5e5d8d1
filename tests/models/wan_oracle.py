"""The causal video transformer written a second time, from the specification's text: NumPy, float64, plain loops.

Nothing is shared with the program: one packed sequence, an explicit boolean mask from the predicates of
spec causal_rcm 3.2, a loop over layers, heads and patches (spec wan21 1.2, 1.3).
"""

import math

import numpy as np


def chunk_of(pattern, frames):
    """Chunk index of every frame, counted one by one."""
    return [0 if f < pattern.first else 1 + (f - pattern.first) // pattern.size for f in range(frames)]


def block_causal(pattern, frames, tokens):
    """Boolean [query, key]."""
    blk = np.repeat(chunk_of(pattern, frames), tokens)
    n, window, sink = len(blk), pattern.window, pattern.sink
    allow = np.zeros((n, n), bool)
    for i in range(n):
        for j in range(n):
            bq, bk = blk[i], blk[j]
            near = bk <= bq and (window == 0 or bk >= bq - (window - 1))
            allow[i, j] = near or (window > 0 and sink > 0 and bk < sink and bk <= bq)
    return allow


def teacher_forcing(pattern, frames, tokens):
    """Boolean [query, key] over the packed sequence: clean half, then noisy half."""
    blk = np.repeat(chunk_of(pattern, frames), tokens)
    n, window, sink = len(blk), pattern.window, pattern.sink
    allow = np.zeros((2 * n, 2 * n), bool)
    for i in range(2 * n):
        for j in range(2 * n):
            cq, ck, noisy_q, noisy_k = blk[i % n], blk[j % n], i >= n, j >= n
            in_window = window == 0 or ck >= cq - (window - 1)
            in_sink = sink > 0 and ck < sink and ck < cq
            if noisy_q and noisy_k:
                allow[i, j] = ck == cq
            elif noisy_q:
                allow[i, j] = ck < cq and (in_window or in_sink)
            elif not noisy_k:
                allow[i, j] = (ck <= cq and in_window) or in_sink
    return allow


def velocity(params, c, x, t, text, allow, positions):
    """Velocity `[batch, frame, height, width, channel]` of frames x at per-frame times t, at temporal `positions`."""
    outside, blocks = params["outside"], params["blocks"]
    batch, frames, height, width, _ = x.shape
    _, ph, pw = c.patch
    rows, columns = height // ph, width // pw
    out = np.zeros((batch, frames, height, width, c.out_channels))
    for b in range(batch):
        h, e0, e, angles = [], [], [], []
        for f in range(frames):
            k = np.arange(c.freq_dim // 2)
            a = 1000.0 * t[b, f] * 10_000.0 ** (-k / (c.freq_dim // 2))
            time = outside["time_embedding"]
            e_f = linear(time["down"], silu(linear(time["up"], np.concatenate([np.cos(a), np.sin(a)]))))
            e0_f = linear(outside["time_projection"], silu(e_f)).reshape(6, c.dim)
            for y in range(rows):
                for z in range(columns):
                    patch = [
                        x[b, f, y * ph + p, z * pw + q, channel]
                        for channel in range(c.in_channels) for p in range(ph) for q in range(pw)
                    ]  # fmt: skip
                    h.append(linear(outside["patch_embedding"], np.array(patch)))
                    e0.append(e0_f)
                    e.append(e_f)
                    angles.append(rope_angles(c.dim // c.heads, positions[f], y, z))
        h, e0, e, angles = np.array(h), np.array(e0), np.array(e), np.array(angles)
        words = linear(outside["text_embedding"]["down"], gelu(linear(outside["text_embedding"]["up"], text[b])))
        for index in range(c.layers):
            h = block(pick(blocks, index), c, h, e0, words, allow, angles)
        shift, scale = outside["head_modulation"][0] + e, outside["head_modulation"][1] + e
        h = linear(outside["head"], layer_norm(h, c.eps) * (1 + scale) + shift)
        for n, values in enumerate(h):
            f, y, z = n // (rows * columns), n // columns % rows, n % columns
            out[b, f, y * ph : (y + 1) * ph, z * pw : (z + 1) * pw] = values.reshape(ph, pw, c.out_channels)
    return out


def block(p, c, h, e0, words, allow, angles):
    """One layer over the whole packed sequence."""
    m = [p["modulation"][i] + e0[:, i] for i in range(6)]
    attn, cross = p["self_attn"], p["cross_attn"]
    z = layer_norm(h, c.eps) * (1 + m[1]) + m[0]
    q, k = (rms_norm(attn[f"norm_{n}"], linear(attn[n], z), c.eps) for n in "qk")
    h = h + linear(attn["o"], attend(c.heads, q, k, linear(attn["v"], z), allow, angles)) * m[2]
    z = layer_norm(h, c.eps) * p["norm3"]["scale"] + p["norm3"]["bias"]
    q = rms_norm(cross["norm_q"], linear(cross["q"], z), c.eps)
    k = rms_norm(cross["norm_k"], linear(cross["k"], words), c.eps)
    everything = np.ones((len(q), len(k)), bool)
    h = h + linear(cross["o"], attend(c.heads, q, k, linear(cross["v"], words), everything, None))
    z = layer_norm(h, c.eps) * (1 + m[4]) + m[3]
    return h + linear(p["ffn"]["down"], gelu(linear(p["ffn"]["up"], z))) * m[5]


def attend(heads, q, k, v, allow, angles):
    """Heads one by one; `angles` None leaves out the rotation."""
    out, width = [], q.shape[1] // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        qh, kh = q[:, part], k[:, part]
        if angles is not None:
            qh, kh = rotated(qh, angles), rotated(kh, angles)
        scores = np.where(allow, qh @ kh.T / math.sqrt(width), -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
    return np.concatenate(out, 1)


def rope_angles(width, f, y, x):
    """Angle of every channel pair: temporal pairs, then rows, then columns."""
    side = 2 * (width // 6)
    return [
        index * 10_000.0 ** (-2 * k / channels)
        for index, channels in ((f, width - 2 * side), (y, side), (x, side))
        for k in range(channels // 2)
    ]


def rotated(x, angles):
    """Interleaved pairs as complex numbers."""
    z = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def pick(tree, index):
    """Layer `index` of stacked parameters."""
    return {k: pick(v, index) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree[index])


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def layer_norm(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def rms_norm(p, x, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"]


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
