"""Any allowed image becomes 8-bit RGB, within limits told from its header; labels are digits and nothing else."""

import io
import random
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from datamodules.decode import MAX_IMAGE_BYTES, decode_image, parse_label
from datamodules.types import CorruptSampleError


def encode(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format=form, **options)
    return stream.getvalue()


def gradient(mode):
    pixels = np.linspace(0, 255, 12 * 10, dtype=np.uint8).reshape(12, 10)
    return Image.fromarray(pixels).convert(mode)


def test_grey_becomes_three_equal_channels():
    decoded = np.asarray(decode_image(encode(gradient("L")), "x"))
    assert decoded.shape == (12, 10, 3)
    for channel in range(3):
        np.testing.assert_array_equal(decoded[..., channel], np.asarray(gradient("L")))


@pytest.mark.parametrize(
    ("mode", "form"),
    [(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    + [(mode, "JPEG") for mode in ("L", "RGB", "CMYK", "YCbCr")]
    + [(mode, "WEBP") for mode in ("RGB", "RGBA")],
)
def test_every_mode_becomes_rgb(mode, form):
    image = decode_image(encode(gradient(mode), form), "x")
    assert (image.mode, image.size) == ("RGB", (10, 12))
    assert abs(np.asarray(image).mean() - 127.5) < 5  # dithering and compression


def test_sixteen_bit_grey_is_scaled_not_clipped():
    pixels = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(pixels)), "x"))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_transparent_palette_gives_no_warning_and_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    decoded = np.asarray(decode_image(encode(image, transparency=b"\0\xff"), "x"))
    assert decoded.tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_exif_orientation_is_ignored_as_documented():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(gradient("RGB"), "JPEG", exif=exif), "x").size == (10, 12)


def test_a_picture_with_an_embedded_preview_is_its_first_frame():
    data = encode(gradient("RGB"), "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert decode_image(data, "x").size == (10, 12)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(width, height):
    """A valid PNG header that promises width x height pixels, with next to no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 9000), (12000, 12000), (60000, 60000)])
def test_image_bombs_are_refused_from_the_header(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptSampleError, match=r"shard, sample 'k': .*pixels"):
        decode_image(bomb(*size), "shard, sample 'k'")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_animations_are_refused():
    frames = [gradient("RGB"), Image.new("RGB", (10, 12))]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(CorruptSampleError, match="k: an animation of 2 frames; pack single images"):
        decode_image(data, "k")


def test_files_beyond_the_size_limit_are_refused_unread():
    with pytest.raises(CorruptSampleError, match=f"an image of {MAX_IMAGE_BYTES + 1} bytes; the limit is"):
        decode_image(bytes(MAX_IMAGE_BYTES + 1), "k")


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(form):
    with pytest.raises(CorruptSampleError, match=r"k: not a readable JPEG, PNG or WEBP image \(cannot identify"):
        decode_image(encode(gradient("L"), form), "k")


def test_damaged_images_raise_one_kind_of_error_with_one_line():
    rng = random.Random(0)
    for form in ("JPEG", "PNG", "WEBP"):
        whole = encode(gradient("RGB"), form)
        for _ in range(150):
            damaged = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
            for _ in range(rng.randrange(1, 4)):
                if damaged:
                    damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                assert decode_image(bytes(damaged), "k").mode == "RGB"
            except CorruptSampleError as error:
                assert str(error).startswith("k: ")
                assert "\n" not in str(error)


def test_a_truncated_jpeg_is_refused_rather_than_filled_with_grey():
    whole = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    with pytest.raises(CorruptSampleError, match="truncated"):
        decode_image(whole[: len(whole) // 2], "k")


@pytest.mark.parametrize(("data", "label"), [(b"0", 0), (b"7\n", 7), (b" 999 ", 999), (b"007", 7)])
def test_labels_are_decimal_digits(data, label):
    assert parse_label(data, len(data), "k") == label


@pytest.mark.parametrize(
    "data", [b"", b" ", b"-1", b"+1", b"1.0", b"1e3", b"cat", b"1 2", b"\xd9\xa1", b"2147483648", b"0" * 17, b"1\0"]
)
def test_other_labels_are_refused_by_name(data):
    with pytest.raises(CorruptSampleError, match=r"^t.tar, sample 'k': label b'.*' is no class id; a cls file holds"):
        parse_label(data, len(data), "t.tar, sample 'k'")
