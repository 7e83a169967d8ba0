"""Bytes to images and labels, for an allow-list of formats, with every limit checked before anything is decoded.

An image is what its pixels are: EXIF orientation is ignored, as in torchvision's ImageFolder and timm, with which the
published ImageNet numbers were measured. Alpha is dropped, 16-bit grey reduced to 8 bits, CMYK and palettes become RGB.
Nothing here can run code: no pickle, no `.pyd`, no NumPy objects.
"""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image

from datamodules.types import CorruptSampleError, DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 64 << 20
MAX_LABEL_BYTES = 16
MAX_LABEL = (1 << 31) - 1

_FORMATS = ("JPEG", "PNG", "WEBP")


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decode one image to 8-bit RGB.

    Args:
        data: a whole JPEG, PNG or WEBP file.
        where: names the sample in errors.

    Returns:
        The image (H, W), mode RGB.

    Raises:
        CorruptSampleError: too many bytes or pixels (told from the header, before decoding), an animation, another
            format or damaged bytes.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise CorruptSampleError(
            f"{where}: an image of {len(data)} bytes; the limit is {MAX_IMAGE_BYTES}", "over_limit"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about harmless metadata, and about bombs below our limit
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_header(image, where)
                return _to_rgb(image)
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise CorruptSampleError(f"{where}: {error}", "over_limit") from None
    except Exception as error:  # Pillow's plugins raise almost anything on damaged bytes (OSError, SyntaxError, struct)
        message = f"{where}: not a readable JPEG, PNG or WEBP image ({_brief(error)})"
        raise CorruptSampleError(message, "undecodable") from None


def _brief(error: Exception) -> str:
    return re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", " its bytes", str(error)) or type(error).__name__


def _check_header(image: Image.Image, where: str) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        message = f"{where}: an image of {width}x{height} pixels; the limit is {MAX_IMAGE_PIXELS}"
        raise CorruptSampleError(message, "over_limit")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        message = f"{where}: an animation of {getattr(image, 'n_frames', 1)} frames; pack single images"
        raise CorruptSampleError(message, "over_limit")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image.copy() if image.format == "MPO" else image
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip instead of scaling
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def parse_label(data: bytes, size: int, where: str) -> int:
    """Read a `cls` field: the class id in decimal digits, white space around it allowed.

    Args:
        data: the field, or its beginning.
        size: the field's length in bytes.
        where: names the sample in errors.

    Raises:
        CorruptSampleError: text, a sign, a fraction, an empty or an overlong field.
    """
    text = data.strip()
    if size > MAX_LABEL_BYTES or re.fullmatch(rb"[0-9]+", text) is None or int(text) > MAX_LABEL:
        message = f"{where}: label {data[:32]!r} is no class id; a cls file holds one integer >= 0"
        raise CorruptSampleError(message, "label")
    return int(text)
