"""Every source that can be packed, by name, and the embedded one: scikit-learn's handwritten digits."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules import relational
from datamodules.order import Role, hash_key
from datamodules.scenes import scene_samples
from datamodules.sources_ade20k import ade20k
from datamodules.sources_base import Source, SourceSample, Task
from datamodules.sources_coco import coco
from datamodules.sources_folders import imagefolder, imagenet
from datamodules.sources_idx import idx
from datamodules.types import DataError

SourceName = Literal[
    "digits",
    "digits-recall",
    "digits-same-different",
    "digits-counting",
    "imagefolder",
    "imagenet",
    "coco",
    "ade20k",
    "idx",
]

DIGITS_CLASSES = [str(digit) for digit in range(10)]
SCENES = 8000
"""Training scenes of digits, unless told otherwise: a small network learns 2000 by heart before it can read digits."""
PANELS = 5000
"""Training pictures of a relational question, unless told otherwise."""
_MOST_VAL_SCENES = 400
_MOST_VAL_PANELS = 1000

_DIGITS_VAL_SHARE = 0.2
_DIGITS_ORIGIN = "scikit-learn load_digits: UCI Optical Recognition of Handwritten Digits, test set (Alpaydin, Kaynak)"
_DIGITS_LICENCE = "CC BY 4.0 (UCI Machine Learning Repository)"


@dataclass(frozen=True)
class SourceOptions:
    """What a source may be told.

    Attributes:
        data: input folder; every source but digits needs one.
        task: None for the source's own; digits can be packed for all three.
        scenes: training pictures that are composed of digits; None for the source's own number.
        cells: a side of the grid of a question about digits; None for its own, like `classes`.
        classes: digits in play there.
        seed: of what is composed.
        val_labels: labels of ImageNet's validation images where they lie in one folder.
    """

    data: str | None = None
    task: Task | None = None
    scenes: int | None = None
    cells: int | None = None
    classes: int | None = None
    seed: int = 0
    val_labels: str | None = None


@dataclass(frozen=True)
class _Digits:
    """Images (n, 8, 8) stretched to 8 bits, their labels and their numbers in the published order."""

    images: NDArray[np.uint8]
    labels: list[int]
    numbers: list[int]


def digits(options: SourceOptions | None = None) -> Source:
    """scikit-learn's bundled digits: 1797 images of 8x8 pixels, 17 grey levels, stretched to 8 bits and stored as PNG.

    For detection and segmentation scenes are composed of them, train scenes only of train digits. The split is fixed:
    in every class the fifth of the images whose hashed number is smallest validates.
    """
    options = options or SourceOptions()
    task = options.task or "classification"
    splits = _digits_splits()
    if task == "classification":
        samples = {split: _digit_samples(part) for split, part in splits.items()}
        return Source("digits", task, DIGITS_CLASSES, samples, _DIGITS_ORIGIN, _DIGITS_LICENCE)
    counts = _counts(options, SCENES, _MOST_VAL_SCENES)
    scenes = {
        split: scene_samples(part.images, part.labels, task, options.seed, number, counts[split])
        for number, (split, part) in enumerate(splits.items())
    }
    origin = f"scenes composed of {_DIGITS_ORIGIN}"
    return Source(f"digits-{task}", task, _digits_classes(task), scenes, origin, _DIGITS_LICENCE)


def _relational(question: relational.Question, options: SourceOptions) -> Source:
    """Pictures of digits that ask a question, train pictures only of train digits."""
    given = {"cells": options.cells, "classes": options.classes}
    grid = relational.Grid(**{name: number for name, number in given.items() if number is not None})
    counts = _counts(options, PANELS, _MOST_VAL_PANELS)
    panels = {
        split: relational.samples(question, part.images, part.labels, grid, options.seed, number, counts[split])
        for number, (split, part) in enumerate(_digits_splits().items())
    }
    origin = f"pictures composed of {_DIGITS_ORIGIN}"
    names = relational.CLASSES[question]
    return Source(f"digits-{question}", "classification", names, panels, origin, _DIGITS_LICENCE)


def _counts(options: SourceOptions, usual: int, most_val: int) -> dict[str, int]:
    """Composed pictures by split."""
    train = usual if options.scenes is None else options.scenes
    if train < 5:
        raise DataError(f"--scenes is {train}; it must be at least 5, for one scene in five validates")
    return {"train": train, "val": min(train // 5, most_val)}


def _digits_splits() -> dict[str, _Digits]:
    from sklearn.datasets import load_digits  # two seconds, and only packing needs it

    bunch = load_digits()
    labels = bunch.target.astype(int).tolist()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    val = {
        index
        for label in range(10)
        for index in _smallest_hashes([i for i, other in enumerate(labels) if other == label], _DIGITS_VAL_SHARE)
    }
    parts = {"train": [i for i in range(len(labels)) if i not in val], "val": sorted(val)}
    return {split: _Digits(pixels[part], [labels[i] for i in part], part) for split, part in parts.items()}


def _smallest_hashes(indices: Sequence[int], share: float) -> list[int]:
    count = round(len(indices) * share)
    return sorted(indices, key=lambda index: hash_key(0, Role.SPLIT, index))[:count]


def _digit_samples(part: _Digits) -> list[SourceSample]:
    samples = []
    for pixels, label, number in zip(part.images, part.labels, part.numbers, strict=True):
        files = {"png": _png(pixels), "cls": str(label).encode()}
        samples.append(SourceSample(f"digit-{number:04d}", len(files["png"]), f"{label}.png", files.copy))
    return samples


def _png(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


_QUESTIONS: dict[SourceName, relational.Question] = {
    "digits-recall": "recall",
    "digits-same-different": "same-different",
    "digits-counting": "counting",
}

SOURCES: dict[SourceName, tuple[tuple[Task, ...], Callable[[SourceOptions], Source]]] = {
    "digits": (("classification", "detection", "segmentation"), digits),
    **{name: (("classification",), partial(_relational, question)) for name, question in _QUESTIONS.items()},
    "imagefolder": (("classification",), lambda options: imagefolder(_folder(options, "imagefolder"))),
    "imagenet": (("classification",), lambda options: imagenet(_folder(options, "imagenet"), options.val_labels)),
    "coco": (("detection",), lambda options: coco(_folder(options, "coco"))),
    "ade20k": (("segmentation",), lambda options: ade20k(_folder(options, "ade20k"))),
    "idx": (("classification",), lambda options: idx(_folder(options, "idx"))),
}
"""Per source: the tasks it can be packed for, its own first, and what opens it."""


def _folder(options: SourceOptions, source: str) -> Path:
    if options.data is None:
        raise DataError(f"--source {source} needs --data, the folder to pack")
    folder = Path(options.data)
    if not folder.is_dir():
        raise DataError(f"--data {options.data} is no folder; --source {source} packs a folder")
    return folder


def open_source(name: str, options: SourceOptions | None = None) -> Source:
    """List what a source holds; image files are opened only while packing.

    Args:
        name: one of SOURCES.
        options: see there.

    Raises:
        DataError: an unknown source, a task that it is not for, an option that it does not have, or see the source.
    """
    options = options or SourceOptions()
    found = next((entry for known, entry in SOURCES.items() if known == name), None)
    if found is None:
        raise DataError(f"--source {name!r} is unknown; known are {', '.join(SOURCES)}")
    tasks, opener = found
    if options.task is not None and options.task not in tasks:
        raise DataError(f"--task {options.task}: {name} is packed for {' or '.join(tasks)}")
    for option in ("cells", "classes"):
        if getattr(options, option) is not None and name not in _QUESTIONS:
            raise DataError(f"--{option} is for {', '.join(_QUESTIONS)}, not for {name}; leave it out")
    if options.val_labels is not None and name != "imagenet":
        raise DataError(f"--val-labels is for imagenet, not for {name}; leave it out")
    return opener(options)


def source_classes(name: str, task: Task = "classification") -> list[str] | None:
    """Class names that a source is known to have before it is packed, None if only its data tells."""
    for known, question in _QUESTIONS.items():
        if name == known:
            return relational.CLASSES[question]
    return _digits_classes(task) if name == "digits" else None


def _digits_classes(task: Task) -> list[str]:
    return ["background", *DIGITS_CLASSES] if task == "segmentation" else DIGITS_CLASSES
