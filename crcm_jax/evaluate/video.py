"""Videos to files that people can watch: mp4, GIF, animated PNG, or a PNG that shows all frames side by side."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from crcm_jax.errors import UserError, need

SUFFIXES = (".mp4", ".gif", ".apng", ".png")

_VISIBLE = 128  # Clips whose longer side is shorter, in pixels, are enlarged to about this.


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Pixels in [−1, 1] `[…, channel]`, 1 or 3 channels → uint8 `[…, 3]`; values outside are clipped, NaN is black."""
    video = np.asarray(video, np.float32)
    if video.ndim < 3 or video.shape[-1] not in (1, 3):
        raise ValueError(f"a video has 1 or 3 channels in its last axis, this array's shape is {video.shape}")
    pixels = np.round((np.clip(np.nan_to_num(video, nan=-1.0), -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def enlarge(frames: np.ndarray, scale: int | None = None) -> np.ndarray:
    """uint8 frames `[…, height, width, 3]` with every pixel `scale` × `scale`; by default tiny ones become visible."""
    scale = scale or max(1, round(_VISIBLE / max(frames.shape[-3:-1])))
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def ready(path: str | Path) -> None:
    """Raises MissingPackage where a file of this suffix needs a package that is not installed."""
    if Path(path).suffix.lower() == ".mp4":
        need("imageio.v3", extra="video")
        need("imageio_ffmpeg", extra="video")


def write_video(path: str | Path, video: np.ndarray, fps: float = 8, scale: int | None = None) -> Path:
    """Write `video` `[frame, height, width, channel]` in [−1, 1] as the suffix says, whole or not at all.

    `.png` shows the frames in a row; the others play at `fps` frames per second. `scale` enlarges every pixel (default:
    small clips to about 128 pixels). Returns the path. UserError for another suffix, MissingPackage as in `ready`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f'"{path.name}": cannot write a video as "{suffix or "no suffix"}", use {", ".join(SUFFIXES)}')
    if np.ndim(video) != 4:
        raise ValueError(f"a video is [frame, height, width, channel], this array's shape is {np.shape(video)}")
    ready(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_name(f".{path.stem}.{os.getpid()}{suffix}")
    try:
        if suffix == ".png":
            Image.fromarray(frame_grid(np.asarray(video)[None], scale)).save(half_written)
        else:
            _write_moving(half_written, enlarge(to_uint8(video), scale), fps)
        os.replace(half_written, path)
    finally:
        half_written.unlink(missing_ok=True)
    return path


def animated_png(video: np.ndarray, fps: float = 8, hold: float = 0.6) -> bytes:
    """A file that loops `video` `[frame, height, width, channel]`, resting `hold` seconds on the last frame."""
    images = [Image.fromarray(frame) for frame in to_uint8(video)]
    durations = [1000 / fps] * (len(images) - 1) + [1000 / fps + 1000 * hold]
    file = io.BytesIO()
    images[0].save(file, "PNG", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return file.getvalue()


def frame_grid(videos: np.ndarray, scale: int | None = None, gap: int = 2) -> np.ndarray:
    """uint8 image `[height, width, 3]`: a row for each clip of `videos` `[clip, frame, height, width, channel]`."""
    frames = enlarge(to_uint8(videos), scale)
    padded = np.pad(frames, [(0, 0), (0, 0), (gap, gap), (gap, gap), (0, 0)], constant_values=128)
    clips, count, height, width, _ = padded.shape
    return padded.transpose(0, 2, 1, 3, 4).reshape(clips * height, count * width, 3)


def _write_moving(path: Path, frames: np.ndarray, fps: float) -> None:
    if path.suffix.lower() == ".mp4":
        imageio = need("imageio.v3", extra="video")
        # 4:2:0 chroma, the only kind that every player shows, needs even sides.
        frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)])
        with warnings.catch_warnings():
            # JAX warns of every fork; this one becomes ffmpeg at once and runs nothing of ours.
            warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
            options = dict(fps=fps, codec="libx264", pixelformat="yuv420p", macro_block_size=2)
            imageio.imwrite(path, frames, plugin="FFMPEG", **options)
        return
    images = [Image.fromarray(frame) for frame in frames]
    kind = "GIF" if path.suffix.lower() == ".gif" else "PNG"
    images[0].save(path, kind, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
