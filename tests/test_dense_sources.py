"""COCO and ADE20K in their original layouts: packed, loaded, trained on, and resumed in the middle of an epoch."""

import contextlib
import hashlib
import io
import json
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from pycocotools import mask as codec
from pycocotools.coco import COCO

from datamodules.detection import DetectionDataModule
from datamodules.pack import pack
from datamodules.segmentation import SegmentationDataModule
from datamodules.transforms_detection import DetectionEvalTransform, DetectionTrainTransform
from datamodules.transforms_segmentation import SegmentationEvalTransform, SegmentationTrainTransform

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
CATEGORIES = [{"id": 3, "name": "cup"}, {"id": 44, "name": "spoon"}, {"id": 90, "name": "fork"}]
WIDTH, HEIGHT = 48, 32


def picture(kind, path, width=WIDTH, height=HEIGHT):
    """One image of every kind that real sets hold; returns the pixels it stands for (H, W, 3)."""
    rng = np.random.default_rng(len(kind))
    rgb = np.asarray(Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((width, height), 3))
    if kind == "deep":
        deep = rgb[..., 0].astype(np.uint16) * 257
        Image.fromarray(deep).save(path)
        return np.repeat((deep >> 8)[..., None], 3, axis=2).astype(np.uint8)
    image = Image.fromarray(rgb)
    exif = Image.Exif()
    if kind == "rotated":
        exif[0x0112] = 6  # "turn by 90 degrees": annotations are for the pixels as they are stored
    image.convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")).save(path, quality=95, exif=exif)
    with Image.open(path) as stored:
        return np.asarray(stored.convert("RGB"))


KINDS = {"colour": "jpg", "grey": "jpg", "cmyk": "jpg", "rotated": "jpg", "deep": "png", "empty": "jpg"}


def blob(seed):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    rng = np.random.default_rng(seed)
    y, x = rng.integers(2, 12), rng.integers(2, 20)
    mask[y : y + 15, x : x + 20] = 1
    mask[y : y + 5, x : x + 5] = 0
    return mask


def uncompressed(mask):
    """COCO's plain run lengths, as its crowds have them: column after column, beginning with zeros."""
    flat = np.concatenate([[0], mask.T.ravel()])
    changes = np.flatnonzero(np.diff(flat))
    return {"size": list(mask.shape), "counts": np.diff([0, *changes, mask.size]).tolist()}


def compressed(mask):
    code = codec.encode(np.asfortranarray(mask))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def annotations(image_id):
    """A polygon of two parts, compressed run lengths, and a crowd."""
    polygon = [[4.5, 3.0, 20.25, 3.0, 20.25, 14.5, 4.5, 14.5], [30, 20, 40, 20, 35, 28]]
    rows = [
        ([4.5, 3.0, 35.5, 25.0], 44, 0, polygon, 230.5),
        ([2.0, 2.0, 40.0, 25.0], 90, 0, compressed(blob(image_id)), 275.0),
        ([0.0, 0.0, 48.0, 32.0], 3, 1, uncompressed(blob(image_id + 50)), 275.0),
    ]
    return [
        {"id": 10 * image_id + number, "image_id": image_id, "bbox": box, "category_id": category}
        | {"iscrowd": crowd, "segmentation": shape, "area": area}
        for number, (box, category, crowd, shape, area) in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """The original folder, the packed one, and the pixels by split and file."""
    root = tmp_path_factory.mktemp("coco")
    pixels = {}
    (root / "raw" / "annotations").mkdir(parents=True)
    for split, copies in (("train", 2), ("val", 1)):
        folder = root / "raw" / f"{split}2017"
        folder.mkdir()
        images, rows = [], []
        for number, (kind, extension) in enumerate(list(KINDS.items()) * copies):
            image_id, name = 100 + 7 * number, f"{number:012d}.{extension}"
            pixels[split, image_id] = picture(kind, folder / name)
            images.append({"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT, "license": 1})
            rows += [] if kind == "empty" else annotations(image_id)
        document = {"info": {}, "licenses": [], "images": images, "annotations": rows, "categories": CATEGORIES}
        (root / "raw" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(document))
    pack("coco", str(root / "packed"), data=str(root / "raw"))
    return root, pixels


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory):
    """The same for scene parsing: the class map of every image by split and key."""
    root = tmp_path_factory.mktemp("ade20k")
    content = {}
    for split, name, copies in (("train", "training", 2), ("val", "validation", 1)):
        for part in ("images", "annotations"):
            (root / "raw" / part / name).mkdir(parents=True)
        for number, (kind, extension) in enumerate(list(KINDS.items()) * copies):
            key = f"ADE_{split}_{number:08d}"
            size = (WIDTH + number, HEIGHT + 2 * number)
            shown = picture(kind, root / "raw" / "images" / name / f"{key}.{extension}", *size)
            indices = np.random.default_rng(number).integers(0, 151, (4, 6), dtype=np.uint8).repeat(20, 0).repeat(10, 1)
            indices = indices[: size[1], : size[0]]
            Image.fromarray(indices).save(root / "raw" / "annotations" / name / f"{key}.png")
            content[split, key] = shown, np.where(indices == 0, 255, indices.astype(int) - 1)
    pack("ade20k", str(root / "packed"), data=str(root / "raw"))
    return root, content


def detection(root, **options):
    return DetectionDataModule(
        str(root / "packed"),
        train_transform=DetectionTrainTransform(
            (24, 32, 40), 64, crop=0.5, crop_short_sides=(32,), crop_sides=(20, 30)
        ),
        eval_transform=DetectionEvalTransform(None, **PLAIN),
        **{"batch_size": 4, "lanes": 2, "num_workers": 0, "group_batches": 2, **options},
    )


def segmentation(root, **options):
    return SegmentationDataModule(
        str(root / "packed"),
        train_transform=SegmentationTrainTransform(32, 32, 64),
        eval_transform=SegmentationEvalTransform(None, **PLAIN),
        **{"batch_size": 4, "lanes": 2, "num_workers": 0, **options},
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools 2.0 under NumPy 2
def test_coco_arrives_as_pycocotools_reads_it(coco):
    root, pixels = coco
    with contextlib.redirect_stdout(io.StringIO()):
        oracle = COCO(str(root / "raw" / "annotations" / "instances_val2017.json"))
    dm = detection(root, eval_batch_size=4)
    assert dm.class_names == ["cup", "spoon", "fork"]
    dm.setup("validate")
    category = [entry["id"] for entry in CATEGORIES]
    seen = []
    for batch in dm.val_dataloader():
        for image, target, weight in zip(batch["image"], batch["target"], batch["weight"], strict=True):
            assert weight == (target["image_id"] != -1)
            if weight == 0:
                continue
            image_id = int(target["image_id"])
            seen.append(image_id)
            np.testing.assert_allclose(image.permute(1, 2, 0).numpy() * 255, pixels["val", image_id], atol=1e-4)
            rows = oracle.loadAnns(oracle.getAnnIds(image_id))
            assert [category[label - 1] for label in target["labels"].tolist()] == [row["category_id"] for row in rows]
            assert target["iscrowd"].tolist() == [row["iscrowd"] for row in rows]
            assert target["area"].tolist() == [row["area"] for row in rows]
            xywh = np.array([row["bbox"] for row in rows]).reshape(-1, 4)
            np.testing.assert_allclose(
                target["boxes"].numpy(), np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]), atol=1e-3
            )
            for mask, row in zip(target["masks"], rows, strict=True):
                assert np.array_equal(mask.numpy(), oracle.annToMask(row).astype(bool))
    assert sorted(seen) == sorted(oracle.getImgIds())


def test_ade20k_arrives_with_its_indices_shifted(ade20k):
    root, content = ade20k
    dm = segmentation(root, eval_batch_size=4)
    assert dm.num_classes == 150
    dm.setup("predict")
    keys = set()
    for batch in dm.predict_dataloader():
        for number in (batch["weight"] > 0).nonzero().flatten().tolist():
            key = dm.image_name(int(batch["id"][number]))
            keys.add(key)
            shown, class_map = content["val", key]
            height, width = batch["mask_size"][number].tolist()
            assert np.array_equal(batch["mask"][number, :height, :width], class_map)
            height, width = batch["size"][number].tolist()
            image = batch["image"][number, :, :height, :width].permute(1, 2, 0)
            np.testing.assert_allclose(image.numpy() * 255, shown, atol=1e-4)
            assert np.array_equal(dm.picture(int(batch["id"][number])), shown)
    assert keys == {key for split, key in content if split == "val"}


def digest(value, total=None):
    """SHA-256 of everything in a batch."""
    total = total or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        total.update(str(value.shape).encode() + value.numpy().tobytes())
    else:
        for _, part in sorted(value.items()) if isinstance(value, dict) else enumerate(value):
            digest(part, total)
    return total.hexdigest()


class Recorder(LightningModule):
    """Writes down what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.digests = []
        self.evaluated = []

    def training_step(self, batch, batch_idx):
        self.digests.append(digest(batch))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.evaluated += batch["id"][batch["weight"] > 0].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("build", [detection, segmentation])
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_bit_by_bit(build, request, tmp_path):
    root, _ = request.getfixturevalue("coco" if build is detection else "ade20k")
    trainer = partial(Trainer, accelerator="cpu", num_sanity_val_steps=0, default_root_dir=tmp_path, **QUIET)
    whole, first, rest = Recorder(), Recorder(), Recorder()
    trainer(max_steps=7).fit(whole, datamodule=build(root))
    assert len(whole.digests) == len(set(whole.digests)) == 7  # 3 batches an epoch
    stopped = trainer(max_steps=4)
    stopped.fit(first, datamodule=build(root))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    trainer(max_steps=7).fit(rest, datamodule=build(root), ckpt_path=tmp_path / "stopped.ckpt", weights_only=False)
    assert first.digests + rest.digests == whole.digests
    assert whole.evaluated == [*range(6), *range(6)]  # after each of two epochs
