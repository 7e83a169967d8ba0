"""Packing survives kill -9, goes on behind the last finished shard, and two packers do not meet."""

import hashlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from datamodules.manifest import open_split, read_dataset
from datamodules.pack import pack
from datamodules.reader import ShardReader
from datamodules.resize import resized
from datamodules.sources import SourceOptions, open_source
from datamodules.types import DataError

SCENES = SourceOptions(task="detection", scenes=100)
PACK = (
    "import sys\n"
    "from datamodules.pack import pack\n"
    "from datamodules.sources import SourceOptions, open_source\n"
    "source = open_source('digits', SourceOptions(task='detection', scenes=100))\n"
    "{}"
    "pack(source, sys.argv[1], shard_size_mib=0.05, workers=2)\n"
)


def start(out, extra=""):
    return subprocess.Popen([sys.executable, "-c", PACK.format(extra), str(out)], stderr=subprocess.PIPE, text=True)


def snapshot(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def leftover(tmp_path_factory):
    """The folder of a packer that was killed -9 when it had finished six shards."""
    out = tmp_path_factory.mktemp("killed") / "out"
    working = out.with_name(".out.packing")
    process = start(out)
    try:
        while len(list(working.glob("train/train-*.tar"))) < 6:
            assert process.poll() is None, "packing ended before it was killed"
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert not out.exists()
    return working


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same dataset packed without an interruption."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    pack(open_source("digits", SCENES), str(folder), shard_size_mib=0.05, workers=1)
    return snapshot(folder)


def test_packing_goes_on_after_kill_9_and_gives_the_same_bytes(tmp_path, leftover, whole):
    out = tmp_path / "out"
    working = shutil.copytree(leftover, tmp_path / ".out.packing")
    finished = {path.name: path.stat().st_mtime_ns for path in working.glob("*/*.tar")}
    info = pack(open_source("digits", SCENES), str(out), shard_size_mib=0.05, workers=3)
    assert info.splits["train"].shards > len(finished) >= 6
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*/*.tar") if path.name in finished}
    assert kept == finished
    assert snapshot(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list(out.rglob(".*"))


@pytest.mark.slow
def test_packing_survives_being_killed_again_and_again(tmp_path, whole):
    out, kills = tmp_path / "out", 0
    for attempt in range(200):
        process = start(out)
        try:
            process.communicate(timeout=2.5 + attempt * 0.05)  # the start alone takes seconds
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert process.returncode == 0 and kills >= 3
    assert snapshot(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_plan_left_is_swept(tmp_path, leftover):
    out = tmp_path / "out"
    shutil.copytree(leftover, tmp_path / ".out.packing")
    info = pack(open_source("digits"), str(out))
    assert read_dataset(out) == info
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "dataset.json",
        *("train/index.bin", "train/train-000000.tar", "val/index.bin", "val/val-000000.tar"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_packer_waits_for_the_first(tmp_path, whole):
    processes = [start(tmp_path / "out") for _ in range(2)]
    for process in processes:
        assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert snapshot(tmp_path / "out") == whole


def test_packing_stopped_by_a_full_disk_goes_on_when_there_is_room(tmp_path, whole):
    """An OSError is not the input's fault, so the finished shards stay."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (33_000, 33_000))\n"
    told = start(tmp_path / "out", limit).communicate(timeout=120)[1]
    assert "out: File too large; the finished shards are kept, mend that and run the same command again" in told
    assert [path.name for path in tmp_path.iterdir()] == [".out.packing"]
    pack(open_source("digits", SCENES), str(tmp_path / "out"), shard_size_mib=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert snapshot(tmp_path / "out") == whole


def test_images_are_made_smaller_only_if_asked_and_only_if_larger(tmp_path):
    folder = tmp_path / "images"
    for name, size, kind in (("large", (100, 60), "jpg"), ("small", (30, 20), "jpg"), ("tall", (50, 200), "png")):
        path = folder / "train" / "a" / f"{name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    source = resized(open_source("imagefolder", SourceOptions(str(folder))), 32)
    info = pack(source, str(tmp_path / "out"))
    reader = ShardReader(open_split(tmp_path / "out", info, "train"))
    sizes = {}
    for sample in range(3):
        raw = reader.read(sample, ["jpg", "png"])
        ((extension, data),) = raw.fields.items()
        (tmp_path / f"x.{extension}").write_bytes(data)
        with Image.open(tmp_path / f"x.{extension}") as image:
            sizes[raw.key] = (image.format, *image.size)
        assert (data == (folder / "train" / f"{raw.key}.{extension}").read_bytes()) == (raw.key == "a/small")
    assert sizes == {"a/large": ("JPEG", 53, 32), "a/small": ("JPEG", 30, 20), "a/tall": ("PNG", 32, 128)}
    with pytest.raises(DataError, match="holds another dataset"):
        pack(open_source("imagefolder", SourceOptions(str(folder))), str(tmp_path / "out"))
    with pytest.raises(DataError, match="--resize is 0; it must be at least 1"):
        resized(source, 0)
    with pytest.raises(DataError, match="--resize is for classification; detection scales images, boxes and masks"):
        resized(open_source("digits", SCENES), 32)
