"""Where the time of a traced GPU program went, by kind of kernel, from a trace of `jax.profiler`."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from pathlib import Path

from jax.profiler import ProfileData

KINDS = (
    ("attention", r"attention_\w+"),
    ("collectives", r"nccl"),
    ("matrix products", r"gemm|nvjet|cublas|cutlass|cudnn|xmma"),
    ("copies", r"memcpy|memset|^(wrapped_)?(copy|slice|dynamic.slice|dynamic.update.slice|broadcast|transpose)"),
)
"""(kind, what the kernel's name holds); the first that fits. Everything else is XLA's own fused element-wise work."""


def kernels(folder: str) -> Iterator[tuple[str, float]]:
    """(name, seconds) of every kernel of the first GPU in the newest trace under `folder`."""
    traces = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        return
    for plane in ProfileData.from_file(str(traces[-1])).planes:
        if not plane.name.startswith("/device:GPU:0"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                yield from ((event.name, event.duration_ns * 1e-9) for event in line.events)


def table(folder: str, most: int = 24) -> str:
    """Seconds by kind, then the `most` costliest kernels; those of one name whose times differ by half stand apart."""
    kinds, groups = collections.Counter(), collections.defaultdict(list)
    for name, seconds in kernels(folder):
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "element-wise")
        kinds[kind] += seconds
        groups[kind, name, round(math.log(max(seconds, 1e-9), 1.5))].append(seconds)
    if not kinds:
        return "the trace holds no kernels of a GPU"
    total = sum(kinds.values())
    lines = [f"kernels of one step, {total:.3f} s in all"]
    lines += [f"  {seconds:8.4f} s {100 * seconds / total:5.1f} %  {kind}" for kind, seconds in kinds.most_common()]
    costly = sorted(groups.items(), key=lambda group: -sum(group[1]))[:most]
    for (kind, name, _), times in costly:
        mean = 1e3 * sum(times) / len(times)
        lines.append(f"    {sum(times):8.4f} s {len(times):6d} × {mean:8.3f} ms  {kind}: {name[:80]}")
    return "\n".join(lines)
