"""Real processes, killed with -9 and resumed on other numbers of ranks and workers, train what one untouched does."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.indexer import index_dataset
from datamodules.ledger import read_attempt
from datamodules.manifest import open_split, read_dataset
from datamodules.quarantine import parse_faults
from lightning_modules.checkpoint import list_checkpoints, step_of

SCRIPT = Path(__file__).with_name("chaos_ranks.py")
BAD = (5, 120)  # samples whose bytes are damaged, and are skipped
STEPS = 2 * 20  # 2 epochs of 203 samples in batches of 10, which 3 and 4 ranks share unevenly


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos") / "data"
    rng = np.random.default_rng(0)
    for split, shards in (("train", (90, 0, 1, 60, 52)), ("val", (7,))):
        (folder / split).mkdir(parents=True)
        for shard, count in enumerate(shards):
            with tarfile.open(folder / split / f"{split}-{shard}.tar", "w") as tar:
                for i in range(count):
                    image = io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(image, format="PNG")
                    for name, content in (
                        (f"{shard}-{i}.png", image.getvalue()),
                        (f"{shard}-{i}.cls", b"%d" % (i % 3)),
                    ):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    index_dataset(folder)
    index = open_split(folder, read_dataset(folder), "train")
    for sample in BAD:
        location = index.locate(sample)
        with (folder / "train" / index.shard_names[location.shard]).open("r+b") as shard:
            shard.seek(location.fields["png"].offset + 40)
            shard.write(b"damage")
    return folder


@pytest.fixture(scope="module")
def start(data):
    """A function that runs one attempt in real processes and says whether it was killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:

        def attempt(folder, number, world, workers, kill_after=0, kill_rank=0):
            checkpoints = list_checkpoints(folder)
            order = {
                "data": str(data),
                "folder": str(folder),
                "attempt": number,
                "world": world,
                "workers": workers,
                "checkpoint": str(checkpoints[-1]) if checkpoints else None,
                "kill_after": kill_after,
                "kill_rank": kill_rank,
            }
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())["killed"], step_of(checkpoints[-1]) if checkpoints else 0

        yield attempt
        server.stdin.close()
        assert server.wait(30) == 0


def merge(folder, starts):
    """Per step, all ranks' ids in order and their losses: of each attempt what the next one did not train again."""
    steps = []
    for number, first in enumerate(starts, 1):
        ranks = read_attempt(folder / "ledger", number)
        last = starts[number] if number < len(starts) else STEPS
        assert len(steps) == first
        for step in range(first, last):
            entries = [rank[step - first] for rank in ranks]
            assert {(entry.step, entry.epoch) for entry in entries} == {(step, step // 20)}
            steps.append(([i for entry in entries for i in entry.ids], [entry.loss for entry in entries]))
    return steps


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """The run of one rank that nothing happened to, and that of two."""
    runs = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"whole{world}")
        assert start(folder, 1, world, 0) == (False, 0)
        runs[world] = merge(folder, [0])
        assert len(runs[world]) == STEPS
    return runs


def run_schedule(start, folder, worlds, seed):
    """Attempts on these numbers of ranks, all but the last killed at a random step; the merged ledger."""
    rng = random.Random(seed)
    starts = []
    for number, world in enumerate(worlds, 1):
        is_last = number == len(worlds)
        kill_after = 0 if is_last else rng.randint(1, 11)
        killed, first = start(folder, number, world, rng.randint(0, 3), kill_after, rng.randrange(world))
        assert killed != is_last, "".join(path.read_text()[-1500:] for path in sorted(folder.glob(f"log-{number}-*")))
        starts.append(first)
    listed = parse_faults((folder / "quarantine.jsonl").read_text())
    assert listed == {("train", sample): "damaged" for sample in BAD}
    return merge(folder, starts)


def check(steps, expected):
    assert [ids for ids, _ in steps] == [ids for ids, _ in expected]
    losses = [[np.mean(losses) for _, losses in run] for run in (steps, expected)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_other_numbers_of_ranks_and_workers_train_the_same_samples(start, tmp_path, uninterrupted, seed):
    check(run_schedule(start, tmp_path, [1, 3, 2, 4], seed), uninterrupted[1])


def test_the_same_number_of_ranks_gives_the_same_losses_bit_for_bit(start, tmp_path, uninterrupted):
    check(uninterrupted[2], uninterrupted[1])
    steps = run_schedule(start, tmp_path, [2, 2, 2], 2)
    assert [[loss.hex() for loss in losses] for _, losses in steps] == [
        [loss.hex() for loss in losses] for _, losses in uninterrupted[2]
    ]
    assert steps == uninterrupted[2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 125))
def test_many_random_schedules(start, tmp_path, uninterrupted, seed):
    rng = random.Random(seed)
    worlds = rng.choice([[1, 3, 2, 4], [4, 2, 3, 1], [2, 2, 2, 2], [3, 1, 4], [1, 1, 1], [4, 4, 2]])
    steps = run_schedule(start, tmp_path, worlds, seed)
    check(steps, uninterrupted[1])
    if set(worlds) <= {1} or set(worlds) <= {2}:
        assert steps == uninterrupted[worlds[0]]
