"""The house's one reader of pictures: as a person sees them, or refused in one sentence.

Upright as the camera says, colours in sRGB, transparency laid on white, depths of more than 8 bits brought to 8.
"""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crcm_jax.errors import UserError
from crcm_jax.saving.reading import reading

if TYPE_CHECKING:
    from PIL.Image import Image

BACKGROUND = (255, 255, 255)
"""What transparent pixels are laid on."""

# Not all that the library knows: some formats start other programs, and some are vector graphics.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "ICO")
_SIXTEEN_BITS = 257
"""A value of 16 bits over the one of 8 that looks the same."""


def read(path: str | Path) -> Image:
    """The picture at `path` in 8-bit sRGB. UserError, one sentence, for what is no picture, is cut off or damaged, is
    larger than the decoder's safety limit, has several frames or pages, or numbers whose range nothing tells."""
    from PIL import Image, ImageOps

    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with reading(path, "a picture"), warnings.catch_warnings():
        # Told where half the limit is passed: large, and read all the same.
        warnings.simplefilter("ignore")
        with Image.open(path, formats=formats) as file:
            frames = getattr(file, "n_frames", 1)
            # A phone's second picture, as in its "MPO" files, is a preview or a depth map; the first is the picture.
            if frames > 1 and file.format != "MPO":
                raise UserError(f"{path} has {frames} frames or pages: save the one that is meant by itself")
            # Before any change of type: a profile belongs to the colours as they were stored.
            profile, kind = file.info.get("icc_profile"), file.format
            image = ImageOps.exif_transpose(file)
        rgb = _in_srgb(_eight_bits(image, kind, path), profile, path)
    return rgb


def _eight_bits(image: Image, kind: str | None, path: str | Path) -> Image:
    """The picture in a type of 8 bits a channel: L, RGB, CMYK or LAB, the first two with an alpha channel if any."""
    from PIL import Image

    mode = image.mode
    if mode.startswith("I") or mode == "F":
        pixels = np.asarray(image)
        if mode == "F":
            if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
                raise UserError(
                    f"{path} has floating-point numbers outside 0 to 1: save it with 8 or 16 bits a channel"
                )
            return Image.fromarray(np.round(pixels * 255).astype(np.uint8))
        if mode == "I" and kind not in ("PNG", "PPM"):
            raise UserError(
                f"{path} has integers of 32 bits, whose range nothing tells: save it with 8 or 16 a channel"
            )
        return Image.fromarray(np.round(np.clip(pixels, 0, 65535) / _SIXTEEN_BITS).astype(np.uint8))
    if mode in ("La", "RGBa"):
        return image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    if mode == "P" or (mode in ("1", "L", "RGB") and "transparency" in image.info):
        return image.convert("RGBA")
    if mode in ("L", "LA", "RGB", "RGBA", "CMYK", "LAB"):
        return image
    return image.convert("L" if mode == "1" else "RGB")


def _in_srgb(image: Image, profile: bytes | None, path: str | Path) -> Image:
    """Colours by the picture's own profile where it has one, then transparency laid on `BACKGROUND`."""
    from PIL import Image

    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image.convert({"LA": "L", "RGBA": "RGB"}[image.mode]) if alpha else image
    rgb = _by_profile(colours, profile, path) if profile else None
    rgb = rgb or colours.convert("RGB")
    if alpha is None:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, BACKGROUND), alpha)


def _by_profile(image: Image, profile: bytes, path: str | Path) -> Image | None:
    """None, with a line to the user, for a profile that is broken or of other colours: viewers pass it over too."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        print(f"crcm: the colour profile in {path} cannot be used: its colours are taken for sRGB", file=sys.stderr)
        return None
