"""Real processes over gloo: two ranks continue what one began, and every step stays the same."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.pack import pack

SCRIPT = Path(__file__).with_name("two_ranks.py")
BATCHES = 6  # 57 training samples in batches of 9, which two ranks share 4 to 5


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """What one rank was given in 3 epochs, and what two ranks were, which resumed it in its second epoch."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 57), ("val", 21)):
        for i in range(count):
            path = folder / split / "abc"[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    packed, checkpoint = folder / "packed", folder / "x.ckpt"
    pack("imagefolder", str(packed), data=str(folder), shard_size_mib=0.04)
    spec = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.run(packed, checkpoint, folder, 1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
    command = [sys.executable, str(SCRIPT), str(packed), str(checkpoint), str(folder)]
    done = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json")]


def test_two_ranks_share_every_batch_of_a_run_that_one_rank_began(records):
    alone, *ranks = records
    assert len(alone["train"]) == 3 * BATCHES
    assert [{len(ids) for ids in rank["train"]} for rank in ranks] == [{4}, {5}]
    together = [first + second for first, second in zip(ranks[0]["train"], ranks[1]["train"], strict=True)]
    assert together == alone["train"][8:]


def test_gradients_of_uneven_shares_average_to_those_of_one_rank(records):
    alone, *ranks = records
    assert ranks[0]["weights"] == ranks[1]["weights"]
    np.testing.assert_allclose(ranks[0]["weights"], alone["weights"], rtol=1e-5, atol=1e-6)


def test_evaluation_sees_every_sample_once_in_equally_many_steps(records):
    _, *ranks = records
    seen = [sample for rank in ranks for sample, real in rank["val"] if real]
    assert sorted(seen) == list(range(21))
    assert len(ranks[0]["val"]) == len(ranks[1]["val"]) == 12
