"""Videos to files that people can watch: mp4, GIF, animated PNG, or a PNG that shows all frames side by side."""

from __future__ import annotations

import errno
import io
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from crcm_jax.data import ffmpeg
from crcm_jax.errors import UserError, need
from crcm_jax.saving.files import atomic

SUFFIXES = (".mp4", ".gif", ".apng", ".png")

NOT_FINITE = (
    "are not finite (NaN or infinity): the weights are damaged, or diverged in training; use others, or an earlier "
    "checkpoint"
)
"""How a sentence about such values ends."""

_VISIBLE = 128  # Clips whose longer side is shorter, in pixels, are enlarged to about this.


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Pixels in [−1, 1] `[…, channel]`, 1 or 3 channels → uint8 `[…, 3]`; values outside are clipped, NaN is black.

    Black is for what is drawn while a run goes on; what a user asked for is held against `require_finite` first.
    """
    video = np.asarray(video, np.float32)
    if video.ndim < 3 or video.shape[-1] not in (1, 3):
        raise ValueError(f"a video has 1 or 3 channels in its last axis, this array's shape is {video.shape}")
    pixels = np.round((np.clip(np.nan_to_num(video, nan=-1.0), -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def require_finite(video: np.ndarray, what: str = "the clip") -> np.ndarray:
    """`video` as it is; UserError, calling it `what`, if a value of it is NaN or infinite: no such clip can be seen."""
    bad = video.size - int(np.isfinite(video).sum())
    if bad:
        raise UserError(f"{what} holds {bad / video.size:.1%} values that {NOT_FINITE}")
    return video


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
    small clips to about 128 pixels). Returns the path. UserError for another suffix, and where the file cannot be
    written or does not play afterwards: what was there is kept. MissingPackage as in `ready`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f'"{path.name}": cannot write a video as "{suffix or "no suffix"}", use {", ".join(SUFFIXES)}')
    if np.ndim(video) != 4:
        raise ValueError(f"a video is [frame, height, width, channel], this array's shape is {np.shape(video)}")
    ready(path)
    with atomic(path) as draft:
        if suffix == ".mp4":
            frames = enlarge(to_uint8(video), scale)
            _encode(draft, frames, fps)
            _require_playable(draft, len(frames))
        elif suffix == ".png":
            draft.write_bytes(_png(frame_grid(np.asarray(video)[None], scale)))
        else:
            draft.write_bytes(_moving(suffix, enlarge(to_uint8(video), scale), fps))
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


def _png(image: np.ndarray) -> bytes:
    # In memory first: the library's own writing to a file says of a full disk only that something is wrong.
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _moving(suffix: str, frames: np.ndarray, fps: float) -> bytes:
    images, file = [Image.fromarray(frame) for frame in frames], io.BytesIO()
    kind = "GIF" if suffix == ".gif" else "PNG"
    images[0].save(file, kind, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return file.getvalue()


def _encode(path: Path, frames: np.ndarray, fps: float) -> None:
    """H.264 as every player shows it. OSError if ffmpeg fails, with its own last words."""
    # 4:2:0 chroma, the only kind that every player shows, needs even sides.
    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)])
    height, width = frames.shape[1:3]
    rate = str(Fraction(fps).limit_denominator())
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-"]
    result = ["-c:v", "libx264", "-crf", "25", "-pix_fmt", "yuv420p", ffmpeg.url(path)]
    done = ffmpeg.run("-y", *source, "-an", *result, given=np.ascontiguousarray(frames).data)
    if done.returncode:
        raise _failure(path, done, "the video's encoder failed")


def _require_playable(path: Path, frames: int) -> None:
    """OSError unless the file plays from its first frame to its last: encoders have been seen to hide a full disk."""
    done = ffmpeg.run("-i", ffmpeg.url(path), "-map", "0:v:0", "-f", "framecrc", "-")
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith(b"#")]
    if done.returncode or len(lines) != frames:
        raise _failure(path, done, f"only {len(lines)} of {frames} frames of what was encoded can be played")


def _failure(path: Path, done: subprocess.CompletedProcess, what: str) -> OSError:
    return OSError(errno.EIO, f"{what}: {ffmpeg.words(done) or f'exit code {done.returncode}'}", str(path))
