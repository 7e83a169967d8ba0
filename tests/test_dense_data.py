"""Detection and segmentation through the whole data plane: batches, order, resume, ranks, bad samples."""

import io
import json
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.annotations import encode_class_map, encode_mask
from datamodules.detection import DetectionDataModule
from datamodules.index import NO_VALUE, SQUARE
from datamodules.indexer import index_dataset
from datamodules.loader import EvalLoader, WorkerConfig
from datamodules.opening import MixtureSource
from datamodules.pack import pack
from datamodules.sampler import EvalBatchSampler
from datamodules.segmentation import SegmentationDataModule
from datamodules.sources import SourceOptions, open_source
from datamodules.transforms_detection import DetectionEvalTransform, DetectionTrainTransform
from datamodules.transforms_segmentation import SegmentationEvalTransform, SegmentationTrainTransform
from datamodules.types import DataError
from tests.dense_batches import flat

KINDS = {
    "detection": partial(
        DetectionDataModule,
        train_transform=DetectionTrainTransform((64, 80), 128, crop=0.5, crop_short_sides=(64,), crop_sides=(48, 64)),
        eval_transform=DetectionEvalTransform(64, 128),
    ),
    "segmentation": partial(
        SegmentationDataModule,
        train_transform=SegmentationTrainTransform(64, 64, 128),
        eval_transform=SegmentationEvalTransform(64, 128),
    ),
}
TASKS = pytest.mark.parametrize("task", KINDS)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Digits scenes of both tasks: 40 to train on, 8 to evaluate."""
    root = tmp_path_factory.mktemp("scenes")
    for task in KINDS:
        pack(open_source("digits", SourceOptions(task=task, scenes=40)), str(root / task), shard_size_mib=0.1)
    return root


def module(task, folder, **options):
    options = {"batch_size": 8, "num_workers": 0, "lanes": 4, "window": 10, **options}
    return KINDS[task](str(folder), **options)


def fitted(task, folder, **options):
    dm = module(task, folder, **options)
    dm.setup("fit")
    return dm


@TASKS
def test_an_epoch_has_the_batches_of_the_contract(task, scenes):
    dm = fitted(task, scenes / task)
    batches = list(dm.train_dataloader())
    assert len(batches) == dm.batches_per_epoch == 5
    assert sorted(torch.cat([batch["id"] for batch in batches]).tolist()) == list(range(40))
    for batch in batches:
        assert batch["weight"].tolist() == [1.0] * 8
        if task == "segmentation":
            assert (batch["image"].shape, batch["mask"].shape) == ((8, 3, 64, 64), (8, 64, 64))
            assert set(batch["mask"].unique().tolist()) <= {*range(11), 255}
            assert batch["size"].tolist() == batch["mask_size"].tolist() == [[64, 64]] * 8
            continue
        for image, target in zip(batch["image"], batch["target"], strict=True):
            assert target["masks"].shape == (len(target["labels"]), *image.shape[1:])
            assert {name: value.dtype for name, value in target.items()} == {
                "boxes": torch.float32,
                "labels": torch.int64,
                "masks": torch.bool,
                "iscrowd": torch.int64,
                "area": torch.float32,
                "image_id": torch.int64,
                "size": torch.int64,
            }
            assert all(1 <= label <= 10 for label in target["labels"].tolist())


@TASKS
def test_the_probe_batch_is_in_evaluation_form_and_its_pictures_come_back(task, scenes):
    dm = module(task, scenes / task)
    batch = dm.probe_batch(3)
    assert batch["id"].tolist() == [0, 2, 5]
    assert flat(batch) == flat(module(task, scenes / task, seed=9).probe_batch(3))
    pictures = dm.denormalise(batch["image"])
    assert all(picture.min() >= 0 and picture.max() <= 1 for picture in pictures)
    if task == "detection":
        for image, target in zip(batch["image"], batch["target"], strict=True):
            assert min(image.shape[1:]) == 64
            assert target["masks"].shape[1:] == tuple(target["size"].tolist())
    else:
        assert batch["size"].amin(1).tolist() == [64] * 3
        for number, (height, width) in enumerate(batch["mask_size"].tolist()):
            assert (batch["mask"][number, height:] == 255).all() and (batch["mask"][number, :, width:] == 255).all()


def test_masks_are_left_out_where_nobody_wants_them(scenes):
    dm = fitted("detection", scenes / "detection", with_masks=False)
    batch = next(iter(dm.train_dataloader()))
    assert all("masks" not in target for target in [*batch["target"], *dm.probe_batch(2)["target"]])


@TASKS
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_sees_every_sample_once_on_any_number_of_ranks(task, world, scenes):
    dm = fitted(task, scenes / task)
    dataset = dm._dataset("val", dm.eval_transform)
    loaders = [EvalLoader(dataset, EvalBatchSampler(8, 5, rank, world), WorkerConfig()) for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    seen = []
    for batch in (batch for loader in loaders for batch in loader):
        real = batch["weight"] > 0
        seen += batch["id"][real].tolist()
        assert (batch["id"][~real] == -1).all()
        for number in (~real).nonzero().flatten().tolist():
            assert batch["image"][number].abs().sum() == 0
            if task == "detection":
                assert len(batch["target"][number]["labels"]) == 0
            else:
                assert (batch["mask"][number] == 255).all()
    assert sorted(seen) == list(range(8))


@TASKS
def test_workers_change_nothing(task, scenes):
    def two_batches(workers):
        dm = fitted(task, scenes / task, num_workers=workers)
        stream = iter(dm.train_dataloader())
        batches = [flat(next(stream)) for _ in range(2)]
        dm.teardown("fit")
        return batches

    assert two_batches(2) == two_batches(0)


@pytest.mark.slow
@TASKS
@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_start_methods_change_nothing(task, start, scenes):
    def first_batch(**options):
        dm = fitted(task, scenes / task, **options)
        batch = flat(next(iter(dm.train_dataloader())))
        dm.teardown("fit")
        return batch

    assert first_batch(num_workers=1, worker_start=start) == first_batch()


@TASKS
def test_a_resumed_stream_is_the_rest_of_the_uninterrupted_one(task, scenes):
    whole = fitted(task, scenes / task).train_dataloader()
    expected = [flat(batch) for _ in range(2) for batch in whole]
    resumed = fitted(task, scenes / task)
    resumed.load_state_dict({**resumed.state_dict(), "committed": 3})
    resumed_loader = resumed.train_dataloader()
    assert [flat(batch) for batch in resumed_loader] == expected[3:8]


def test_a_checkpoint_of_another_grouping_is_refused_by_name(scenes):
    state = fitted("detection", scenes / "detection", group_batches=4).state_dict()
    assert state["guard"]["group_batches"] == 4
    other = fitted("detection", scenes / "detection", group_batches=1)
    other.load_state_dict(state)
    with pytest.raises(DataError, match=r"written with data.group_batches 4, this run has 1; .*'\[group_batches\]'"):
        other.train_dataloader()


def test_wide_and_tall_images_meet_in_one_batch_of_a_window_at_most(scenes):
    dm = fitted("detection", scenes / "detection", group_batches=5)
    aspects = dm.opened.split("train")[0].aspects()
    for sample, aspect in enumerate(aspects.tolist()):
        height, width = dm._dataset("train", dm.eval_transform)[sample].target["size"].tolist()
        assert aspect == round(width / height * SQUARE)
    mixed = [len(set((aspects[batch["id"]] >= SQUARE).tolist())) > 1 for batch in dm.train_dataloader()]
    assert sum(mixed) <= 1 < len(mixed)


def write(folder, samples, task, classes):
    """Tars as somebody else would make them: {split: {key: {extension: bytes}}}."""
    for split, fields in samples.items():
        (folder / split).mkdir(parents=True)
        with tarfile.open(folder / split / f"{split}-0.tar", "w") as tar:
            for key, extension, content in ((k, e, c) for k, files in fields.items() for e, c in files.items()):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index_dataset(folder, classes, task=task)
    return folder


def png(width=20, height=16, mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, (width, height), 7).save(stream, format="PNG")
    return stream.getvalue()


def boxes(**changes):
    row = {"image_id": 1, "width": 20, "height": 16, "boxes": [[1, 2, 9, 8]], "labels": [1], "iscrowd": [0]}
    row |= {"area": [48.0], "masks": [encode_mask(np.ones((16, 20), bool))]}
    return json.dumps(row | changes).encode()


BAD_OBJECTS = {
    "zero-area": (boxes(boxes=[[1, 2, 1, 8]]), "object 0: box .* is empty"),
    "outside": (boxes(boxes=[[1, 2, 21, 8]]), "object 0: box .* leaves the image of 20x16"),
    "label": (boxes(labels=[3]), "object 0: label 3 is not in 1 … 2"),
    "mask-size": (boxes(masks=[encode_mask(np.ones((16, 21), bool))]), r"mask size \[16, 21\] instead of \[16, 20\]"),
    "other-image": (boxes(width=40), "for an image of 40x16, the image has 20x16|mask size"),
    "no-json": (b"{", "no detection annotation"),
}
BAD_MAPS = {
    "class": (encode_class_map(np.full((16, 20), 2, np.uint8)), "class id 2 is not below the 2 classes"),
    "size": (encode_class_map(np.zeros((20, 16), np.uint8)), r"size \(16, 20\) instead of the image's \(20, 16\)"),
    "mode": (png(mode="RGB"), "mode RGB; a class map has one 8-bit channel"),
    "bytes": (b"\x89PNG", "no readable PNG"),
}
BAD = [("detection", "json", boxes(), *row) for row in BAD_OBJECTS.values()]
BAD += [("segmentation", "seg.png", encode_class_map(np.ones((16, 20), np.uint8)), *row) for row in BAD_MAPS.values()]


@pytest.mark.parametrize(("task", "field", "good", "bad", "message"), BAD, ids=[*BAD_OBJECTS, *BAD_MAPS])
def test_a_bad_annotation_is_named_with_its_sample_or_skipped_with_weight_zero(
    task, field, good, bad, message, tmp_path
):
    rows = {f"s{number}": {"png": png(), field: bad if number == 2 else good} for number in range(4)}
    folder = write(tmp_path / "data", {"train": rows, "val": rows}, task, ["a", "b"])
    options = {"batch_size": 4, "lanes": 1, "quarantine_dir": str(tmp_path)}
    with pytest.raises(DataError, match=rf"train-0.tar, sample 's2'.*{message}") as error:
        list(fitted(task, folder, **options).train_dataloader())
    assert "\n" not in str(error.value)
    dm = fitted(task, folder, on_error="skip", max_skipped=2, **options)
    for loader in (dm.train_dataloader(), dm.val_dataloader()):
        (batch,) = loader
        place = batch["id"].tolist().index(2)
        assert batch["weight"].tolist() == [float(number != place) for number in range(4)]
        assert batch["image"][place].abs().sum() == 0
        if task == "detection":
            assert len(batch["target"][place]["boxes"]) == 0
        else:
            assert (batch["mask"][place] == 255).all()
    kinds = {kind for kind, count in dm.skipped_counts().items() if count}
    assert kinds == {"undecodable" if message == "no readable PNG" else "label"}
    assert [json.loads(line)["sample"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()] == [2, 2]


def test_an_image_of_another_task_is_refused(scenes):
    with pytest.raises(DataError, match=r"is packed for detection; data\.path must be packed for segmentation"):
        module("segmentation", scenes / "detection").setup("fit")


def test_two_datasets_mix_with_their_annotations(scenes):
    sources = [MixtureSource(str(scenes / "detection"), 3.0), MixtureSource(str(scenes / "detection"), 1.0)]
    dm = KINDS["detection"](sources, batch_size=8, num_workers=0)
    dm.setup("fit")
    batch = next(iter(dm.train_dataloader()))
    assert int((batch["id"] >= 40).sum()) == 2
    assert len(batch["target"]) == 8


def test_a_grouping_without_known_shapes_says_so(tmp_path, caplog):
    foreign = json.dumps({**dict(reversed(json.loads(boxes()).items()))}).encode()
    rows = {f"s{number}": {"png": png(), "json": foreign} for number in range(4)}
    dm = fitted("detection", write(tmp_path / "data", {"train": rows}, "detection", ["a"]), batch_size=4)
    assert dm.opened.split("train")[0].aspects().tolist() == [NO_VALUE] * 4
    with caplog.at_level("WARNING"):
        assert sorted(next(iter(dm.train_dataloader()))["id"].tolist()) == [0, 1, 2, 3]
    assert "does not know the shape of 4 of 4 images" in caplog.text


def test_a_batch_of_many_objects_takes_few_file_descriptors(scenes):
    def descriptors():
        return len(list(Path("/proc/self/fd").iterdir()))

    dm = fitted("detection", scenes / "detection", batch_size=20, num_workers=1)
    loader = dm.train_dataloader()
    kept = [next(iter(loader))]
    before = descriptors()
    kept += [batch for _ in range(3) for batch in loader]
    dm.teardown("fit")
    assert sum(len(batch["target"]) for batch in kept[1:]) == 120
    assert descriptors() - before <= 6 * 11  # nine fields, weights and ids in each; one for each tensor would be 960
