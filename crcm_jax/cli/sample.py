"""`crcm sample`: streams videos from a checkpoint, chunk by chunk."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NoReturn

from crcm_jax.errors import UsageError, UserError

HELP = "stream videos from a checkpoint: mp4, GIF or a PNG of frames"
EXAMPLE = 'crcm sample --checkpoint=out/demo/sf_dmd --prompt="a three moves up and left" --steps=2 --out=out/three.gif'


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}, see crcm sample --help")


def _list(kind):
    def parse(text: str):
        try:
            return tuple(kind(part) for part in text.split(",") if part)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 4,2") from None

    return parse


def parser() -> argparse.ArgumentParser:
    """The command line of `crcm sample`."""
    p = _Parser("crcm sample", description=f"{HELP}.", epilog=f"for example: {EXAMPLE}", allow_abbrev=False)
    p.add_argument("--checkpoint", required=True, help="a run's workdir, a checkpoint folder or a .safetensors file")
    p.add_argument("--prompt", action="append", help="what to show; may be given several times")
    p.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    p.add_argument("--image", metavar="FILE", help="the first frame (image-to-video)")
    solver = p.add_mutually_exclusive_group()
    solver.add_argument(
        "--steps", type=_list(int), help="steps for each chunk, the last for all later ones [the run's]"
    )
    solver.add_argument("--ode", type=int, metavar="N", help="Euler steps of a diffusion model")
    p.add_argument("--mid", type=_list(float), help="times between 1 and 0 where a student stops [the run's own]")
    p.add_argument(
        "--noisy-context", action="store_true", help="later chunks see the last denoising pass, not a clean one"
    )
    p.add_argument("--guidance", type=float, help="guidance of a diffusion model [the run's own]")
    p.add_argument(
        "--seed", type=int, default=0, help="seed of the first clip's noise; clip i takes seed + i [%(default)s]"
    )
    p.add_argument("--fps", type=float, default=8, help="frames per second of the file [%(default)s]")
    p.add_argument("--which", choices=("ema", "params"), default="ema", help="averaged or live weights [%(default)s]")
    p.add_argument("--out", default="clip.gif", help=".mp4, .gif, .apng, or .png for the frames [%(default)s]")
    return p


def _prompts(options) -> list[str]:
    prompts = list(options.prompt or [])
    if options.prompts:
        path = Path(options.prompts)
        if not path.is_file():
            raise UsageError(f"there is no prompt file {path}")
        prompts += [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"--prompt is missing, for example: {EXAMPLE}")
    return prompts


def main(argv: list[str]) -> int:
    """Samples, writes the file and says how fast it was; returns 0. UserError, one sentence, for bad input."""
    options = parser().parse_args(argv)
    prompts = _prompts(options)
    if options.mid and not options.steps:
        raise UsageError("--mid belongs to --steps: a diffusion model's times follow from --ode")

    # Only now: a wrong command line is answered at once, without waiting for JAX to load.
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tqdm import tqdm

    from crcm_jax import build
    from crcm_jax.evaluate import clips, producer
    from crcm_jax.evaluate.video import SUFFIXES, write_video
    from crcm_jax.models.base import Condition
    from crcm_jax.sampling import Few, Ode, stream

    if Path(options.out).suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out={options.out}: the file must end in {', '.join(SUFFIXES)}")
    config, params, _ = producer.load(options.checkpoint, options.which)
    if options.noisy_context:
        config.rollout.noisy_context = True
    solver, guidance = clips.own_solver(config)
    if options.steps:
        solver, guidance = producer.few_step_solver(config, options.steps, options.mid), 1.0
    elif options.ode:
        solver = Ode(options.ode)
    guidance = options.guidance or guidance

    codec, text = build.codec(config), build.text_encoder(config)
    latents = codec.latent_shape(config.data.frames, config.data.height, config.data.width)
    image = None
    if options.image:
        image = codec.encode(None, _first_frame(options.image, config, len(prompts)))
    seeds = range(options.seed, options.seed + len(prompts))
    noise = producer.clip_noise(seeds, latents, solver.most if isinstance(solver, Few) else 0, image=image is not None)

    def run():
        chunks = stream(
            build.network(config), params, Condition(text=jnp.asarray(text(prompts))), None,
            shape=(len(prompts), *latents), chunks=build.chunk_pattern(config), solver=solver,
            uncond=Condition(text=jnp.asarray(text([""]))), guidance=guidance, image=image, noise=noise,
        )  # fmt: skip
        return codec.decode_stream(None, chunks)

    print("crcm: compiling", file=sys.stderr)
    for _, pixels in zip(range(2), run()):  # the first chunk may have a length of its own
        jax.block_until_ready(pixels)
    videos, latency = [], None
    began = time.perf_counter()
    with tqdm(total=config.data.frames, unit="frame", desc="streaming") as bar:
        for pixels in run():
            videos.append(np.asarray(pixels))
            latency = latency or time.perf_counter() - began
            bar.update(pixels.shape[1])
    seconds = time.perf_counter() - began

    video = np.concatenate(videos, 1)
    write_video(options.out, np.concatenate(list(video), axis=1), options.fps)
    frames = video.shape[0] * video.shape[1]
    print(f"{frames / seconds:.1f} frames/s, first chunk after {1000 * latency:.0f} ms, written to {options.out}")
    return 0


def _first_frame(path: str, config, batch: int):
    """The image as a clip of one frame, `[batch, 1, height, width, 1 or 3]` in [−1, 1], resized to the canvas."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    grey = config.codec.get("channels", 1) == 1
    try:
        with Image.open(path) as picture:
            size = (config.data.width, config.data.height)
            pixels = np.asarray(picture.convert("L" if grey else "RGB").resize(size, Image.Resampling.LANCZOS))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    pixels = pixels.reshape(1, 1, *pixels.shape[:2], -1).astype(np.float32) / 127.5 - 1
    return np.broadcast_to(pixels, (batch, *pixels.shape[1:]))
