"""Predicting takes a plain folder of images, for every task; everything else says in one line to pack it."""

import io

import numpy as np
import pytest
from PIL import Image

from datamodules.detection import DetectionDataModule
from datamodules.folder import list_images
from datamodules.module import ClassificationDataModule
from datamodules.segmentation import SegmentationDataModule
from datamodules.transforms import EvalTransform
from datamodules.transforms_detection import DetectionEvalTransform
from datamodules.transforms_segmentation import SegmentationEvalTransform
from datamodules.types import DataError

TASKS = {
    "classification": (ClassificationDataModule, EvalTransform(16, None)),
    "detection": (DetectionDataModule, DetectionEvalTransform(20, 40)),
    "segmentation": (SegmentationDataModule, SegmentationEvalTransform(20, 40)),
}
EVERY_TASK = pytest.mark.parametrize("task", TASKS)
NAMES = ["a.png", "b/c/three.jpeg", "b/two.JPG", "été.webp"]


@pytest.fixture
def folder(tmp_path):
    """Four images, and what must not disturb them."""
    root = tmp_path / "images"
    for number, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (10 + number, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    for other in ("notes.txt", ".hidden.png", ".cache/x.png", "b/list.json"):
        (root / other).parent.mkdir(exist_ok=True)
        (root / other).write_bytes(b"nothing")
    (root / "loop").symlink_to(root, target_is_directory=True)
    return root


def module(task, path, **options):
    cls, transform = TASKS[task]
    return cls(str(path), eval_transform=transform, **{"batch_size": 3, "num_workers": 0, **options})


def test_images_are_found_below_the_folder_and_sorted(folder):
    assert list_images(folder) == sorted(NAMES)


@EVERY_TASK
def test_every_image_comes_once_with_its_name_and_its_pixels(task, folder):
    dm = module(task, folder)
    dm.prepare_data()
    dm.setup("predict")
    names = []
    for batch in dm.predict_dataloader():
        for number, sample in enumerate(batch["id"].tolist()):
            if sample == -1:
                assert batch["weight"][number] == 0
                continue
            names.append(dm.image_name(sample))
            with Image.open(folder / names[-1]) as stored:
                pixels = np.asarray(stored.convert("RGB"))
            assert np.array_equal(dm.picture(sample), pixels)
            if task == "classification":
                assert batch["label"][number] == -1
            elif task == "detection":
                assert batch["target"][number]["size"].tolist() == list(pixels.shape[:2])
                assert (len(batch["target"][number]["boxes"]), batch["target"][number]["image_id"]) == (0, sample)
            else:
                assert batch["mask_size"][number].tolist() == list(pixels.shape[:2])
                assert (batch["mask"][number] == 255).all()
    assert names == sorted(NAMES)
    assert (dm.class_names, dm.num_classes) == ([], 0)
    assert str(dm.opened) == f"{folder}: 4 images"


@EVERY_TASK
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_anything_but_predict_says_to_pack_it(task, stage, folder):
    message = f"is a plain folder of images, which only predict takes; for {stage} pack .*`mirrorla shards pack"
    with pytest.raises(DataError, match=message) as error:
        module(task, folder).setup(stage)
    assert "\n" not in str(error.value)


@EVERY_TASK
def test_a_bad_image_is_named_or_skipped(task, folder, tmp_path):
    (folder / "b" / "bad.png").write_bytes(b"\x89PNG no")
    dm = module(task, folder)
    dm.setup("predict")
    with pytest.raises(DataError, match=r"images/b/bad\.png: not a readable JPEG, PNG or WEBP image"):
        list(dm.predict_dataloader())
    dm = module(task, folder, on_error="skip", max_skipped=1, quarantine_dir=str(tmp_path))
    dm.setup("predict")
    weights = {}
    for batch in dm.predict_dataloader():
        weights |= dict(zip(batch["id"].tolist(), batch["weight"].tolist(), strict=True))
    weights.pop(-1, None)
    assert weights == {0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0, 4: 1.0}
    assert dm.skipped_counts()["undecodable"] == 1


def test_a_file_that_is_too_large_is_refused_before_it_is_read(folder):
    with (folder / "a.png").open("wb") as stream:
        stream.truncate(65 << 20)
    dm = module("detection", folder)
    dm.setup("predict")
    with pytest.raises(DataError, match=r"images/a\.png: 68157440 bytes; the limit is 67108864"):
        list(dm.predict_dataloader())


def test_a_file_that_disappears_is_named(folder):
    dm = module("segmentation", folder)
    dm.setup("predict")
    loader = dm.predict_dataloader()
    (folder / "a.png").unlink()
    with pytest.raises(DataError, match=r"images/a\.png cannot be read \(No such file or directory\)"):
        list(loader)


def test_a_folder_without_images_or_data_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"has neither dataset.json nor <split>/\*\.tar; data\.path must be"):
        module("detection", tmp_path).setup("predict")


def test_images_beside_packed_data_do_not_make_it_a_plain_folder(folder):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, format="PNG")
    (folder / "train").mkdir()
    (folder / "train" / "train-0.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"has shards .* but no index; run `mirrorla shards index"):
        module("detection", folder).setup("predict")
