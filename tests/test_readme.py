"""README is true: every command in it runs, in its order, and every Python example executes."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.tables import filled_in

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent

# What a command becomes here: a whole run is shortened, 8 GPUs become one CPU, a placeholder becomes a real folder.
ONE_STEP_ON_CPU = (
    " --data.path data/imagenet --data.num_workers 0 --data.batch_size 16 --model.num_classes 2 --model.mix.mixup 0"
    " --model.mix.cutmix 0 --trainer.accelerator cpu --trainer.devices 1 --trainer.strategy auto"
    " --trainer.precision 32-true --trainer.max_steps 1 --data.train_transform.image_size 32"
    " --data.eval_transform.image_size 32 --data.eval_transform.resize 32"
)
TWO_STEPS = " --trainer.max_steps 2 --trainer.limit_val_batches 1"
FROM_CLASSIFIER = (
    "mirrorla fit --config digits/segmentation_upernet --model.backbone.pretrained runs/digits-classification"
)
INSTEAD = {
    "make test": None,  # this is it
    "make train": f"make -C {ROOT} train RUN_DIR=$PWD/runs/digits-classification",
    "pip install -e .": f"{sys.executable} -m pip install --dry-run --no-index --no-build-isolation -e {ROOT}",
    "tensorboard --logdir runs": None,  # a server: has its own test
    "mirrorla shards pack --source imagefolder --data /path/to/imagenet --out data/imagenet": (
        "mirrorla shards pack --source imagefolder --data imagenet --out data/imagenet"
    ),
    "mirrorla fit --config digits/classification --run_dir runs/by-hand": (
        "mirrorla fit --config digits/classification --run_dir runs/by-hand --trainer.max_steps 5"
    ),
    "mirrorla fit --config digits/detection": f"mirrorla fit --config digits/detection{TWO_STEPS}",
    "mirrorla fit --config digits/segmentation": (
        "mirrorla shards pack --source digits --task segmentation --scenes 40 --out data/digits-segmentation"
        f" && mirrorla fit --config digits/segmentation{TWO_STEPS}"
    ),
    FROM_CLASSIFIER: FROM_CLASSIFIER + TWO_STEPS,
    "mirrorla fit --config imagenet/mirrorla_tiny": "mirrorla fit --config imagenet/mirrorla_tiny" + ONE_STEP_ON_CPU,
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [command for line in lines if (command := line.split("  #")[0].strip())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder, but for a tiny tree of images to pack."""
    folder = tmp_path_factory.mktemp("user")
    for split, count in (("train", 16), ("val", 4)):
        for name in ("cat", "dog"):
            (folder / "imagenet" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([index, len(name)]).integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "imagenet" / split / name / f"{index}.jpg")
    shutil.copytree(folder / "imagenet" / "val" / "cat", folder / "photos")
    return folder


def shell(command, folder):
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )


def test_every_replaced_command_is_in_readme():
    assert set(INSTEAD) <= set(commands())


@pytest.mark.parametrize("command", [c for c in commands() if INSTEAD.get(c, c) is not None])
def test_command_runs(command, folder):
    """In README's order: later commands use what earlier ones made."""
    done = shell(INSTEAD.get(command, command), folder)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    if command == "make train":
        (top1,) = re.findall(r"validation top-1.*?([\d.]+)%", done.stdout)
        assert float(top1) >= 98.0
        assert str(folder / "runs" / "digits-classification") in done.stdout


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_example_executes(number):
    exec(compile(blocks("python")[number], f"README example {number}", "exec"), {})


def test_tensorboard_serves_the_runs(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(BIN / "tensorboard"), "--logdir", "runs", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wanted, found = "val/top1", ""
        deadline = time.monotonic() + 60
        while wanted not in found and time.monotonic() < deadline:
            time.sleep(0.5)
            try:
                url = f"http://127.0.0.1:{port}/data/plugin/scalars/tags"
                found = urllib.request.urlopen(url, timeout=5).read().decode()
            except OSError:
                assert server.poll() is None
        assert wanted in found
    finally:
        server.terminate()
        server.wait(20)


def test_the_tree_names_what_is_there():
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", TEXT, re.DOTALL)
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).is_dir()


def test_measured_tables_are_those_of_the_results():
    assert filled_in(TEXT) == TEXT
