"""How long the scores of a detection validation set take, and how much memory: `python -m benchmarks.evaluation`.

Synthetic sets of COCO's size: images of 640x480, 80 classes, about 7 objects and 100 detections each. Every point is
measured in a process of its own, on the CPU, from masks as a model gives them to the scores: `collect` is the time of
CocoEvaluator.update (the making of the synthetic images is left out), `score` that of CocoEvaluator.compute, each in
seconds on the clock and of the processor, which other work on the machine does not stretch. pycocotools scores the same
detections, from run-length codes that are already there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import RESULTS, provenance, write_csv
from lightning_modules.detection_metrics import CocoEvaluator
from lightning_modules.detection_state import ImageState, Marks, as_xywh, marks_of

CLASSES, HEIGHT, WIDTH, OBJECTS, DETECTIONS = 80, 480, 640, 7, 100

Example = dict[str, Tensor]


def examples(num_images: int, has_masks: bool) -> Iterator[tuple[Example, Example]]:
    """Predictions and targets; 60 of 100 detections are objects that were moved, the rest lie anywhere."""
    rng = np.random.default_rng(0)
    for _ in range(num_images):
        truth = _boxes(rng, rng.poisson(OBJECTS))
        labels = rng.integers(1, CLASSES + 1, len(truth))
        found, guesses = _boxes(rng, DETECTIONS), rng.integers(1, CLASSES + 1, DETECTIONS)
        if len(truth):
            near = rng.integers(len(truth), size=60)
            found[:60] = (truth[near] + rng.normal(0, 6, (60, 4))).clip(0, [WIDTH - 2, HEIGHT - 2, WIDTH, HEIGHT])
            found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
            guesses[:60] = labels[near]
        sides = truth[:, 2:] - truth[:, :2]
        target: dict[str, Any] = {"boxes": truth, "labels": labels, "iscrowd": rng.random(len(truth)) < 0.01}
        target |= {"area": sides.prod(1) * 0.7, "size": np.array([HEIGHT, WIDTH])}
        prediction: dict[str, Any] = {"boxes": found, "labels": guesses, "scores": rng.random(DETECTIONS) ** 2}
        if has_masks:
            target["masks"], prediction["masks"] = _ellipses(truth), _ellipses(found)
        yield _tensors(prediction), _tensors(target)


class Clock:
    """Adds up seconds on the clock and of this process's processor."""

    def __init__(self) -> None:
        self.wall_s = 0.0
        self.cpu_s = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what runs inside."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        yield
        self.wall_s += time.perf_counter() - wall_s
        self.cpu_s += time.process_time() - cpu_s

    def columns(self, name: str) -> dict[str, float]:
        """Both, by column."""
        return {f"{name}_s": self.wall_s, f"{name}_cpu_s": self.cpu_s}


def measure_ours(num_images: int, has_masks: bool) -> dict[str, float]:
    """Seconds to collect and to score, and the result."""
    evaluator, collect, score = CocoEvaluator(CLASSES, has_masks), Clock(), Clock()
    for sample, (prediction, target) in enumerate(examples(num_images, has_masks)):
        with collect.running():
            evaluator.update([prediction], [target], torch.tensor([sample]), torch.ones(1))
    with score.running():
        scores = evaluator.compute()
    found = collect.columns("collect") | score.columns("score") | {"box_ap": scores.box.ap}
    return found | ({"mask_ap": scores.mask.ap} if scores.mask else {})


def measure_pycocotools(num_images: int, has_masks: bool) -> dict[str, float]:
    """The same without collecting."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = []
    for sample, (prediction, target) in enumerate(examples(num_images, has_masks)):
        truth, found = marks_of(target, has_masks), marks_of(prediction, has_masks)
        images.append(ImageState(sample, (HEIGHT, WIDTH), truth, found))
    heads = [{"id": image.id, "height": HEIGHT, "width": WIDTH} for image in images]
    categories = [{"id": label} for label in range(1, CLASSES + 1)]
    score, numbers = Clock(), {}
    for kind in ["bbox", "segm"] if has_masks else ["bbox"]:
        rows = [row for image in images for row in _rows(image, image.truth, kind)]
        rows = [row | {"id": number} for number, row in enumerate(rows, 1)]
        results = [row for image in images for row in _rows(image, image.found, kind)]
        with score.running(), contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = {"info": {}, "images": heads, "annotations": rows, "categories": categories}
            coco.createIndex()
            evaluation = COCOeval(coco, coco.loadRes(results), kind)
            for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
                step()
        numbers["box_ap" if kind == "bbox" else "mask_ap"] = float(evaluation.stats[0])
    return score.columns("score") | numbers


def main() -> None:
    """Measure every point in its own process and write results/evaluation.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--point", nargs=2, metavar=("LIBRARY", "KIND"), help="measure one point in this process")
    options = parser.parse_args()
    if options.point:
        library, kind = options.point
        run = measure_pycocotools if library == "pycocotools" else measure_ours
        numbers = run(options.images, kind == "masks")
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        sys.stdout.write(json.dumps(numbers | {"peak_gib": peak_gib}) + "\n")
        return
    rows = []
    for kind in ("boxes", "masks"):
        for library in ("ours", "pycocotools"):
            rows.append(_point(library, kind, options.images))
            sys.stdout.write(f"{rows[-1]}\n")
    write_csv(RESULTS / "evaluation.csv", rows)


def _point(library: str, kind: str, num_images: int) -> dict[str, str]:
    command = [sys.executable, "-m", "benchmarks.evaluation", "--images", str(num_images), "--point", library, kind]
    numbers = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    columns = ("collect_s", "collect_cpu_s", "score_s", "score_cpu_s", "peak_gib", "box_ap", "mask_ap")
    return {
        "command": " ".join(["python", *command[1:]]),
        "library": library,
        "kind": kind,
        "images": str(num_images),
        **{name: f"{numbers[name]:.6g}" if name in numbers else "" for name in columns},
        **{name.replace("-", "_"): version(name) for name in ("faster-coco-eval", "pycocotools")},
        **provenance(torch.device("cpu")),
    }


def _rows(image: ImageState, marks: Marks, kind: str) -> Iterator[dict[str, Any]]:
    is_truth = marks is image.truth
    for place, box in enumerate(as_xywh(marks.boxes).tolist()):
        row: dict[str, Any] = {"image_id": image.id, "category_id": int(marks.labels[place])}
        code = {"size": list(image.size), "counts": marks.masks[place]} if marks.masks is not None else None
        if is_truth:
            row |= {"iscrowd": int(marks.iscrowd[place]), "area": float(marks.area[place]), "bbox": box}
        else:
            row |= {"score": float(marks.scores[place])} | ({"bbox": box} if kind == "bbox" else {})
        yield row | ({"segmentation": code} if kind == "segm" else {})


def _boxes(rng: np.random.Generator, num: int) -> np.ndarray[Any, Any]:
    """Corners (num, 4); sides from 8 to 300 pixels, small ones more often."""
    sides = np.exp(rng.uniform(np.log(8), np.log(300), (num, 2)))
    corner = rng.uniform(0, 1, (num, 2)) * (np.array([WIDTH, HEIGHT]) - sides)
    return np.concatenate([corner, corner + sides], axis=1)


def _ellipses(boxes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Masks (n, HEIGHT, WIDTH) that fill the boxes."""
    masks = np.zeros((len(boxes), HEIGHT, WIDTH), dtype=np.bool_)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        rows, columns = np.arange(int(y0), int(np.ceil(y1))), np.arange(int(x0), int(np.ceil(x1)))
        dy = (rows + 0.5 - (y0 + y1) / 2) / (y1 - y0) * 2
        dx = (columns + 0.5 - (x0 + x1) / 2) / (x1 - x0) * 2
        mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = dy[:, None] ** 2 + dx**2 <= 1
    return masks


def _tensors(arrays: dict[str, Any]) -> Example:
    tensors = {name: torch.from_numpy(np.asarray(values)) for name, values in arrays.items()}
    return {name: value.float() if value.dtype == torch.float64 else value for name, value in tensors.items()}


if __name__ == "__main__":
    main()
