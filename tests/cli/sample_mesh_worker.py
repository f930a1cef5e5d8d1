"""Runs in a process of its own with eight CPU devices: the same clips on several meshes, as one JSON object.

For each way of sampling and each mesh: the largest difference of the clips' pixels from those of one device, how many
clips were made, and which share of the weights lies on one device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from small_release import ROW, write

from crcm_jax.cli import _sample_sources as sources
from crcm_jax.cli import sample
from crcm_jax.cli._sample_run import videos
from crcm_jax.models import registry
from crcm_jax.parallel.rules import device_bytes

# Three prompts, two heads, six tokens a frame: by itself it takes data=2,context=2, and fills up the second batch.
MESHES = {
    "streaming": ("",),
    "at once": ("fsdp=2,tensor=2",),
}
WAYS = {"streaming": ("--steps=2", "--noisy-context"), "at once": ("--sampler=euler", "--steps=2", "--guidance=2")}


def clips(folder: Path, way: str, mesh: str) -> tuple[np.ndarray, float]:
    words = ["--model=small", f"--weights={folder}", "--size=16x24", "--frames=9", "--seed=3", *WAYS[way]]
    words += [f"--prompt={text}" for text in ("a cat walks", "a dog", "a ball")] + ([f"--mesh={mesh}"] if mesh else [])
    source = sources.prepare(*sample.parse(words))
    made = np.concatenate([video for _, video in videos(source, 3)])
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(source.model.params))
    return made, device_bytes(source.model.params) / whole


def main() -> None:
    registry.RELEASES["small"] = ROW
    folder, report = write(Path(sys.argv[1])), {}
    for way, meshes in MESHES.items():
        expected, _ = clips(folder, way, "data=1")
        for mesh in meshes:
            found, share = clips(folder, way, mesh)
            row = {"error": float(np.abs(found - expected).max()), "clips": len(found), "share": share}
            row["power"] = float(np.abs(found[::-1] - expected).max())  # of one clip in another's place
            row["inside"] = float((np.abs(expected) < 1).mean())  # pixels that the decoder has not clipped
            report[f"{way} {mesh}"] = row
    print(json.dumps(report))


if __name__ == "__main__":
    main()
