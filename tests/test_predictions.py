"""`mirrorla predict` on a folder of images, for all three tasks, on any number of ranks: files, names, numbers."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.annotations import decode_mask
from datamodules.pack import pack
from datamodules.sampler import EvalBatchSampler
from datamodules.sources import SourceOptions, open_source
from lightning_modules.checkpoint import list_checkpoints
from lightning_modules.cli import main
from lightning_modules.output_names import OutputNames
from lightning_modules.part_files import MergedParts, PartFile

TASKS = ["classification", "detection", "segmentation"]
TINY = [
    *("--trainer.max_steps=1", "--trainer.log_every_n_steps=1"),
    *("--data.batch_size=4", "--data.eval_batch_size=64", "--data.lanes=2", "--data.num_workers=0"),
    *("--monitoring.num_pictures=2", "--monitoring.num_probes=2", "--model.optim.warmup_steps=0"),
]
NAMES = ["a.jpg", "a.png", "b/c d.png", "b/ä.jpg", "z.overlay.png"]
STEMS = ["a.jpg", "a.png", "b/c d", "b/ä", "z.overlay.png"]  # what their files' names begin with


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step for every task, on a few scenes."""
    runs = {}
    for task in TASKS:
        root = tmp_path_factory.mktemp(task)
        pack(open_source("digits", SourceOptions(task=task, scenes=20)), str(root / "data"))
        options = [f"--data.path={root / 'data'}", f"--run_dir={root / 'run'}", *TINY]
        assert main(["fit", "--config", f"digits/{task}", *options]) == 0
        runs[task] = root / "run"
    return runs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images of different sizes and formats, some of equal names."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50 + 10 * number, 70, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def predicted(trained, images):
    """The three runs with predictions."""
    for task, run in trained.items():
        assert main(["predict", "--config", f"digits/{task}", f"--data.path={images}", *options_of(run, task)]) == 0
    return trained


def options_of(run, task):
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    sure = ["--model.detector.score_threshold=0.0"] if task == "detection" else []
    return [f"--run_dir={run}", f"--ckpt_path={checkpoint}", "--data.num_workers=0", "--data.eval_batch_size=2", *sure]


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("task", TASKS)
def test_training_leaves_figures_curves_layout_and_hyperparameters(trained, task):
    events = EventAccumulator(str(trained[task] / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    figures = {
        "classification": {"figures/predictions", "figures/confusion", "figures/per_class_accuracy"},
        "detection": {"figures/predictions/000000", "figures/confusion", "figures/per_class_box_ap"},
        "segmentation": {"figures/predictions/000000", "figures/confusion", "figures/per_class_iou"},
    }
    assert figures[task] <= set(tags["images"])
    plugins = [events.SummaryMetadata(tag).plugin_data.plugin_name for tag in tags["tensors"]]
    assert "custom_scalars" in plugins
    assert ("pr_curves" in plugins) == (task != "segmentation")
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert any(tag.startswith("mirror/theta") for tag in tags["histograms"])


def test_classification_gives_a_row_per_image(predicted):
    with (predicted["classification"] / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["image"] for row in rows] == NAMES
    assert {row["class_1"] for row in rows} <= {str(digit) for digit in range(10)}
    assert not (predicted["classification"] / "predictions").exists()


def test_detection_gives_pictures_and_results_that_coco_code_loads(predicted, images):
    folder = predicted["detection"] / "predictions"
    assert files_below(folder) == {"detections.json", "images.json", *(f"{stem}.png" for stem in STEMS)}
    coco = COCO(str(folder / "images.json"))
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == NAMES
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == [str(digit) for digit in range(10)]
    rows = json.loads((folder / "detections.json").read_text())
    assert {row["image_id"] for row in rows} == set(range(len(NAMES)))
    results = coco.loadRes(str(folder / "detections.json"))
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(images / image["file_name"]) as original:
            assert original.size == (image["width"], image["height"])
        for row in results.loadAnns(results.getAnnIds(image["id"])):
            x, y, width, height = row["bbox"]
            assert min(x, y) >= 0 and x + width <= image["width"] + 1e-2 and y + height <= image["height"] + 1e-2
            assert decode_mask(row["segmentation"]).shape == (image["height"], image["width"])


def test_segmentation_gives_class_maps_and_overlays(predicted, images):
    folder = predicted["segmentation"] / "predictions"
    assert files_below(folder) == {f"{stem}{ending}" for stem in STEMS for ending in (".png", ".overlay.png")}
    for name, stem in zip(NAMES, STEMS, strict=True):
        with Image.open(folder / f"{stem}.png") as class_map, Image.open(images / name) as original:
            assert class_map.mode == "L"
            assert class_map.size == original.size
            assert np.asarray(class_map).max() < 11


@pytest.mark.parametrize("task", TASKS)
def test_predicting_again_gives_the_same_files(predicted, images, task, capfd):
    run = predicted[task]
    before = {name: (run / name).read_bytes() for name in files_below(run) if name.startswith("predictions")}
    options = [*options_of(run, task), "--data.eval_batch_size=3"]
    assert main(["predict", "--config", f"digits/{task}", f"--data.path={images}", *options]) == 0
    assert {name: (run / name).read_bytes() for name in before} == before
    assert len(before) == len([name for name in files_below(run) if name.startswith("predictions")])
    assert f"({len(NAMES)} images)" in capfd.readouterr().err


def test_packed_detection_keeps_the_datasets_numbers_and_keys(trained, tmp_path):
    run = trained["detection"]
    options = [f"--data.path={run.parent / 'data'}", *options_of(run, "detection"), f"--run_dir={tmp_path}"]
    assert main(["predict", "--config", "digits/detection", *options]) == 0
    coco = COCO(str(tmp_path / "predictions" / "images.json"))
    names = {image["id"]: image["file_name"] for image in coco.loadImgs(coco.getImgIds())}
    assert names == {number: f"scene-{number:06d}" for number in range(4)}
    assert (tmp_path / "predictions" / "scene-000003.png").is_file()


def test_unreadable_image_is_named_or_skipped(trained, tmp_path, capfd):
    folder, run = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no image")
    options = [f"--data.path={folder}", *options_of(trained["segmentation"], "segmentation"), f"--run_dir={run}"]
    command = ["predict", "--config", "digits/segmentation", *options]
    assert main(command) == 1
    assert "bad.png" in capfd.readouterr().err.splitlines()[-1]
    assert main([*command, "--data.on_error=skip", "--data.max_skipped=5"]) == 0
    assert files_below(run / "predictions") == {"good.png", "good.overlay.png"}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_give_the_files_of_one(predicted, images, task, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    options = [f"--data.path={images}", *options_of(predicted[task], task), f"--run_dir={tmp_path}", *ranks]
    command = [sys.executable, "-m", "lightning_modules.cli", "predict", "--config", f"digits/{task}", *options]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, timeout=250, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    one = {name for name in files_below(predicted[task]) if name.startswith("predictions")}
    assert one == {name for name in files_below(tmp_path) if name.startswith("predictions")}
    assert {name: (tmp_path / name).read_bytes() for name in one} == {
        name: (predicted[task] / name).read_bytes() for name in one
    }


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 13])
def test_parts_of_all_ranks_merge_in_the_order_of_the_samples(tmp_path, world, count):
    for rank in range(world):
        part = PartFile(tmp_path, rank)
        for request in EvalBatchSampler(count, 4, rank, world):
            for sample in request.ids[request.weights > 0].tolist():
                part.add(sample, {"of": sample})
        part.close()
    (tmp_path / "rank_9.part").write_text("left by an earlier attempt")
    with MergedParts(tmp_path, world) as records:
        assert [row["of"] for row in records] == [row["of"] for row in records] == list(range(count))
        assert records.count == count
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", "a"),
        ("folder/a.b.jpg", "folder/a.b"),
        ("key-without-extension", "key-without-extension"),
        ("../../etc/passwd.png", "%2E%2E/%2E%2E/etc/passwd"),
        ("/abs/a.png", "%/abs/a"),
        ("a/./b.png", "a/%2E/b"),
        ("tab\t\\%~.png", "tab%09%5C%25%7E"),
        (".png", ".png"),
    ],
)
def test_names_never_leave_the_folder(name, expected):
    assert OutputNames([name]).of(0, name).as_posix() == expected


def test_very_long_names_are_cut_and_stay_different(tmp_path):
    names = [f"{'ä' * 150}{ending}.png" for ending in "ab"]
    made = [OutputNames(names).of(sample, name) for sample, name in enumerate(names)]
    assert made[0] != made[1]
    for path in made:
        (tmp_path / f"{path}.overlay.png").write_bytes(b"")


PARTS = st.text(st.sampled_from("ab./~%\\ \0"), min_size=1, max_size=6)


@given(st.lists(st.tuples(PARTS, st.sampled_from(["", ".jpg", ".png", ".overlay.png"])), max_size=8))
def test_no_two_images_share_a_file(parts):
    names = [stem + ending for stem, ending in parts]
    naming = OutputNames(names)
    made = [naming.of(sample, name) for sample, name in enumerate(names)]
    files = [f"{path}{ending}" for path in made for ending in (".png", ".overlay.png")]
    assert len(set(files)) == len(files)
    for path in made:
        assert not path.is_absolute()
        assert not {"..", "."} & set(path.parts)
        assert not any(ord(letter) < 32 or letter == "\\" for letter in str(path))


def module_of(task):
    from lightning_modules.backbone import BackboneConfig
    from lightning_modules.classification import ClassificationModule
    from lightning_modules.detection import DetectionModule
    from lightning_modules.segmentation import SegmentationModule
    from mirrorla.heads.detection import DetectorConfig
    from mirrorla.heads.segmentation import SegmenterConfig

    backbone = BackboneConfig("mirrorla_pico", drop_path_rate=0.0)
    if task == "classification":
        return ClassificationModule(3, backbone, ema_decay=0.9)
    if task == "segmentation":
        return SegmentationModule(3, backbone, SegmenterConfig(channels=16), ema_decay=0.9)
    small = DetectorConfig(channels=16, proposals=20, box_width=16, mask_width=16, mask_convs=1, score_threshold=0.0)
    return DetectionModule(3, backbone, small, ema_decay=0.9)


@pytest.mark.parametrize("task", TASKS)
def test_predictions_survive_saving_and_loading(task, tmp_path):
    """Bit for bit, with averaged weights that differ from the trained ones."""
    torch.manual_seed(0)
    module, other = module_of(task).eval(), module_of(task).eval()
    with torch.no_grad():
        for weights in module.evaluated.parameters():
            weights.add_(torch.randn_like(weights) * 0.01)
    batch = {"image": torch.randn(2, 3, 64, 64), "id": torch.arange(2), "weight": torch.ones(2)}
    batch["size"] = batch["mask_size"] = torch.full((2, 2), 64)
    batch["target"] = [{"size": torch.tensor([50, 70])}] * 2
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    other.on_load_checkpoint(loaded)
    other.load_state_dict(loaded["state_dict"])
    before, after = (one.predict_step(batch, 0) for one in (module, other))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    fresh = module_of(task).eval().predict_step(batch, 0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(fresh, before, rtol=0, atol=0)
