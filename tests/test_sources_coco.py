"""A small real instance of COCO's layout: polygons, crowds, RLE, grey and CMYK images, images without objects."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as codec

from datamodules.annotations import decode_mask, parse_objects
from datamodules.manifest import open_split, read_dataset
from datamodules.pack import pack
from datamodules.reader import ShardReader
from datamodules.sources import SourceOptions, open_source
from datamodules.types import DataError

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}, {"id": 18, "name": "dog"}]
CROWD = np.zeros((40, 60), dtype=np.uint8)
CROWD[5:20, 30:50] = 1


def plain_runs(mask):
    """COCO's uncompressed run lengths, as its crowds have them."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *edges, len(flat)]).tolist() if flat[0] == 0 else [0, *np.diff([0, *edges, len(flat)]).tolist()]


def annotations():
    square = [[10, 10, 30, 10, 30, 25, 10, 25]]
    two_parts = [[0, 0, 8, 0, 8, 8, 0, 8], [20, 20, 28, 20, 28, 28, 20, 28]]
    compressed = codec.encode(np.asfortranarray(CROWD))
    return [
        {"id": 1, "image_id": 139, "category_id": 90, "bbox": [10, 10, 20, 15], "area": 300.0, "iscrowd": 0,
         "segmentation": square},
        {"id": 2, "image_id": 139, "category_id": 1, "bbox": [30, 5, 20, 15], "area": 300, "iscrowd": 1,
         "segmentation": {"size": [40, 60], "counts": plain_runs(CROWD)}},
        {"id": 3, "image_id": 285, "category_id": 18, "bbox": [0, 0, 28.004, 28.5], "area": 128.0, "iscrowd": 0,
         "segmentation": two_parts},
        {"id": 4, "image_id": 285, "category_id": 1, "bbox": [50.5, 30, 12, 10.25], "area": 60.0, "iscrowd": 0,
         "segmentation": {"size": [40, 60], "counts": compressed["counts"].decode()}},
        {"id": 5, "image_id": 285, "category_id": 1, "bbox": [12, 12, 0, 4], "area": 0.0, "iscrowd": 0,
         "segmentation": square},
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "coco"
    rng = np.random.default_rng(0)
    images = [(139, "RGB"), (285, "L"), (632, "CMYK")]
    for name in ("train2017", "val2017"):
        (root / name).mkdir(parents=True)
        entries = []
        for number, mode in images:
            channels = {"RGB": (3,), "L": (), "CMYK": (4,)}[mode]
            pixels = rng.integers(0, 256, (40, 60, *channels), dtype=np.uint8)
            file_name = f"{number:012d}.jpg"
            image = Image.fromarray(pixels, mode if mode == "CMYK" else None)
            image.save(root / name / file_name, exif=turned())
            entries.append({"id": number, "file_name": file_name, "width": 60, "height": 40, "license": 4})
        document = {"info": {}, "images": entries, "annotations": annotations(), "categories": CATEGORIES}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(document))
        (root / "annotations" / f"captions_{name}.json").write_text("{}")
    return root


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"; annotations belong to the stored pixels
    return exif


def test_coco_comes_back_with_every_byte_box_mask_and_flag(folder, tmp_path):
    info = pack(open_source("coco", SourceOptions(str(folder))), str(tmp_path / "out"))
    assert (info.task, info.class_names, info.category_ids) == (
        "detection",
        ["person", "dog", "toothbrush"],
        [1, 18, 90],
    )
    assert "2 objects with an empty box left out" in info.source
    assert read_dataset(tmp_path / "out") == info
    for split, name in (("train", "train2017"), ("val", "val2017")):
        reader = ShardReader(open_split(tmp_path / "out", info, split))
        found = {}
        for sample in range(3):
            raw = reader.read(sample, reader.index.extensions)
            found[int(raw.key)] = parse_objects(raw.fields["json"], 3, raw.where)
            assert raw.fields["jpg"] == (folder / name / f"{raw.key}.jpg").read_bytes()
            assert found[int(raw.key)].image_id == int(raw.key)
        one, two, none = found[139], found[285], found[632]
        assert one.boxes == [[10, 10, 30, 25], [30, 5, 50, 20]]
        assert (one.labels, one.iscrowd, one.area) == ([3, 1], [0, 1], [300, 300])
        assert two.boxes == [[0, 0, 28.004, 28.5], [50.5, 30, 60, 40]]
        assert (none.boxes, none.labels, none.masks) == ([], [], [])
        square = np.zeros((40, 60), dtype=bool)
        square[10:25, 10:30] = True
        assert np.array_equal(decode_mask(one.masks[0]), square)
        assert np.array_equal(decode_mask(one.masks[1]), CROWD == 1)
        assert np.array_equal(decode_mask(two.masks[1]), CROWD == 1)
        assert decode_mask(two.masks[0]).sum() == 128


def test_boxes_without_masks_are_a_dataset_too(folder, tmp_path):
    for path in folder.glob("annotations/instances*"):
        document = json.loads(path.read_text())
        for entry in document["annotations"]:
            del entry["segmentation"]
        path.write_text(json.dumps(document))
    (folder / "images").mkdir()
    (folder / "train2017").rename(folder / "images" / "train2017")
    info = pack(open_source("coco", SourceOptions(str(folder))), str(tmp_path / "out"))
    reader = ShardReader(open_split(tmp_path / "out", info, "train"))
    objects = [parse_objects(reader.read(i, ["json"]).fields["json"], 3, "x") for i in range(3)]
    assert all(one.masks is None for one in objects)


def test_a_changed_annotation_is_another_dataset(folder, tmp_path):
    pack(open_source("coco", SourceOptions(str(folder))), str(tmp_path / "out"))
    edit(folder, lambda document: document["annotations"][0].update(area=299.0))
    with pytest.raises(DataError, match="holds another dataset"):
        pack(open_source("coco", SourceOptions(str(folder))), str(tmp_path / "out"))


def edit(folder, change):
    path = folder / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"][0].update(image_id=5), "annotation 1 belongs to image 5, which is not listed"),
        (lambda d: d["annotations"][1].update(category_id=2), "annotation 2 has category 2, which is not listed"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2]), r"annotation 2 has bbox \[1, 2\]; it must be \[x, y"),
        (lambda d: d["annotations"][2].pop("bbox"), "is no COCO instances file .*an entry of annotations without id"),
        (lambda d: d["annotations"][2].pop("segmentation"), "annotation 3 has no segmentation, others have; give all"),
        (lambda d: d["annotations"][1]["segmentation"].update(size=[6, 4]), r"annotation 2 of .*its size is \[6, 4\]"),
        (lambda d: d["annotations"][0].update(segmentation=[["a"]]), "annotation 1 of .* cannot be read"),
        (lambda d: d["images"][0].update(width=61), r"000000000139.jpg has 60x40 pixels, its entry says 61x40"),
        (lambda d: d["images"][0].update(file_name="no.jpg"), "no.jpg is listed as image 139 but missing; restore it"),
        (lambda d: d["images"][0].update(file_name="../val2017/000000000139.jpg"), "139.jpg', outside its folder"),
        (lambda d: d["images"][0].update(file_name="/tmp/a.jpg"), "image 139 is listed as '/tmp/a.jpg', outside its"),
        (lambda d: d["images"][1].update(id=139), "lists two images with one id"),
        (lambda d: d["categories"].pop(), "has other categories than .*; the splits must share them"),
        (lambda d: d.pop("images"), "is no COCO instances file"),
    ],
)  # fmt: skip
def test_an_unfit_coco_is_refused_with_the_place(folder, tmp_path, change, message):
    edit(folder, change)
    with pytest.raises(DataError, match=message):
        pack(open_source("coco", SourceOptions(str(folder))), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_its_parts_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"has no annotations/instances_train\*.json; coco needs it and the images"):
        open_source("coco", SourceOptions(str(tmp_path)))
    (folder / "train2017").rename(folder / "elsewhere")
    with pytest.raises(DataError, match=r"instances_train2017.json needs its images in .*train2017"):
        open_source("coco", SourceOptions(str(folder)))
    (folder / "annotations" / "instances_train2014.json").write_text("{}")
    with pytest.raises(DataError, match=r"instances_train2017.json: which one is train\? leave one"):
        open_source("coco", SourceOptions(str(folder)))
