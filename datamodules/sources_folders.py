"""Sources that are class folders of images: torchvision's ImageFolder layout, and ImageNet (ILSVRC) as published."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from datamodules.manifest import SPLITS
from datamodules.sources_base import (
    Source,
    SourceSample,
    image_extension,
    labelled_image,
    list_files,
    read_bytes,
    unique_key,
)
from datamodules.types import DataError

_SYNSET = re.compile(r"n\d{8}")
_IMAGENET_ROOTS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", ".")
_VAL_LABELS = ("LOC_val_solution.csv", "../../../LOC_val_solution.csv", "val_map.txt", "val.txt")


def imagefolder(folder: Path) -> Source:
    """Class folders below train/ and val/ (and test/), as torchvision's ImageFolder has them; bytes are kept.

    Args:
        folder: holds <split>/<class>/**/<image>. Class ids follow the sorted names of train's folders.

    Raises:
        DataError: no train folder, an empty class, a class that train lacks, or a file that is no JPEG, PNG or WEBP.
    """
    if not (folder / "train").is_dir():
        raise DataError(
            f"--data {folder} has no train folder; imagefolder needs train/<class>/*.jpg and val/<class>/*.jpg"
        )
    class_names = _class_folders(folder / "train")
    splits = {split: _split(folder / split, class_names) for split in SPLITS if (folder / split).is_dir()}
    return Source(folder.resolve().name, "classification", class_names, splits, "image folder", "not stated")


def imagenet(folder: Path, val_labels: str | None = None) -> Source:
    """ImageNet: train/<synset>/*.JPEG, and val/ likewise or flat with a file that gives the labels; bytes are kept.

    Args:
        folder: holds train and val, or is the root of the published archive (ILSVRC/Data/CLS-LOC/train, val).
        val_labels: for a flat val: lines of image name and synset or class id (0 to 999 in the order of synsets),
            or Kaggle's LOC_val_solution.csv. Looked for under its usual names beside the images if not given.

    Raises:
        DataError: no train folder, folders that are no synsets, a flat val without labels, an image without one.
    """
    root = next((folder / name for name in _IMAGENET_ROOTS if (folder / name / "train").is_dir()), None)
    if root is None:
        raise DataError(f"--data {folder} has no train folder; imagenet needs train/n01440764/*.JPEG and val")
    synsets = _class_folders(root / "train")
    if wrong := [name for name in synsets if not _SYNSET.fullmatch(name)]:
        raise DataError(f"{root / 'train' / wrong[0]} is no synset such as n01440764; for other trees use imagefolder")
    splits: dict[str, Sequence[SourceSample]] = {"train": _split(root / "train", synsets)}
    if (root / "val").is_dir():
        flat = not any(path.is_dir() for path in (root / "val").iterdir())
        splits["val"] = _flat_split(root, synsets, val_labels) if flat else _split(root / "val", synsets)
    names = _synset_names(synsets)
    licence = "ImageNet terms of access: non-commercial research and education"
    return Source("imagenet", "classification", names, splits, "ImageNet (ILSVRC)", licence)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders; imagefolder needs {folder}/<class>/*.jpg")
    return names


def _split(folder: Path, class_names: Sequence[str]) -> list[SourceSample]:
    """The samples of one split's class folders."""
    numbers = {name: number for number, name in enumerate(class_names)}
    samples: list[SourceSample] = []
    taken: set[str] = set()
    for name in _class_folders(folder):
        if name not in numbers:
            raise DataError(f"{folder / name} is no class of train; add it there or remove it here")
        before = len(samples)
        samples += [_sample(folder, *file, numbers[name], taken) for file in list_files(folder / name)]
        if len(samples) == before:
            raise DataError(f"{folder / name} has no images; add some or remove the folder")
    return samples


def _sample(folder: Path, path: str, size: int, label: int, taken: set[str]) -> SourceSample:
    extension = image_extension(path)
    below = path.removeprefix(f"{folder}/")
    key = unique_key(below[: -len(extension) - 1], taken)
    return SourceSample(key, size, f"{label}.{extension}", partial(labelled_image, path, extension, label))


def _flat_split(root: Path, synsets: Sequence[str], val_labels: str | None) -> list[SourceSample]:
    """Validation images in one folder, their labels from a file."""
    labels = _read_val_labels(_find_val_labels(root, val_labels), synsets)
    samples: list[SourceSample] = []
    taken: set[str] = set()
    for path, size in list_files(root / "val"):
        stem = Path(path).stem
        if stem not in labels:
            raise DataError(f"{path} has no label in the file of --val-labels; give the one that belongs to it")
        samples.append(_sample(root / "val", path, size, labels[stem], taken))
    return samples


def _find_val_labels(root: Path, val_labels: str | None) -> Path:
    if val_labels is not None:
        return Path(val_labels)
    for name in _VAL_LABELS:
        if (root / name).is_file():
            return root / name
    raise DataError(
        f"{root / 'val'} has no synset folders; say which image is what with --val-labels, a file with lines of image "
        "name and synset, or LOC_val_solution.csv"
    )


def _read_val_labels(path: Path, synsets: Sequence[str]) -> dict[str, int]:
    """Class id by image stem."""
    numbers = {name: number for number, name in enumerate(synsets)}
    numbers |= {str(number): number for number in range(len(synsets))}
    labels: dict[str, int] = {}
    for line, text in enumerate(read_bytes(path).decode(errors="replace").splitlines(), start=1):
        words = text.replace(",", " ").split()
        if not words or words[0] == "ImageId":
            continue
        if len(words) < 2 or words[1] not in numbers:
            raise DataError(
                f"--val-labels {path} line {line}: {text[:60]!r} is not an image name and a synset of train "
                "or a class id"
            )
        labels[words[0].partition(".")[0]] = numbers[words[1]]
    return labels


def _synset_names(synsets: Sequence[str]) -> list[str]:
    """Names like "n01440764 tench, Tinca tinca" for the synsets that timm has words for, else the synset."""
    from timm.data.imagenet_info import ImageNetInfo  # reads its word list, and only packing needs it

    known = ImageNetInfo("imagenet-1k")
    words = {name: known.label_name_to_description(name) for name in known.label_names()}
    return [f"{synset} {words[synset]}" if synset in words else synset for synset in synsets]
