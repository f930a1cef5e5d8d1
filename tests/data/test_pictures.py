"""Pictures as a person sees them: orientation, transparency, depth, colours, frames; or refused in one sentence."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from crcm_jax.data import pictures
from crcm_jax.errors import UserError

COLOURS = np.array(
    [[[250, 10, 20], [10, 240, 30], [20, 30, 230]], [[0, 0, 0], [128, 128, 128], [255, 255, 255]]], np.uint8
)
COLOURS = COLOURS.repeat(8, 0).repeat(8, 1)  # 16 × 24: large patches, which JPEG keeps


def near(path, wanted, within=0):
    found = np.asarray(pictures.read(path)).astype(int)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= within


STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: np.rot90,
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, -1),
}
"""How a camera stores what is upright, by EXIF's number for it."""
LOSSLESS = {"png": {}, "tiff": {}, "webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("orientation", STORED)
def test_upright_as_the_camera_says(tmp_path, orientation, kind):
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](COLOURS)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{kind}", exif=exif, **LOSSLESS[kind])
    near(tmp_path / f"a.{kind}", COLOURS, 12 if kind == "jpg" else 0)


def test_transparency_is_laid_on_white(tmp_path):
    alpha = np.zeros((16, 24), np.uint8)
    alpha[:, 12:] = 255
    alpha[:4] = 128
    over = alpha[..., None] / 255
    wanted = np.round(COLOURS * over + 255 * (1 - over))
    Image.fromarray(np.dstack([COLOURS, alpha])).save(tmp_path / "rgba.png")
    near(tmp_path / "rgba.png", wanted, 1)
    grey = COLOURS[..., 0]
    Image.fromarray(np.dstack([grey, alpha]), "LA").save(tmp_path / "la.png")
    near(tmp_path / "la.png", np.round(grey[..., None].repeat(3, 2) * over + 255 * (1 - over)), 1)
    palette = Image.fromarray(COLOURS).quantize(8)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    palette.save(tmp_path / "p.gif", transparency=palette.getpixel((0, 0)))
    wanted = COLOURS.copy()
    wanted[:8, :8] = 255
    near(tmp_path / "p.png", wanted, 3)
    near(tmp_path / "p.gif", wanted, 3)
    Image.fromarray(COLOURS).save(tmp_path / "key.png", transparency=tuple(int(c) for c in COLOURS[0, 0]))
    near(tmp_path / "key.png", wanted)
    Image.fromarray(COLOURS).save(tmp_path / "opaque.gif")
    near(tmp_path / "opaque.gif", COLOURS, 3)


def png_of_16_bits(path, pixels):
    """Grey, RGB or with alpha; written by hand, since the library writes grey alone."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_depths_of_more_than_8_bits(tmp_path):
    deep = COLOURS.astype(np.uint16) * 257
    grey = COLOURS[..., :1].repeat(3, 2)
    png_of_16_bits(tmp_path / "grey.png", deep[..., :1])
    png_of_16_bits(tmp_path / "rgb.png", deep)
    png_of_16_bits(tmp_path / "la.png", np.dstack([deep[..., 0], np.full((16, 24), 65535)]))
    near(tmp_path / "grey.png", grey)
    near(tmp_path / "la.png", grey)
    near(tmp_path / "rgb.png", COLOURS)
    Image.fromarray(deep[..., 0]).save(tmp_path / "grey.tiff")
    near(tmp_path / "grey.tiff", grey)
    Image.fromarray((COLOURS[..., 0] / 255).astype(np.float32)).save(tmp_path / "float.tiff")
    near(tmp_path / "float.tiff", grey)
    for name, pixels in (("beyond", COLOURS[..., 0].astype(np.float32)), ("nan", np.full((4, 4), np.nan, np.float32))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.tiff")
        with pytest.raises(UserError, match=rf"{name}\.tiff has floating-point numbers outside 0 to 1"):
            pictures.read(tmp_path / f"{name}.tiff")
    Image.fromarray(COLOURS[..., 0].astype(np.int32) * 1000).save(tmp_path / "wide.tiff")
    with pytest.raises(UserError, match=r"wide\.tiff has integers of 32 bits"):
        pictures.read(tmp_path / "wide.tiff")
    Image.fromarray(COLOURS[..., 0] > 127).save(tmp_path / "bits.png")
    near(tmp_path / "bits.png", np.where(grey > 127, 255, 0))


def swapped_profile():
    """An RGB profile whose red is blue and whose blue is red: what a wide gamut does, seen without a measure."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", content, 128)[0]
    entries = {bytes(content[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    content[red + 4 : red + 12], content[blue + 4 : blue + 12] = (
        content[blue + 4 : blue + 12],
        content[red + 4 : red + 12],
    )
    return bytes(content)


def test_colours_by_the_pictures_own_profile(tmp_path, capsys):
    swapped = COLOURS[..., ::-1]
    Image.fromarray(swapped).save(tmp_path / "rgb.png", icc_profile=swapped_profile())
    near(tmp_path / "rgb.png", COLOURS, 3)
    alpha = np.full((16, 24, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([swapped, alpha], 2)).save(tmp_path / "rgba.png", icc_profile=swapped_profile())
    near(tmp_path / "rgba.png", COLOURS, 3)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(COLOURS).save(tmp_path / "srgb.png", icc_profile=srgb)
    near(tmp_path / "srgb.png", COLOURS, 1)
    assert capsys.readouterr().err == ""
    Image.fromarray(COLOURS).save(tmp_path / "broken.png", icc_profile=b"no profile at all")
    near(tmp_path / "broken.png", COLOURS)
    Image.fromarray(COLOURS[..., 0]).save(tmp_path / "other.png", icc_profile=srgb)  # of three colours, on grey
    near(tmp_path / "other.png", COLOURS[..., :1].repeat(3, 2))
    told = capsys.readouterr().err
    assert told.count("cannot be used: its colours are taken for sRGB") == 2 and "broken.png" in told


def test_cmyk(tmp_path):
    Image.fromarray(COLOURS).convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    near(tmp_path / "a.jpg", COLOURS, 12)


def test_several_frames_are_refused(tmp_path):
    frames = [Image.fromarray(COLOURS), Image.fromarray(COLOURS[::-1].copy())]
    for name in ("a.gif", "a.webp", "a.tiff", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(UserError, match=rf"{name} has 2 frames or pages: save the one that is meant by itself"):
            pictures.read(tmp_path / name)
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:], quality=100, subsampling=0)
    near(tmp_path / "phone.jpg", COLOURS, 12)  # the second one is not the picture


@pytest.mark.filterwarnings("error")
def test_a_picture_beyond_the_decoders_limit_is_one_sentence_and_a_large_one_is_read(tmp_path, monkeypatch):
    Image.fromarray(COLOURS).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 24 - 1)  # beyond this it warns, beyond twice it refuses
    near(tmp_path / "large.png", COLOURS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 24 // 2 - 1)
    with pytest.raises(
        UserError, match=r"large\.png cannot be read as a picture \(Image size \(384 pixels\)"
    ) as caught:
        pictures.read(tmp_path / "large.png")
    assert "\n" not in str(caught.value)


def test_what_is_no_picture_is_one_sentence(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    Image.fromarray(COLOURS).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-30])
    (tmp_path / "folder.png").mkdir()
    for name in ("text.png", "empty.png", "program.eps", "cut.png", "folder.png", "nowhere.png"):
        with pytest.raises(UserError, match=rf"{name} cannot be read as a picture") as caught:
            pictures.read(tmp_path / name)
        assert "\n" not in str(caught.value)
