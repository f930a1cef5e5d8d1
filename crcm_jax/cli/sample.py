"""`crcm sample`: streams videos from a run's checkpoint or from a published model's weights, chunk by chunk."""

from __future__ import annotations

import argparse
import sys
import time
from fractions import Fraction
from pathlib import Path

from crcm_jax.cli._parser import Parser
from crcm_jax.errors import UsageError, UserError

HELP = "stream videos from a checkpoint or from Wan's weights: mp4, GIF or a PNG of frames"
EXAMPLE = 'crcm sample --checkpoint=out/demo/sf_dmd --prompt="a three moves up and left" --steps=2 --out=out/three.gif'

_EPILOG = f"""\
for example:
  {EXAMPLE}
  crcm sample --model=wan2.1-t2v-1.3b --weights=weights/causal --prompt="a cat in the rain" --out=clip.mp4 \\
      --steps=4,2 --mid="15/16,5/6,5/8;5/8" --noisy-context"""


def _list(kind, separator=",", example="4,2"):
    def parse(text: str):
        try:
            return tuple(kind(part) for part in text.split(separator) if part)
        except (ValueError, ZeroDivisionError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as {example}") from None

    return parse


def _pair(separator: str, example: str):
    def parse(text: str):
        numbers = text.split(separator)
        if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise argparse.ArgumentTypeError(f"{text!r} is not like {example}")
        return int(numbers[0]), int(numbers[1])

    return parse


def _times(text: str) -> tuple[tuple[float, ...], ...]:
    row = _list(lambda number: float(Fraction(number.strip())), example="15/16,5/6,5/8;5/6")
    return tuple(row(part) for part in text.split(";"))


def parser() -> argparse.ArgumentParser:
    """The command line of `crcm sample`."""
    p = Parser(
        "crcm sample", description=f"{HELP}.", epilog=_EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = p.add_argument
    add("--checkpoint", help="a run's workdir, a checkpoint folder or a .safetensors file")
    add("--which", choices=("ema", "params"), default="ema", help="its averaged or live weights [%(default)s]")
    add("--model", help="or a published model: wan2.1-t2v-1.3b, wan2.1-t2v-14b")
    add("--weights", metavar="DIR", help="its transformer, vae and text_encoder.safetensors, and tokenizer")
    add("--size", type=_pair("x", "832x480"), help="width x height of a published model's clip [832x480]")
    add("--frames", type=int, help="frames of a published model's clip [81]")
    add("--chunks", type=_pair("-", "1-1"), help="latent frames of the first and of later chunks [1-1]")
    add("--prompt", action="append", help="what to show; may be given several times")
    add("--prompts", metavar="FILE", help="a text file with one prompt a line")
    add("--negative-prompt", dest="negative", help="what guidance leads away from [nothing]")
    add("--negative-file", metavar="FILE", help="a text file with it")
    add("--image", metavar="FILE", help="the first frame (image-to-video)")
    solver = p.add_mutually_exclusive_group()
    solver.add_argument(
        "--steps", type=_list(int), help="steps of each chunk, the last for all later ones [the run's, 4]"
    )
    solver.add_argument("--ode", type=int, metavar="N", help="Euler steps of a diffusion model")
    add("--mid", type=_times, help="times between 1 and 0 where a student stops; chunks apart by ';' [as trained]")
    add("--noisy-context", action="store_true", help="later chunks see the last denoising pass, not a clean one")
    add("--context-start", type=int, metavar="CHUNK", help="from this chunk on [the run's, 1]")
    add("--guidance", type=float, help="guidance of a diffusion model [the run's, 3]")
    add("--shift", type=float, help="time shift of a diffusion model [3]")
    add("--seed", type=int, default=0, help="seed of the first clip's noise; clip i takes seed + i [%(default)s]")
    add("--fps", type=float, help="frames per second of the file [8, Wan's 16]")
    add("--out", default="clip.gif", help=".mp4, .gif, .apng, or .png for the frames [%(default)s]")
    return p


def _lines(option: str, name: str) -> list[str]:
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"there is no {option} file {path}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, prompts). UsageError, one sentence, for options that are missing or do not go together."""
    options = parser().parse_args(argv)
    if bool(options.checkpoint) == bool(options.model):
        raise UsageError(f"give --checkpoint or --model, one of the two, for example: {EXAMPLE}")
    if options.model and not options.weights:
        raise UsageError(f"--model={options.model} needs --weights=DIR, a folder that crcm convert has written")
    for name in ("weights", "size", "frames", "chunks"):
        if options.checkpoint and getattr(options, name) is not None:
            raise UsageError(f"--{name} belongs to --model: a run's checkpoint has its own")
    if options.mid and not options.steps:
        raise UsageError("--mid belongs to --steps: a diffusion model's times follow from --ode")
    if options.shift is not None and not options.ode:
        raise UsageError("--shift belongs to --ode")
    if options.negative_file:
        options.negative = " ".join(_lines("--negative", options.negative_file))
    prompts = [*(options.prompt or []), *(_lines("prompt", options.prompts) if options.prompts else [])]
    if not prompts:
        raise UsageError(f"--prompt is missing, for example: {EXAMPLE}")
    return options, prompts


def main(argv: list[str]) -> int:
    """Samples, writes the files and says how fast it was; returns 0. UserError, one sentence, for bad input."""
    options, prompts = parse(argv)

    # Only now: a wrong command line is answered at once, without waiting for JAX to load.
    from crcm_jax.cli import _sample_sources as sources
    from crcm_jax.evaluate.video import SUFFIXES, write_video

    out = Path(options.out)
    if out.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out={options.out}: the file must end in {', '.join(SUFFIXES)}")
    source = (sources.from_release if options.model else sources.from_checkpoint)(options, prompts)
    if options.image and source.chunks.first != 1:
        raise UserError(f"--image needs a first chunk of one latent frame, not {source.chunks.first}: use --chunks=1-N")
    image = sources.first_frame(options.image, source) if options.image else None
    for part, seconds in source.seconds.items():
        print(f"{part}: {seconds:.1f} s", file=sys.stderr)

    compile_first = True
    for start in range(0, len(prompts), source.batch):
        batch = range(start, min(start + source.batch, len(prompts)))
        video = _stream(source, options, batch, image, compile_first)
        compile_first = False
        name = out if source.batch >= len(prompts) else out.with_stem(f"{out.stem}-{start}")
        began = time.perf_counter()
        write_video(name, video, options.fps or source.fps)
        print(f"{name}: {video.shape[0]} frames, written in {time.perf_counter() - began:.1f} s")
    return 0


def _stream(source, options, batch: range, image, compile_first: bool):
    """Streams the clips of prompts number `batch`; `[frame, height, width, channel]`, the clips one above the other."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tqdm import tqdm

    from crcm_jax.evaluate.producer import clip_noise
    from crcm_jax.sampling import Few, stream

    few, latents = isinstance(source.solver, Few), source.latent_shape()
    seeds = [options.seed + i for i in batch]
    noise = clip_noise(seeds, latents, source.solver.most if few else 0, image=image is not None)
    cond = jax.tree.map(lambda leaf: leaf[batch.start : batch.stop], source.cond)
    first = None if image is None else jnp.broadcast_to(image, (len(batch), *image.shape[1:]))

    def run():
        chunks = stream(
            source.network, source.params, cond, None, shape=(len(batch), *latents), chunks=source.chunks,
            solver=source.solver, uncond=source.uncond, guidance=source.guidance, image=first, noise=noise,
        )  # fmt: skip
        return source.codec.decode_stream(source.codec_params, chunks)

    if compile_first:
        print("crcm: compiling", file=sys.stderr)
        # A first chunk of another length, and the first one that keeps a noisy context, are programs of their own.
        for _, pixels in zip(range(max(source.solver.plan.context_start, image is not None) + 2), run()):
            jax.block_until_ready(pixels)
    parts, latency, began = [], None, time.perf_counter()
    with tqdm(total=source.frames, unit="frame", desc="streaming") as bar:
        for pixels in run():
            parts.append(np.asarray(pixels))
            latency = latency or time.perf_counter() - began
            bar.update(pixels.shape[1])
    seconds = time.perf_counter() - began
    video = np.concatenate(parts, 1)
    rate = video.shape[0] * video.shape[1] / seconds
    print(f"{rate:.1f} frames/s, first chunk after {1000 * latency:.0f} ms")
    return np.concatenate(list(video), axis=1)
