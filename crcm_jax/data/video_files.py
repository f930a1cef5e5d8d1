"""Video files and their prompts, and their frames as an autoencoder wants them. ffmpeg does the work."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from crcm_jax.data import ffmpeg, lists, texts
from crcm_jax.errors import UserError
from crcm_jax.saving.files import is_hidden
from crcm_jax.saving.reading import pointer_at

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".gif")


def listing(path: str | Path) -> list[tuple[Path, str]]:
    """(video, prompt) of each video that `path` means, in a fixed order.

    A folder holds videos at any depth, each with its prompt beside it in a text file of the same name; what is hidden,
    or left there by a system, is passed over. A list (`lists`) has `video`, relative to the list, and `prompt`.
    UserError if there are none, or some are missing or have no prompt.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix.lower() in lists.SUFFIXES:
        found = [(path.parent / video, prompt) for video, prompt in lists.entries(path, ("video", "prompt"))]
        missing = [video for video, _ in found if not video.is_file()]
        if missing:
            raise UserError(f"{len(missing)} of {len(found)} videos in {path} are missing, the first is {missing[0]}")
    elif path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
        videos = sorted(file for file in files if not any(map(is_hidden, file.relative_to(path).parts)))
        if len(files) > len(videos):
            print(f"crcm: {path}: passed over {len(files) - len(videos)} hidden files", file=sys.stderr)
        silent = [video for video in videos if not video.with_suffix(".txt").is_file()]
        if silent:
            raise UserError(
                f"{len(silent)} of {len(videos)} videos have no prompt: write {silent[0].with_suffix('.txt').name} "
                f"beside {silent[0]}, or give a .jsonl or .csv list"
            )
        found = [(video, texts.read(video.with_suffix(".txt")).strip()) for video in videos]
    else:
        raise UserError(f"there is no {path}: give a folder of videos, or a .jsonl or .csv list of them")
    if not found:
        raise UserError(f"{path} holds no videos ({', '.join(SUFFIXES)})")
    return found


def read_clip(
    path: Path, *, frames: int, height: int, width: int, fps: float = 16.0, clip: int = 0
) -> np.ndarray | str:
    """Clip number `clip` of a video, each `frames` long at `fps`: uint8 `[frame, height, width, 3]`.

    Scaled so that it covers the canvas (bicubic), cropped about the centre; frames are repeated or dropped to reach
    `fps`. Where that cannot be had, why, in a few words.
    """
    told = pointer_at(path)
    if told:
        return told
    # Square pixels first. Frames are counted before they are scaled: what is not needed is not worked on.
    filters = (
        f"fps={fps},trim=end_frame={frames},scale=iw*sar:ih,"
        f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=bicubic,crop={width}:{height}"
    )
    start = ["-ss", f"{clip * frames / fps:.6f}"] if clip else []
    frames_out = ("-vf", filters, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    done = ffmpeg.run(*start, "-i", ffmpeg.url(path), "-map", "0:v:0", *frames_out)
    size = height * width * 3
    found = len(done.stdout) // size
    if found < frames:
        if done.returncode and ffmpeg.words(done):
            return f"cannot be decoded ({ffmpeg.words(done)})"
        return f"has {found} of {frames} frames at {fps:g} a second" + (f" in clip {clip}" if clip else "")
    return np.frombuffer(done.stdout, np.uint8, frames * size).reshape(frames, height, width, 3)
