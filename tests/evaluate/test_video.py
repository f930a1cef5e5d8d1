"""Videos written and read back, in each of the formats."""

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image, ImageSequence

from crcm_jax.errors import UserError
from crcm_jax.evaluate.video import enlarge, frame_grid, to_uint8, write_video

# Reading an mp4 back starts ffmpeg, as writing one does; JAX warns of any fork.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")


@pytest.fixture
def video():
    """Five frames of 10×16: a bright bar that moves right by two pixels a frame."""
    frames = np.full((5, 10, 16, 1), -1, np.float32)
    for i in range(5):
        frames[i, :, 2 * i : 2 * i + 3] = 1
    return frames


def bar(frames):
    """Column of the bar's middle, in [0, 1] of the width."""
    bright = np.asarray(frames, np.float64)[..., 0].mean(1)
    return (bright * np.arange(bright.shape[1])).sum(1) / bright.sum(1) / bright.shape[1]


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".apng"])
def test_what_is_read_back_plays_the_same(tmp_path, video, suffix):
    path = write_video(tmp_path / "folder" / f"clip{suffix}", video, fps=4)
    assert [p.name for p in path.parent.iterdir()] == [f"clip{suffix}"]  # nothing half-written beside it
    if suffix == ".mp4":
        frames = iio.imread(path, plugin="FFMPEG")
        assert iio.immeta(path, plugin="FFMPEG")["fps"] == 4
    else:
        with Image.open(path) as image:
            assert image.info["duration"] == 250 and image.info["loop"] == 0
            frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    assert frames.shape == (5, 80, 128, 3)
    tolerance = 6 if suffix == ".mp4" else 0  # video coding loses a little
    np.testing.assert_allclose(frames.astype(int), enlarge(to_uint8(video)), atol=tolerance)
    np.testing.assert_allclose(np.diff(bar(frames)), 2 / 16, atol=0.01)


def test_png_shows_frames_in_a_row(tmp_path, video):
    with Image.open(write_video(tmp_path / "clip.png", video, scale=1)) as file:
        image = np.asarray(file)
    assert image.shape == (14, 5 * 20, 3)
    for i in range(5):
        np.testing.assert_array_equal(image[2:12, 20 * i + 2 : 20 * i + 18], to_uint8(video[i]))


def test_grid_has_a_row_for_each_clip(video):
    grid = frame_grid(np.stack([video, -video, video]), scale=2, gap=0)
    assert grid.shape == (3 * 20, 5 * 32, 3)
    np.testing.assert_array_equal(grid[:20], grid[40:])
    np.testing.assert_array_equal(grid[20:40], 255 - grid[:20])


def test_pixels_are_clipped_and_colour_is_kept():
    pixels = to_uint8(np.array([[[-9.0, 0.0, 9.0], [np.nan, -1.0, 1.0]]]))
    np.testing.assert_array_equal(pixels, [[[0, 128, 255], [0, 0, 255]]])


def test_odd_sizes_become_playable(tmp_path):
    path = write_video(tmp_path / "odd.mp4", np.zeros((3, 15, 17, 3)), scale=1)
    assert iio.imread(path, plugin="FFMPEG").shape == (3, 16, 18, 3)


def test_mistakes_are_named(tmp_path, video):
    with pytest.raises(UserError, match=r'"clip.avi": cannot write a video as ".avi", use .mp4, .gif'):
        write_video(tmp_path / "clip.avi", video)
    with pytest.raises(ValueError, match="frame, height, width, channel"):
        write_video(tmp_path / "clip.gif", video[0])
    with pytest.raises(ValueError, match="1 or 3 channels"):
        to_uint8(np.zeros((4, 4, 2)))
    assert not list(tmp_path.iterdir())
