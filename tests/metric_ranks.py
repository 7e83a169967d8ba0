"""Run by test_detection_metrics.py: score 13 images on 1, 2, 3 and 4 ranks over gloo and write what every rank got.

Ranks are forked from one process that has imported everything and started no thread.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lightning_modules.detection_metrics import CocoEvaluator
from lightning_modules.gather import compute_once, waiting_group
from lightning_modules.segmentation_metrics import SegmentationMetrics

COUNT, CLASSES = 13, 3


def fail(states):
    raise ValueError("no score")


def score(rank, world, images, maps):
    """One rank's share; the last of four ranks has none."""
    busy = min(world, 3)
    mine = list(range(rank, COUNT, busy)) if rank < busy else []
    evaluator, metrics = CocoEvaluator(CLASSES, True), SegmentationMetrics(CLASSES)
    for number in mine:
        prediction, target = images[number]
        evaluator.update([prediction], [target], torch.tensor([number]), torch.ones(1))
        metrics.update([maps[number][0]], [maps[number][1]], torch.ones(1))
    group = waiting_group()
    scores = evaluator.compute(group)
    again = evaluator.compute(waiting_group())
    assert again.named() == scores.named()
    try:
        failure = compute_once(None, fail, group)
    except (RuntimeError, ValueError) as error:
        failure = f"{type(error).__name__}: {error}"
    segmentation = metrics.scores()
    record = {
        "detection": scores.named(),
        "class_ap": np.nan_to_num(scores.mask.class_ap, nan=-1).tolist(),
        "confusion": scores.confusion.tolist(),
        "segmentation": segmentation.named(),
        "pixels": segmentation.confusion.tolist(),
    }
    return record, failure


def run_rank(rank, world, out, images, maps):
    store = dist.FileStore(str(out / f"store-{world}"), world)
    if world > 1:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    record, failure = score(rank, world, images, maps)
    (out / f"{world}-{rank}.json").write_text(json.dumps({"record": record, "failure": failure}))
    if world > 1:
        dist.destroy_process_group()


def main(out):
    spec = importlib.util.spec_from_file_location(
        "tests_of_metrics", Path(__file__).with_name("test_detection_metrics.py")
    )
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    rng = np.random.default_rng(0)
    images = [tests.random_image(rng, CLASSES, *rng.integers(0, 7, 2)) for _ in range(COUNT)]
    maps = [torch.from_numpy(rng.integers(0, CLASSES, (2, 9, 7))) for _ in range(COUNT)]
    for world in (1, 2, 3, 4):
        children = []
        for rank in range(world):
            if (child := os.fork()) == 0:
                code = 1
                try:
                    run_rank(rank, world, out, images, maps)
                    code = 0
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0] * world, codes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
