"""A loading process that hangs, dies or takes too much memory stops the run with the sample it was at."""

import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from PIL import Image

from datamodules.dataset import SampleDataset
from datamodules.indexer import index_dataset
from datamodules.loader import EvalLoader, WorkerConfig
from datamodules.manifest import open_split, read_dataset
from datamodules.pack import pack
from datamodules.reader import ShardReader
from datamodules.sampler import EvalBatchSampler
from datamodules.tasks import CLASSIFICATION
from datamodules.transforms import EvalTransform
from datamodules.types import DataError
from datamodules.worker import Board, Task, worker_context

ROOT = Path(__file__).resolve().parent.parent
STARTS = ("fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", str(folder), shard_size_mib=0.02)
    return folder


def loader(folder, split="train", transform=None, **options):
    index = open_split(folder, read_dataset(folder), split)
    dataset = SampleDataset(ShardReader(index), CLASSIFICATION, transform or EvalTransform(8, None), 10)
    return EvalLoader(dataset, EvalBatchSampler(64, 32), WorkerConfig(1, **options))


def never_answer(folder):
    """Put named pipes in the place of the shards: opening one hangs, as a file on a dead network file system does."""
    for path in (folder / "train").glob("*.tar"):
        os.mkfifo(path.with_suffix(".pipe"))
        path.with_suffix(".pipe").rename(path)


@pytest.fixture(params=("fork", "forkserver"))
def hanging(request, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "copy")
    made = loader(tmp_path / "copy", start=request.param, timeout_s=2, rank=3)
    never_answer(tmp_path / "copy")
    return made


@pytest.mark.parametrize("hanging", ["fork"], indirect=True)
def test_a_hung_worker_is_named_with_its_sample_and_stacks(hanging, capfd):
    began = time.monotonic()
    expected = (
        r"^rank 3: data worker 0 hangs since \d+ s at \S+/train-0\S+\.tar, sample 'digit-\d+' \(data.timeout_s 2\); "
    )
    with pytest.raises(DataError, match=expected) as error:
        next(iter(hanging))
    assert time.monotonic() - began < 12  # starting the worker included
    assert "\n" not in str(error.value)
    (worker,) = hanging._iterator._workers
    hanging.close()
    assert not worker.is_alive()
    assert re.search(r'File ".*dataset.py", line \d+ in load', capfd.readouterr().err)


def kill_when_busy(loader):
    while not loader._board.tasks():
        time.sleep(0.02)
    os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)


def test_a_killed_worker_is_named_with_its_sample(hanging, caplog):
    stream = iter(hanging)
    threading.Thread(target=kill_when_busy, args=(hanging,)).start()
    # torch tells of it in the main thread, wherever that is, by a RuntimeError of its own
    expected = r"data worker 0 was killed by signal 9 while loading .*sample 'digit-\d+'; if memory ran out, use fewer"
    with pytest.raises((DataError, RuntimeError)) as error:
        next(stream)
    with caplog.at_level(logging.ERROR, "mirrorla"):
        hanging.close()
    assert re.search(expected, f"{error.value} {caplog.text}")
    assert re.search(expected, caplog.text)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A small file that holds an image of 6000x6000 pixels, 108 MB once decoded, behind a small image."""
    folder = tmp_path_factory.mktemp("big")
    (folder / "train").mkdir()
    with tarfile.open(folder / "train" / "t.tar", "w") as tar:
        for key, side in (("small", 8), ("big", 6000)):
            image = io.BytesIO()
            Image.new("RGB", (side, side)).save(image, format="PNG")
            for name, content in ((f"{key}.png", image.getvalue()), (f"{key}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index_dataset(folder)
    return folder


def load_big(folder, start, memory_gib):
    index = open_split(folder, read_dataset(folder), "train")
    dataset = SampleDataset(ShardReader(index), CLASSIFICATION, EvalTransform(8, None), 1)
    made = EvalLoader(dataset, EvalBatchSampler(2, 2), WorkerConfig(1, start=start, memory_gib=memory_gib))
    try:
        return [batch["id"].tolist() for batch in made]
    finally:
        made.close()


# A fork copies this test process with the locks that its other threads hold: it once hung beside parallel tests.
FORK_APART = [pytest.param(start, marks=pytest.mark.slow) if start == "fork" else start for start in STARTS]


@pytest.mark.parametrize("start", FORK_APART)
def test_a_sample_that_breaks_the_memory_limit_is_named(big, start):
    expected = r"t.tar, sample 'big': loading it takes more than data.worker_memory_gib 0.0625; raise the limit, or"
    with pytest.raises(DataError, match=expected):
        load_big(big, start, 0.0625)


def test_a_sufficient_memory_limit_changes_nothing(big):
    assert load_big(big, "forkserver", 1.0) == load_big(big, "forkserver", None) == [[0, 1]]


def test_a_warning_to_the_whole_job_leaves_the_workers_alone(digits):
    made = loader(digits, start="forkserver")
    stream = iter(made)
    next(stream)
    (worker,) = made._iterator._workers
    for pid in (worker.pid, forkserver._forkserver._forkserver_pid):
        os.kill(pid, signal.SIGUSR1)
    assert len(next(stream)["id"]) == 32
    made.close()
    assert len(next(iter(made))["id"]) == 32  # the server starts another worker
    made.close()


def test_only_a_loader_with_workers_starts_a_fork_server():
    program = """
from multiprocessing import forkserver
from datamodules.worker import worker_context
for workers in (0, 1):
    worker_context("forkserver", workers)
    print(forkserver._forkserver._forkserver_pid is not None)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_a_fork_server_ends_with_a_killed_trainer_while_it_still_imports():
    program = """
import time
from multiprocessing import forkserver
from datamodules.worker import worker_context
worker_context("forkserver", 1)
print(forkserver._forkserver._forkserver_pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
        maps = Path("/proc", trainer.stdout.readline().strip(), "maps")
        while "_ctypes" not in maps.read_text():  # the first thing that is preloaded loads it
            time.sleep(0.01)
        time.sleep(0.05)
        assert "libtorch_cpu" not in maps.read_text(), "the server has imported torch already: nothing is shown"
        trainer.kill()
        until = time.monotonic() + 1
        while is_alive(maps.parent) and time.monotonic() < until:
            time.sleep(0.01)
        assert not is_alive(maps.parent)


def is_alive(process):
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_board_lists_the_longest_task_first():
    board = Board(worker_context("fork", 3), 3)
    assert board.tasks() == []
    board.note(2, 7)
    time.sleep(0.02)
    board.note(0, 5)
    (first, second) = board.tasks()
    assert (first.worker, first.sample, second.worker, second.sample) == (2, 7, 0, 5)
    assert isinstance(first, Task)
    assert first.seconds > second.seconds >= 0


def test_a_training_that_hangs_ends_with_one_line_and_exit_code_one(digits, tmp_path):
    """The command itself, whose shards stop answering in the middle of it."""
    shutil.copytree(digits, tmp_path / "digits")
    command = [
        *(sys.executable, "-m", "lightning_modules.cli", "fit", "--config", "digits/classification"),
        *("--run_dir", "run", "--data.path", "digits", "--data.num_workers", "1", "--data.timeout_s", "3"),
        *("--data.window", "16", "--trainer.max_epochs", "1000", "--data.batch_size", "16"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=tmp_path
    ) as process:
        output = ""
        for line in process.stdout:
            output += line
            if line.startswith("attempt 1"):
                never_answer(tmp_path / "digits")
    assert process.returncode == 1, output
    assert re.search(r"error: rank 0: data worker 0 hangs since \d s at \S+\.tar, sample 'digit-\d+' \(data.t", output)
    assert "most recent call first" in output
    assert "Traceback" not in output
