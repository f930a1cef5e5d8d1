"""Measures time and memory of conversions on a full-size file of random bfloat16 weights.

    python -m convert.measure --model=wan2.1-t2v-1.3b --folder=/scratch

writes a native .safetensors file, converts it to ours, to a diffusers folder and to rCM's .pt, that .pt back to ours
and on to native, compares the two ends byte by byte, and deletes everything. Memory is what the process holds above its
start, every 2 ms, from /proc/self/status: VmRSS, and RssAnon of it, which no file stands behind. Linux only.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert import engine, models
from convert.arrays import TRANSFORMS, Spec, shape_after
from convert.safetensors_file import Reader, Writer


def fill(model: models.Model, path: Path) -> None:
    """A native file of normally distributed bfloat16 weights."""
    specs = {
        place.name: Spec("BF16", shape_after(TRANSFORMS[place.transform].to_theirs, engine.slot_shape(model, slot)))
        for slot, place in engine.places(model, "native").items()
    }
    writer, rng = Writer(path, specs, {"format": "pt"}), np.random.default_rng(0)
    for name, spec in specs.items():
        for start in range(0, spec.nbytes, 8 << 20):
            count = min(8 << 20, spec.nbytes - start) // 2
            bits = rng.standard_normal(count, dtype=np.float32).view(np.uint32) >> 16
            writer.write(name, bits.astype(np.uint16), start)
    writer.close()


def _held() -> tuple[int, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[key].split()[0]) for key in ("VmRSS", "RssAnon"))


def watched(work: Callable[[], object]) -> tuple[float, float, float]:
    """(seconds, MiB held at most above the start, MiB of that without a file behind) of `work()`."""
    start = peak = _held()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = tuple(map(max, peak, _held()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return time.perf_counter() - began, *((high - low) / 1024 for high, low in zip(peak, start))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wan2.1-t2v-1.3b", choices=tuple(models.KNOWN))
    parser.add_argument("--folder", default=None, help="where there is room for three times the weights")
    options = parser.parse_args()
    model = models.known(options.model)
    import torch  # noqa: F401 (what it holds is part of the start)

    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        native = folder / "native.safetensors"
        fill(model, native)
        specs = Reader(native).specs
        largest = max(spec.nbytes for spec in specs.values())
        print(f"{options.model}: {native.stat().st_size / 1e9:.2f} GB, largest tensor {largest / 2**20:.0f} MiB")
        ways = [
            ("native.safetensors", "ours.safetensors", "ours"), ("ours.safetensors", "folder", "diffusers"),
            ("ours.safetensors", "rcm.pt", "rcm"), ("rcm.pt", "again.safetensors", "ours"),
            ("again.safetensors", "end.safetensors", "native"),
        ]  # fmt: skip
        for source, to, layout in ways:
            if model.family is not models.TRANSFORMER and layout == "rcm":
                layout = "native"
            run = lambda s=source, t=to, y=layout: engine.convert(folder / s, folder / t, y, say=lambda line: None)  # noqa: E731
            seconds, held, anonymous = watched(run)
            print(f"{source} → {to}: {seconds:.0f} s, {held:.0f} MiB held, {anonymous:.0f} MiB without a file behind")
            if to == "folder":
                shutil.rmtree(folder / to)
        end, same = Reader(folder / "end.safetensors"), Reader(native)
        assert end.specs == specs and all(np.array_equal(end.read(name), same.read(name)) for name in specs)
        print("identical at both ends")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
