"""`crcm data`: builds, checks and converts sets of latents, and embeds the negative prompt."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crcm_jax.cli import _places, _solver_options
from crcm_jax.cli._numbers import LONGEST_SIDE, SEED, integer, number, pair
from crcm_jax.cli._parser import Parser
from crcm_jax.data import lists, texts
from crcm_jax.errors import Interrupted, UsageError, UserError
from crcm_jax.models import registry

if TYPE_CHECKING:
    from crcm_jax.data.build import Job

HELP = "make latents to train on from videos or prompts; check and convert sets of them"
EXAMPLE = "crcm data build --videos=clips --weights=weights/wan2.1-t2v-1.3b --out=latents"

_FOR_VIDEOS, _FOR_PROMPTS = "wan2.1-t2v-1.3b", "wan2.1-t2v-14b"
"""Models that are taken where none is named."""

_EXAMPLES = {
    "build": (
        EXAMPLE,
        "crcm data build --prompts=prompts.txt --model=wan2.1-t2v-14b --weights=weights/wan2.1-t2v-14b \\\n"
        "      --negative-file=negative.txt --out=latents --part=0/8",
    ),
    "check": ("crcm data check latents",),
    "convert": ("crcm data convert --from=latents --to=records --format=array_record",),
    "embed": ("crcm data embed --weights=weights/wan2.1-t2v-1.3b --prompt-file=negative.txt --out=negative.pt",),
}
_ABOUT = {
    "build": "Encode videos with a model's autoencoder, or sample a teacher from prompts, into shards of latents.",
    "check": "Read every byte of a set of latents and name what is damaged (exit code 1).",
    "convert": "Tars to ArrayRecord files or back, every value as it was.",
    "embed": "Write a prompt's embedding as a .pt file, for --config.init.uncond.",
}
_BUILD = """\
A folder of videos holds each video's prompt beside it (clip.txt of clip.mp4); a .jsonl or .csv list has the fields
video and prompt. Prompts come from a text file, one a line, or from such a list. Text is UTF-8, or what a byte-order
mark says; hidden files are passed over. Stopped at any moment, the same command goes on; several
processes, on one host or many, build one set when each is given its own --part."""


def _part(text: str) -> tuple[int, int]:
    index, count = pair("/", example="0/8", at_least=0)(text)
    if index >= count:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part i/n, numbered from 0/n to (n−1)/n")
    return index, count


def parser() -> Parser:
    """The command line of `crcm data`."""
    examples = [examples[0] for examples in _EXAMPLES.values()]
    top = Parser("crcm data", description=f"{HELP[0].upper()}{HELP[1:]}.", examples=examples)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str) -> Parser:
        about = _ABOUT[name] + (f"\n\n{_BUILD}" if name == "build" else "")
        return commands.add_parser(name, help=_ABOUT[name], description=about, examples=_EXAMPLES[name])

    p = command("build")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--videos", type=_places.given, metavar="PATH", help="a folder of videos, or a .jsonl or .csv list of them"
    )
    source.add_argument(
        "--prompts", type=_places.given, metavar="FILE", help="prompts to sample a teacher from: text, .jsonl or .csv"
    )
    add = p.add_argument
    known = ", ".join(registry.RELEASES)
    add("--model", help=f"one of {known} [{_FOR_VIDEOS} for videos, {_FOR_PROMPTS} for prompts]")
    add(
        "--weights",
        type=_places.given,
        metavar="DIR",
        required=True,
        help="a folder that crcm convert has written, with its tokenizer",
    )
    add("--out", type=_places.new_folder, metavar="DIR", required=True, help="folder of the set")
    add("--format", choices=("tar", "array_record"), default="tar", help="of the shards [%(default)s]")
    add("--shard-size", type=integer(1, 1_000_000), default=256, help="examples in a shard [%(default)s]")
    add("--frames", type=integer(1, 1_000_000), default=81, help="of a clip [%(default)s]")
    add(
        "--size",
        type=pair("x", example="832x480", at_most=LONGEST_SIDE),
        default=(832, 480),
        metavar="WxH",
        help="pixels [832x480]",
    )
    add("--batch", type=integer(1, 65_536), default=1, help="clips at a time on each device [%(default)s]")
    add("--part", type=_part, default=(0, 1), metavar="I/N", help="make every N-th shard, from the I-th on [0/1]")
    videos = p.add_argument_group("from videos")
    videos.add_argument(
        "--fps", type=number(above=0, at_most=1000), default=16.0, help="frames a second of the clips [%(default)s]"
    )
    videos.add_argument(
        "--clips", type=integer(1, 1_000_000), default=1, help="at most so many consecutive clips a video [%(default)s]"
    )
    teacher = p.add_argument_group("from prompts")
    teacher.add_argument("--steps", type=integer(1, 10_000), default=100, help="of the sampler [%(default)s]")
    teacher.add_argument("--sampler", choices=_solver_options.WHOLE, default="euler", help="[%(default)s]")
    p.add_renamed("--solver", "--sampler")
    teacher.add_argument("--shift", type=number(above=0, at_most=1000), default=3.0, help="of the times [%(default)s]")
    teacher.add_argument(
        "--sigma-max",
        type=number(above=0, at_most=1e9),
        default=5000.0,
        help="noise over signal at the start [%(default)s]",
    )
    teacher.add_argument("--guidance", type=number(at_least=0, at_most=1000), default=5.0, help="[%(default)s]")
    teacher.add_argument(
        "--negative-file", type=_places.given, metavar="FILE", help="text that guidance leads away from [nothing]"
    )
    teacher.add_argument(
        "--seed", type=integer(0, SEED), default=0, help="of the first prompt; prompt i has seed + i [%(default)s]"
    )

    p = command("check")
    p.add_argument("path", type=_places.given, metavar="PATH", help="a folder of shards, or one shard")
    p.add_argument("--threads", type=integer(1, 1024), default=4, help="that read at once [%(default)s]")

    p = command("convert")
    p.add_argument(
        "--from",
        type=_places.given,
        dest="source",
        required=True,
        metavar="PATH",
        help="a folder of shards, or one shard",
    )
    p.add_argument("--to", type=_places.new_folder, required=True, metavar="DIR", help="a new folder")
    p.add_argument("--format", required=True, choices=("tar", "array_record"), help="what to write")
    p.add_argument("--skip-damaged", action="store_true", help="leave damaged examples out [stop at the first]")

    p = command("embed")
    p.add_argument("--model", default=_FOR_VIDEOS, help="whose text encoder [%(default)s]")
    p.add_argument(
        "--weights", type=_places.given, metavar="DIR", required=True, help="a folder that crcm convert has written"
    )
    text = p.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text")
    text.add_argument("--prompt-file", type=_places.given, metavar="FILE", help="a file with it")
    p.add_argument("--out", type=_places.new_file, metavar="FILE", required=True, help="a .pt file")
    return top


def main(argv: list[str]) -> int:
    """Runs one of the commands; 0, or 1 where check finds damage. UserError, one sentence, for what is wrong."""
    return run(parser().parse_args(argv))


def run(options: argparse.Namespace) -> int:
    """Does what was parsed."""
    work = {"build": _build, "check": _check, "convert": _convert, "embed": _embed}[options.command]
    try:
        return work(options)
    except KeyboardInterrupt:
        on = "; the same command goes on from here" if options.command in ("build", "convert") else ""
        raise Interrupted(f"stopped{on}") from None


def _read(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    return texts.read(path)


def _jobs(options: argparse.Namespace) -> list[Job]:
    from crcm_jax.data import video_files
    from crcm_jax.data.build import Job

    if options.prompts:
        if not Path(options.prompts).is_file():
            raise UsageError(f"there is no file {options.prompts}")
        return [Job(i, prompt) for i, prompt in enumerate(lists.prompts(options.prompts))]
    listed = video_files.listing(options.videos)
    clips = [(video, prompt, clip) for video, prompt in listed for clip in range(options.clips)]
    return [Job(i, prompt, video, clip) for i, (video, prompt, clip) in enumerate(clips)]


def _settings(options: argparse.Namespace, jobs: list[Job], shape: tuple[int, ...]) -> dict[str, Any]:
    """What makes the set what it is: a folder begun with other settings is not gone on with."""
    names = [[job.prompt, str(job.video.name) if job.video else None, job.clip] for job in jobs]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    common = {"model": options.model, "frames": options.frames, "size": list(options.size), "latents": list(shape)}
    if options.prompts:
        names = ("steps", "shift", "sigma_max", "guidance", "seed")
        negative = _read(options.negative_file).strip() if options.negative_file else ""
        own = {name: getattr(options, name) for name in names} | {"negative": negative, "solver": options.sampler}
    else:
        own = {"fps": options.fps, "clips": options.clips}
    return {"source": "prompts" if options.prompts else "videos", "list": digest} | common | own


def _build(options: argparse.Namespace) -> int:
    options.model = options.model or (_FOR_PROMPTS if options.prompts else _FOR_VIDEOS)
    registry.release(options.model)

    jobs, (width, height) = _jobs(options), options.size

    # Only now: a wrong command line is answered at once, without waiting for JAX to load.
    from crcm_jax import pipeline
    from crcm_jax.cli import _data_makers as makers
    from crcm_jax.data.build import build

    model = pipeline.load(options.model, weights=options.weights).streaming(None)
    shape = model.latent_shape(options.frames, height, width)
    model.require(*(makers.FromVideos if options.videos else makers.FromTeacher).parts)
    makers.refuse_what_cannot_fit(model, options, height, width)
    settings = _settings(options, jobs, shape)
    shape = {"frames": options.frames, "height": height, "width": width, "per_device": options.batch}

    def maker() -> makers.FromVideos | makers.FromTeacher:
        print("crcm: reading the weights", file=sys.stderr)
        if options.videos:
            return makers.FromVideos(options.model, Path(options.weights), fps=options.fps, **shape)
        names = ("steps", "solver", "shift", "sigma_max", "guidance", "seed", "negative")
        chosen = {name: settings[name] for name in names}
        return makers.FromTeacher(options.model, Path(options.weights), **chosen, **shape)

    made, left_out = build(
        options.out, jobs, maker, settings=settings, kind=options.format, shard_size=options.shard_size,
        part=options.part,
    )  # fmt: skip
    print(f"{options.out}: {made} of {len(jobs)} examples" + (f", {left_out} left out" if left_out else ""))
    return 0 if made else UserError.exit_code


def _check(options: argparse.Namespace) -> int:
    from crcm_jax.data.check import check

    report = check(options.path, threads=max(1, options.threads))
    print("\n".join(report.lines()))
    return 1 if report.damage else 0


def _convert(options: argparse.Namespace) -> int:
    from crcm_jax.data.convert import convert

    examples, left_out = convert(options.source, options.to, options.format, skip_damaged=options.skip_damaged)
    print(f"{options.to}: {examples} examples" + (f", {left_out} damaged ones left out" if left_out else ""))
    return 0


def _embed(options: argparse.Namespace) -> int:
    out = options.out
    if out.suffix != ".pt":
        raise UsageError(f"--out={out}: the file must end in .pt")
    prompt = options.prompt if options.prompt_file is None else _read(options.prompt_file).strip()

    registry.release(options.model)

    from crcm_jax import pipeline
    from crcm_jax.cli._data_makers import STORED
    from crcm_jax.data import tensor_file
    from crcm_jax.saving.files import write_bytes

    embedding = pipeline.load(options.model, weights=options.weights).text_encoder()([prompt])["text"][0]
    write_bytes(out, tensor_file.dumps(embedding.astype(STORED)))
    print(f"{out}: {'×'.join(map(str, embedding.shape))} of {prompt[:40]!r}")
    return 0
