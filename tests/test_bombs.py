"""Small files that claim or unfold to gigabytes: refused within 64 MB, measured in a process of their own."""

import gzip
import io
import struct
import subprocess
import sys
import textwrap
import zlib
from functools import cache

from PIL import Image

MEMORY = """
    def status(name):  # in MB, of this process
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    def start():
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")  # the highest memory so far is forgotten
        return status("VmRSS")
"""


def small_png():
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format="PNG")
    return stream.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, *chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def jpeg_of(width, height):
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, format="JPEG")
    data = bytearray(stream.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_of(width, height):
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, format="WEBP", lossless=True)
    data = bytearray(stream.getvalue())
    at = data.index(b"VP8L") + 9
    bits = (width - 1) | (height - 1) << 14 | (struct.unpack("<I", data[at : at + 4])[0] & 0xF0000000)
    data[at : at + 4] = struct.pack("<I", bits)
    return bytes(data)


@cache
def bombs():
    """Each at most some hundred kilobytes that claim or hold gigabytes or at least 128 MiB."""
    inflated = zlib.compress(bytes(128 << 20))
    pixels = png_of(30_000, 30_000, chunk(b"IDAT", inflated))
    text = png_of(8, 8, chunk(b"zTXt", b"k\0\0" + inflated), chunk(b"IDAT", zlib.compress(bytes(200))))
    itxt = png_of(8, 8, chunk(b"iTXt", b"k\0\1\0\0\0" + inflated), chunk(b"IDAT", zlib.compress(bytes(200))))
    profile = png_of(8, 8, chunk(b"iCCP", b"k\0\0" + inflated), chunk(b"IDAT", zlib.compress(bytes(200))))
    surplus = png_of(8, 8, chunk(b"IDAT", inflated))  # far more pixels than the header says
    return {
        "png-pixels": pixels,
        "png-width": png_of(2**31 - 1, 1, chunk(b"IDAT", inflated[:999])),
        "png-ztxt": text,
        "png-itxt": itxt,
        "png-iccp": profile,
        "png-surplus": surplus,
        "jpeg": jpeg_of(65_500, 65_500),
        "webp": webp_of(16_383, 16_383),
        "gzip": gzip.compress(bytes(128 << 20), 6),
    }


DECODE = """
    import sys
    from pathlib import Path
    from datamodules.decode import decode_image
    from datamodules.types import CorruptSampleError
    first, *bombs = map(Path, sys.argv[1:])
    decode_image(first.read_bytes(), "first")  # plugins are loaded, then memory counts
    before = start()
    for bomb in bombs:
        try:
            image = decode_image(bomb.read_bytes(), bomb.name)
            print(f"{bomb.name}: decoded to {image.size}")
        except CorruptSampleError as error:
            print(error)
    print(status("VmHWM") - before)
"""


def run(script, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(MEMORY) + textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_image_and_gzip_bombs_cost_no_memory(tmp_path):
    (tmp_path / "first").write_bytes(small_png())
    for name, data in bombs().items():
        (tmp_path / name).write_bytes(data)
    *lines, growth_mb = run(DECODE, tmp_path / "first", *(tmp_path / name for name in bombs()))
    said = dict(line.split(": ", 1) for line in lines)
    assert list(said) == list(bombs())
    for name in ("png-pixels", "png-width", "jpeg", "webp"):
        assert " pixels" in said[name] and "limit" in said[name], said[name]
    assert "not a readable JPEG, PNG or WEBP image" in said["gzip"]
    assert float(growth_mb) < 64


JSON = """
    import sys
    from pathlib import Path
    from datamodules.manifest import read_dataset
    from datamodules.types import DataError
    before = start()
    for folder in sys.argv[1:]:
        try:
            read_dataset(Path(folder))
            print("read")
        except DataError as error:
            print(error)
    print(status("VmHWM") - before)
"""


def test_json_bombs_in_dataset_json_cost_no_memory(tmp_path):
    texts = {"deep": "[" * 1_000_000, "wide": "[" + "{}," * 600_000 + "{}]", "long": "["}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text(text)
    with (tmp_path / "long" / "dataset.json").open("r+") as stream:
        stream.truncate(1 << 30)
    *lines, growth_mb = run(JSON, *(tmp_path / name for name in texts))
    assert len(lines) == 3
    assert all("dataset.json is damaged" in line for line in lines)
    assert float(growth_mb) < 64
