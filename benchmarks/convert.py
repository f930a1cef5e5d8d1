"""Measures time and memory of conversions on full-size shards of random bfloat16 weights.

    python -m benchmarks.convert --model=wan2.1-t2v-14b --folder=/scratch

writes a native folder of shards with its index, converts it to ours, that to a diffusers folder, and that back to
native; with --pickle also by way of rCM's .pt. The two ends are compared by the digest of every tensor. Each source is
deleted once it was read, so that there are never more than two copies of the weights on the disk (with --pickle three).
Memory is what the process holds above its start, every 2 ms, from /proc/self/status: VmRSS, and RssAnon of it, which no
file stands behind. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from crcm_jax.convert import engine, models
from crcm_jax.convert.arrays import Spec
from crcm_jax.convert.safetensors_file import Reader, Writer

SHARD = 10_000_000_000
"""Bytes of a shard at most, as in the published folder of the 14B model."""


def fill(model: models.Model, folder: Path) -> dict[str, str]:
    """A native folder of normally distributed bfloat16 weights; digests of its tensors."""
    specs = {
        place.name: Spec("BF16", engine.tensor_shape(model, slot, place))
        for slot, place in engine.places(model, "native").items()
    }
    shards: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if sum(s.nbytes for s in shards[-1].values()) + spec.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = spec
    folder.mkdir()
    rng, digests, where = np.random.default_rng(0), {}, {}
    for i, shard in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{i:05}-of-{len(shards):05}.safetensors"
        writer = Writer(folder / file, shard, {"format": "pt"})
        for name, spec in shard.items():
            digest, where[name] = hashlib.sha256(), file
            for start in range(0, spec.nbytes, 8 << 20):
                count = min(8 << 20, spec.nbytes - start) // 2
                bits = rng.standard_normal(count, dtype=np.float32).view(np.uint32) >> 16
                block = bits.astype(np.uint16)
                digest.update(block)
                writer.write(name, block, start)
            digests[name] = digest.hexdigest()
        writer.close()
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs.values())}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return digests


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
    parser.add_argument("--folder", default=None, help="where there is room for twice the weights")
    parser.add_argument(
        "--pickle", action="store_true", help="by way of a .pt file too: room for three times the weights"
    )
    options = parser.parse_args()
    model = models.known(options.model)
    if options.pickle:
        import torch  # noqa: F401 (what it holds is part of the start)

    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        digests = fill(model, folder / "native")
        specs = engine.inspect(folder / "native").source.specs
        total, largest = sum(s.nbytes for s in specs.values()), max(s.nbytes for s in specs.values())
        print(f"{options.model}: {total / 1e9:.2f} GB, largest tensor {largest / 2**20:.0f} MiB", flush=True)
        ways = [("native", "ours.safetensors", "ours"), ("ours.safetensors", "diffusers", "diffusers")]
        if options.pickle:
            rcm = "rcm" if model.family is models.TRANSFORMER else "native"
            ways += [("diffusers", "pickle.pt", rcm), ("pickle.pt", "end.safetensors", "native")]
        else:
            ways += [("diffusers", "end.safetensors", "native")]
        for source, to, layout in ways:
            run = lambda s=source, t=to, y=layout: engine.convert(folder / s, folder / t, y, say=lambda line: None)  # noqa: E731
            seconds, held, anonymous = watched(run)
            print(
                f"{source} → {to}: {seconds:.0f} s, {held:.0f} MiB held, {anonymous:.0f} MiB without a file behind",
                flush=True,
            )
            shutil.rmtree(folder / source) if (folder / source).is_dir() else (folder / source).unlink()
        end = Reader(folder / "end.safetensors")
        assert {name: hashlib.sha256(end.read(name)).hexdigest() for name in end.specs} == digests
        print("identical at both ends")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
