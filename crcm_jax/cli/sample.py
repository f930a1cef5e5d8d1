"""`crcm sample`: videos from a run's checkpoint or from a published model's weights, streamed or made at once."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from crcm_jax.cli import _config, _places, _solver_options
from crcm_jax.cli._numbers import LONGEST_SIDE, SEED, integer, number, pair
from crcm_jax.cli._parser import Parser
from crcm_jax.data import lists, texts
from crcm_jax.errors import UsageError
from crcm_jax.models import registry
from crcm_jax.parallel import axes

HELP = "make videos with a checkpoint or Wan's weights, streamed or at once: mp4, GIF or a PNG of frames"
EXAMPLE = 'crcm sample --checkpoint=out/demo/sf_dmd --prompt="a three moves up and left" --steps=2 --out=out/three.gif'

SUFFIXES = (".mp4", ".gif", ".apng", ".png")
"""Of `evaluate.video`, which is not loaded for them."""

_DETAIL = """\
Causal models stream, chunk by chunk: students in a few steps (--steps), diffusion models in many (--ode). Bidirectional
ones make the whole clip at once (--sampler). Weights trained here say which they are. Published ones do not: without
--sampler or --ode they are taken for a student of four steps, but image-to-video ones for bidirectional.

All devices of this machine are used: prompts are cut over them, then the heads and tokens of each clip, as far as they
divide; --mesh says it otherwise."""

_EXAMPLES = (
    EXAMPLE,
    'crcm sample --model=wan2.1-t2v-1.3b --weights=weights/causal --prompt="a cat in the rain" --out=clip.mp4 \\\n'
    '      --steps=4,2 --mid="15/16,5/6,5/8;5/8" --noisy-context',
    'crcm sample --model=wan2.1-t2v-1.3b --weights=weights/wan2.1 --prompt="a cat in the rain" --out=clip.mp4 \\\n'
    "      --sampler=unipc --steps=50 --shift=3 --guidance=5 --negative-file=negative.txt",
    "crcm sample --model=wan2.1-i2v-14b --weights=weights/i2v --image=cat.png "
    '--prompt="the cat looks up" --out=clip.mp4',
)


def parser() -> Parser:
    """The command line of `crcm sample`."""
    p = Parser("crcm sample", description=f"{HELP[0].upper()}{HELP[1:]}.\n\n{_DETAIL}", examples=_EXAMPLES)
    add = p.add_argument
    add("--checkpoint", type=_places.given, help="a run's workdir, a checkpoint folder or a .safetensors file")
    add("--which", choices=("ema", "params"), default="ema", help="its averaged or live weights [%(default)s]")
    add("--model", help=f"or a published model: {', '.join(registry.RELEASES)}")
    add(
        "--weights",
        type=_places.given,
        metavar="DIR",
        help="its transformer, vae, text_encoder (and image_encoder).safetensors, tokenizer; or what a Wan checkpoint "
        "lacks of them",
    )
    add(
        "--size",
        type=pair("x", example="832x480", at_most=LONGEST_SIDE),
        help="width x height of a published model's clip [its own, or an image's at that area]",
    )
    add("--frames", type=integer(1, 1_000_000), help="frames of its clip [its own]")
    add(
        "--chunks",
        type=pair("-", example="1-1"),
        help="latent frames of the first and of later chunks [as trained, 1-1]",
    )
    add("--prompt", action="append", help="what to show; may be given several times")
    add(
        "--prompts",
        type=_places.given,
        metavar="FILE",
        help="a text file with one prompt a line, or a .jsonl or .csv list with a field prompt",
    )
    add("--negative", help="what guidance leads away from [nothing]")
    p.add_renamed("--negative-prompt", "--negative")
    add("--negative-file", type=_places.given, metavar="FILE", help="a text file with it")
    add("--image", type=_places.given, metavar="FILE", help="the first frame (causal models, and image-to-video ones)")
    add("--crop-image", action="store_true", help="CLIP sees its middle, as in diffusers, not all of it squeezed")
    _solver_options.add(p)
    add(
        "--mesh", type=_config.mesh, action=_config.Axes, metavar="AXES",
        help=f"{axes.HELP}; prompts are cut over the first two [all devices]",
    )  # fmt: skip
    add(
        "--seed",
        type=integer(0, SEED),
        default=0,
        help="seed of the first clip's noise; clip i takes seed + i [%(default)s]",
    )
    add("--fps", type=number(above=0, at_most=1000), help="frames per second of the file [8, Wan's 16]")
    add(
        "--out",
        type=_places.new_file,
        default="clip.gif",
        help=".mp4, .gif, .apng, or .png for the frames [%(default)s]",
    )
    return p


def _file(option: str, name: str) -> str:
    if not Path(name).is_file():
        raise UsageError(f"there is no {option} file {name}")
    return name


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, prompts). UsageError, one sentence, for options that are missing or do not go together."""
    options = parser().parse_args(argv)
    if bool(options.checkpoint) == bool(options.model):
        raise UsageError(f"give --checkpoint or --model, one of the two, for example: {EXAMPLE}")
    if options.model and not options.weights:
        raise UsageError(f"--model={options.model} needs --weights=DIR, a folder that crcm convert has written")
    for name in ("size", "frames", "chunks", "crop_image"):
        if options.checkpoint and getattr(options, name) not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')} belongs to --model: a run's checkpoint has its own")
    _solver_options.check(options)
    if options.negative_file:
        options.negative = texts.read(_file("--negative", options.negative_file)).strip()
    prompts = [*(options.prompt or []), *(lists.prompts(_file("prompt", options.prompts)) if options.prompts else [])]
    if not prompts:
        raise UsageError(f"--prompt is missing, for example: {EXAMPLE}")
    if options.out.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out={options.out}: the file must end in {', '.join(SUFFIXES)}")
    if len(prompts) > SEED - options.seed:
        raise UsageError(f"--seed={options.seed} leaves no seeds for {len(prompts)} clips: use a smaller one")
    return options, prompts


def main(argv: list[str]) -> int:
    """Samples, writes the files and says how fast it was; returns 0. UserError, one sentence, for bad input."""
    return run(*parse(argv))


def run(options: argparse.Namespace, prompts: list[str]) -> int:
    """Does what was parsed."""
    # Only now: a wrong command line is answered at once, without waiting for JAX to load.
    import numpy as np

    from crcm_jax.cli import _sample_sources as sources
    from crcm_jax.cli._sample_run import videos
    from crcm_jax.evaluate.video import ready, write_video

    out = options.out
    ready(out)
    source = sources.prepare(options, prompts)
    for part, seconds in source.seconds.items():
        print(f"{part}: {seconds:.1f} s", file=sys.stderr)
    for clips, batch in videos(source, options.seed):
        files = [out.with_stem(f"{out.stem}-{i}") for i in clips] if len(prompts) > 1 else [out]
        if source.together:
            # One above the other.
            files, batch = [out], [np.concatenate(list(batch), axis=1)]
        for file, video in zip(files, batch):
            began = time.perf_counter()
            write_video(file, video, source.clip.fps)
            print(f"{file}: {video.shape[0]} frames, written in {time.perf_counter() - began:.1f} s")
    return 0
