"""COCO's layout: annotations/instances_<split>*.json and the folders of images that it names; image bytes are kept."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.annotations import Objects, Rle
from datamodules.sources_base import Source, SourceSample, image_extension, image_size, read_bytes, unique_key
from datamodules.types import DataError

Json = dict[str, Any]


def coco(folder: Path) -> Source:
    """Instances with boxes and masks; crowds keep their flag, polygons become run-length masks.

    Boxes are clipped to the image; objects whose box is empty then are left out and counted in the origin's text.

    Args:
        folder: holds annotations/instances_train*.json, instances_val*.json and train*/, val*/ (or images/train* …).

    Raises:
        DataError: a file that is missing or of another form, an image or category that is not listed, an image whose
            size is not the listed one.
    """
    files = {split: _instances_file(folder, split) for split in ("train", "val")}
    found = {split: (path, _load(path)) for split, path in files.items() if path is not None}
    if "train" not in found:
        raise DataError(f"--data {folder} has no annotations/instances_train*.json; coco needs it and the images")
    path, document = found["train"]
    categories = {int(entry["id"]): str(entry["name"]) for entry in document["categories"]}
    ids = sorted(categories)
    for other, instances in found.values():
        if sorted(int(entry["id"]) for entry in instances["categories"]) != ids:
            raise DataError(f"{other} has other categories than {path}; the splits must share them")
    dropped: list[int] = []
    labels = {category: number for number, category in enumerate(ids, start=1)}
    splits = {split: _samples(folder, path, instances, labels, dropped) for split, (path, instances) in found.items()}
    origin = f"COCO instances ({len(dropped)} objects with an empty box left out)"
    licence = "annotations CC BY 4.0; images: see their entries and Flickr's terms"
    return Source(folder.resolve().name, "detection", [categories[i] for i in ids], splits, origin, licence, ids)


def _instances_file(folder: Path, split: str) -> Path | None:
    found = sorted((folder / "annotations").glob(f"instances_{split}*.json"))
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1].name}: which one is {split}? leave one in annotations/")
    return found[0] if found else None


def _load(path: Path) -> Json:
    try:
        document: Json = json.loads(read_bytes(path))
        for section, wanted in (("images", "file_name"), ("annotations", "bbox"), ("categories", "name")):
            if not all("id" in entry and wanted in entry for entry in document[section]):
                raise ValueError(f"an entry of {section} without id or {wanted}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is no COCO instances file ({type(error).__name__}: {error})") from None
    return document


def _image_folder(folder: Path, path: Path) -> Path:
    name = path.stem.removeprefix("instances_")
    places = [folder / name, folder / "images" / name, folder / "images"]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(f"{path.name} needs its images in {places[0]} or {places[1]}; neither is there")


def _samples(
    folder: Path, path: Path, document: Json, labels: dict[int, int], dropped: list[int]
) -> Sequence[SourceSample]:
    images = _image_folder(folder, path)
    by_image: dict[int, list[Json]] = defaultdict(list)
    known = {int(entry["id"]) for entry in document["images"]}
    if len(known) != len(document["images"]):
        raise DataError(f"{path} lists two images with one id; ids must be unique")
    with_masks = any(entry.get("segmentation") for entry in document["annotations"])
    for entry in document["annotations"]:
        _check(path, entry, known, labels)
        if with_masks and not entry.get("segmentation"):
            raise DataError(f"{path}: annotation {entry['id']} has no segmentation, others have; give all or none")
        by_image[int(entry["image_id"])].append(entry)
    samples = []
    taken: set[str] = set()
    for image in sorted(document["images"], key=lambda entry: int(entry["id"])):
        objects = [_boxed(entry, image) for entry in by_image[int(image["id"])]]
        dropped += [int(entry["id"]) for entry in objects if _is_empty(entry["xyxy"])]
        kept = [
            {**entry, "label": labels[int(entry["category_id"])]} for entry in objects if not _is_empty(entry["xyxy"])
        ]
        samples.append(_sample(images / str(image["file_name"]), image, kept, with_masks, taken))
    return samples


def _check(path: Path, entry: Json, known: set[int], labels: dict[int, int]) -> None:
    where = f"{path}: annotation {entry['id']}"
    if int(entry.get("image_id", -1)) not in known:
        raise DataError(f"{where} belongs to image {entry.get('image_id')}, which is not listed")
    if int(entry.get("category_id", -1)) not in labels:
        raise DataError(f"{where} has category {entry.get('category_id')}, which is not listed")
    if len(entry["bbox"]) != 4:
        raise DataError(f"{where} has bbox {entry['bbox']}; it must be [x, y, width, height]")


def _boxed(entry: Json, image: Json) -> Json:
    """The annotation with its box as corners inside the image."""
    x, y, width, height = map(float, entry["bbox"])
    right, bottom = float(image["width"]), float(image["height"])
    box = [max(x, 0.0), max(y, 0.0), min(x + width, right), min(y + height, bottom)]
    return {**entry, "xyxy": [round(value, 3) for value in box]}


def _is_empty(box: Sequence[float]) -> bool:
    return box[2] <= box[0] or box[3] <= box[1]


def _sample(path: Path, image: Json, objects: list[Json], with_masks: bool, taken: set[str]) -> SourceSample:
    extension = image_extension(str(path))
    name = Path(str(image["file_name"]))
    if ".." in name.parts or name.is_absolute():
        raise DataError(f"image {image['id']} is listed as {str(name)!r}, outside its folder; correct the entry")
    try:
        size = path.stat().st_size
    except OSError:
        raise DataError(f"{path} is listed as image {image['id']} but missing; restore it") from None
    key = unique_key(str(image["file_name"])[: -len(extension) - 1], taken)
    # as text, an entry takes a tenth of the memory of its parsed polygons
    entry = json.dumps([image, objects], sort_keys=True, separators=(",", ":")).encode()
    read = partial(_read, path, extension, entry, with_masks)
    return SourceSample(key, size + 200 * len(objects), hashlib.sha256(entry).hexdigest(), read)


def _read(path: Path, extension: str, entry: bytes, with_masks: bool) -> dict[str, bytes]:
    data = read_bytes(path)
    image, objects = json.loads(entry)
    width, height = int(image["width"]), int(image["height"])
    if (found := image_size(data, str(path))) != (width, height):
        raise DataError(
            f"{path} has {found[0]}x{found[1]} pixels, its entry says {width}x{height}; correct one of them"
        )
    masks = [_mask(path, entry, height, width) for entry in objects] if with_masks else None
    annotation = Objects(
        image_id=int(image["id"]),
        width=width,
        height=height,
        boxes=[entry["xyxy"] for entry in objects],
        labels=[entry["label"] for entry in objects],
        iscrowd=[int(entry.get("iscrowd", 0)) for entry in objects],
        area=[float(entry.get("area", entry["bbox"][2] * entry["bbox"][3])) for entry in objects],
        masks=masks,
    )
    return {extension: data, "json": annotation.encode()}


def _mask(path: Path, entry: Json, height: int, width: int) -> Rle:
    """Polygons, plain or compressed run lengths to compressed run lengths."""
    from pycocotools import mask as codec

    shape = entry["segmentation"]
    try:
        if isinstance(shape, dict):
            if list(shape["size"]) != [height, width]:
                raise ValueError(f"its size is {shape['size']}, the image's {[height, width]}")
            compressed = isinstance(shape["counts"], str)
            code = shape if compressed else codec.frPyObjects(shape, height, width)
        else:
            code = codec.merge(codec.frPyObjects(shape, height, width))
        counts = code["counts"]
        return {"size": [height, width], "counts": counts if isinstance(counts, str) else counts.decode()}
    except Exception as error:  # pycocotools raises bare Exceptions for shapes it does not know
        raise DataError(f"annotation {entry['id']} of {path}: its segmentation cannot be read ({error})") from None
