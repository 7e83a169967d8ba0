"""What `mirrorla predict` leaves of each task: a table, annotated pictures and COCO results, or class maps.

A recorder turns one prediction into pictures, written at once, and a small record; from all records, in the order of
the samples, it writes the run's files.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from lightning_modules.commit import commit_file
from lightning_modules.dense_figures import found_shapes, legend
from lightning_modules.detection_state import as_xywh, encode_masks
from lightning_modules.drawing import SHOWN_SIDE, Pixels, draw_class_map, draw_shapes, fitted, with_legend
from lightning_modules.output_names import OutputNames

LARGEST_SIDE = 1280
"""Longest side of an annotated picture, pixels: on larger ones the names would be too small to read."""
FOLDER = "predictions"


@dataclass(frozen=True)
class Output:
    """Where predictions go and what is known about the images.

    Attributes:
        root: the run directory; pictures lie in root/predictions.
        data: the data module, with image_name and picture.
        class_names: by class id, for detection by label - 1.
        names: of the files.
    """

    root: Path
    data: Any
    class_names: list[str]
    names: OutputNames

    @property
    def folder(self) -> Path:
        """Of the pictures."""
        return self.root / FOLDER

    def write_picture(self, sample: int, ending: str, pixels: Pixels) -> None:
        """Commit a PNG named after the sample's image."""
        name = self.names.of(sample, self.data.image_name(sample))
        path = self.folder / name.with_name(name.name + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        commit_file(path, lambda stream: Image.fromarray(pixels).save(stream, format="PNG"))


class Recorder(Protocol):
    """How one task's predictions are written."""

    def record(self, output: Output, sample: int, outputs: dict[str, Any], place: int) -> Any:
        """Write one image's pictures; give what is kept of it, in JSON's types."""

    def finish(self, output: Output, records: Iterable[Any]) -> list[Path]:
        """Write what is made of all records, which can be read several times; give the paths to tell the user."""


class TableRecorder:
    """Classification: predictions.csv, one row per image, best class first."""

    def record(self, output: Output, sample: int, outputs: dict[str, Any], place: int) -> Any:
        """The row: the image's name in a plain folder, its id in a dataset; then classes and probabilities."""
        is_plain = output.data.opened.is_plain
        columns = (outputs["classes"][place].tolist(), outputs["scores"][place].tolist())
        cells = ((output.class_names[label], f"{score:.6f}") for label, score in zip(*columns, strict=True))
        return [output.data.image_name(sample) if is_plain else sample, *(cell for pair in cells for cell in pair)]

    def finish(self, output: Output, records: Iterable[Any]) -> list[Path]:
        """predictions.csv with a header `image` or `id`, `class_1,score_1,…`."""
        path = output.root / f"{FOLDER}.csv"
        first = "image" if output.data.opened.is_plain else "id"

        def write(stream: IO[bytes]) -> None:
            text = io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline="", write_through=True)
            writer = csv.writer(text, lineterminator="\n")
            for number, row in enumerate(records):
                if number == 0:
                    pairs = range(1, len(row) // 2 + 1)
                    writer.writerow([first, *(f"{name}_{pair}" for pair in pairs for name in ("class", "score"))])
                writer.writerow(row)
            text.detach()

        commit_file(path, write)
        return [path]


class DetectionRecorder:
    """Detection: <name>.png with what was found drawn on it, detections.json and images.json.

    detections.json holds COCO results; images.json holds the images and categories they refer to, so that COCO's own
    code loads both. Every detection is in the json; pictures show those of which the model is sure.
    """

    def record(self, output: Output, sample: int, outputs: dict[str, Any], place: int) -> Any:
        """The image's entry and its detections, boxes to a thousandth of a pixel."""
        found = outputs["predictions"][place]
        picture = output.data.picture(sample)
        size = picture.shape[:2]
        shown = draw_shapes(_readable(picture), found_shapes(found, size), output.class_names)
        output.write_picture(sample, ".png", shown)
        number = int(outputs["image_id"][place])
        image = {"id": number, "file_name": output.data.image_name(sample), "height": size[0], "width": size[1]}
        return [image, _coco_rows(found, number, size)]

    def finish(self, output: Output, records: Iterable[Any]) -> list[Path]:
        """The two files."""
        results, heads = output.folder / "detections.json", output.folder / "images.json"
        categories = [{"id": number, "name": name} for number, name in enumerate(output.class_names, 1)]
        _commit_list(results, (row for _, rows in records for row in rows))
        ending = f', "categories": {json.dumps(categories)}}}'
        _commit_list(heads, (image for image, _ in records), '{"images": ', ending)
        return [results, heads]


class SegmentationRecorder:
    """Segmentation: <name>.png, one channel of class ids, and <name>.overlay.png to look at."""

    def record(self, output: Output, sample: int, outputs: dict[str, Any], place: int) -> Any:
        """Nothing: the pictures are the result."""
        class_map = outputs["predictions"][place].cpu().numpy().astype(np.uint8)
        shown = draw_class_map(_readable(output.data.picture(sample)), class_map, output.class_names)
        output.write_picture(sample, ".png", class_map)
        output.write_picture(sample, ".overlay.png", with_legend(shown, legend(class_map, output.class_names)))

    def finish(self, output: Output, records: Iterable[Any]) -> list[Path]:
        """Nothing is left to write."""
        for _ in records:  # counts them
            pass
        return [output.folder]


RECORDERS: dict[str, Callable[[], Recorder]] = {
    "classification": TableRecorder,
    "detection": DetectionRecorder,
    "segmentation": SegmentationRecorder,
}


def _readable(picture: Pixels) -> Pixels:
    side = max(picture.shape[:2])
    return fitted(picture, min(max(side, SHOWN_SIDE), LARGEST_SIDE))


def _coco_rows(found: dict[str, Tensor], image: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    boxes = as_xywh(found["boxes"].float().cpu().numpy()).round(3).tolist()
    columns = (found["labels"].tolist(), boxes, found["scores"].tolist())
    rows: list[dict[str, Any]] = [
        {"image_id": image, "category_id": label, "bbox": box, "score": round(score, 6)}
        for label, box, score in zip(*columns, strict=True)
    ]
    if "masks" in found:
        for row, code in zip(rows, encode_masks(found["masks"].cpu().numpy()), strict=True):
            row["segmentation"] = {"size": list(size), "counts": code.decode()}
    return rows


def _commit_list(path: Path, items: Iterable[Any], before: str = "", after: str = "") -> None:
    """Commit a JSON list, one item a line, without ever holding it."""

    def write(stream: IO[bytes]) -> None:
        stream.write(f"{before}[".encode())
        for number, item in enumerate(items):
            stream.write((",\n" if number else "\n").encode() + json.dumps(item).encode())
        stream.write(f"\n]{after}\n".encode())

    commit_file(path, write)
