"""`mirrorla export`: files that compute what the checkpoint computes, hold none of our operators, and run elsewhere."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules import export as export_module
from lightning_modules import export_formats
from lightning_modules.checkpoint import step_path
from lightning_modules.cli import main
from lightning_modules.export_network import folded, folded_mirrors, portable, region_means
from lightning_modules.export_source import exported_part, read_source
from mirrorla import MirrorConfig, create_backbone
from tests.export_runs import CLASSES, config_of, save_run

FORMATS = ["safetensors", "torch-export", "onnx"]
SUFFIX = {name: form.suffix for name, form in export_formats.FORMATS.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {task: save_run(tmp_path_factory.mktemp(task), config_of(task)) for task in CLASSES}


@pytest.fixture(scope="module")
def classifiers(runs, tmp_path_factory):
    """The classifier in every format."""
    folder = tmp_path_factory.mktemp("exported")
    files = {name: folder / f"classifier{SUFFIX[name]}" for name in FORMATS}
    for name, path in files.items():
        assert main(["export", str(runs["classification"]), "--format", name, "--output", str(path)]) == 0
    return files


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def source_of(run):
    return read_source(step_path(run / "checkpoints", 5))


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_gives_the_averaged_weights_logits(name, classifiers, runs):
    card, network = export_formats.FORMATS[name].read(classifiers[name])
    module = source_of(runs["classification"]).module
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert_close(network(images), [module.ema.module(images)])
        with pytest.raises(AssertionError):
            assert_close(network(images), [module.backbone.eval()(images)])
    assert (card.weights, card.task, card.class_names) == ("averaged", "classification", ["a", "b", "c"])
    assert card.preprocessing["std"] == [0.3, 0.2, 0.1]
    assert (card.mirror["cross_head"], card.mirror["modulation"]) == (False, "instance")


@pytest.mark.parametrize("name", ["onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in FORMATS[:2])])
def test_the_example_on_a_card_runs_as_it_stands(name, classifiers):
    text = classifiers[name].with_name(f"{classifiers[name].name}.md").read_text()
    for fact in ("val/top1 0.8750", "step_00000005", "relative error", "mirrorla_pico", "## Preprocessing"):
        assert fact in text
    example = text.split("```python\n")[1].split("```")[0]
    check = "assert tuple(outputs['logits'].shape) == (1, 3), outputs"
    folder = classifiers[name].parent
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-W", "ignore", "-c", f"{example}\n{check}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]


def test_onnx_runs_at_other_resolutions_and_holds_no_operator_of_ours(classifiers, runs):
    import onnx

    model = onnx.load(classifiers["onnx"])
    names = [f"{node.domain}::{node.op_type}" for node in model.graph.node]
    assert "::MatMul" in names
    assert not [name for name in names if "mirrorla" in name]
    _, network = export_formats.read_onnx(classifiers["onnx"])
    module = source_of(runs["classification"]).module
    for shape in ((1, 3, 32, 32), (2, 3, 45, 70)):
        images = torch.randn(shape)
        with torch.no_grad():
            assert_close(network(images), [module.evaluated(images)])


def test_torch_program_holds_no_operator_of_ours(classifiers):
    program = torch.export.load(classifiers["torch-export"])
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in names
    assert not [name for name in names if "mirrorla" in name]


@pytest.mark.parametrize("modulation", ["none", "ema", "instance"])
@pytest.mark.parametrize("kind,count", [("mirror", 1), ("mirror", 4), ("softmax", 1)])
def test_folding_and_the_portable_attention_change_nothing(modulation, kind, count):
    config = MirrorConfig(modulation=modulation, power=2.0, query_mirrors=count)
    torch.manual_seed(1)
    model = create_backbone("mirrorla_pico", num_classes=4, mirror=config, attention=("mirror", "mirror", kind, kind))
    model.eval()
    for layer in model.attentions():
        if layer.mirrors is not None and layer.mirrors.gain is not None:
            torch.nn.init.normal_(layer.mirrors.gain)
    images = torch.randn(2, 3, 40, 72)
    with torch.no_grad():
        expected = model(images)
        merged = folded(model)
        for network in (merged, portable(merged)):
            torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    left = [name for name, _ in merged.named_parameters() if ".mirrors." in name]
    assert not [name for name in left if name.endswith(".u")]
    assert bool(left) == (modulation == "instance" or count > 1)
    assert folded_mirrors(config).block_mirror == (modulation == "instance" or count > 1)


@pytest.mark.parametrize("name", ["safetensors", "onnx"])
def test_predictions_of_a_file_are_the_checkpoints(name, classifiers, runs, images, tmp_path):
    out = tmp_path / "out"
    assert main(["predict", str(classifiers[name]), f"--data.path={images}", f"--run_dir={out}"]) == 0
    with (out / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["image"] for row in rows] == [f"{number}.png" for number in range(5)]
    from datamodules.module import ClassificationDataModule

    source = source_of(runs["classification"])
    data = ClassificationDataModule(str(images), eval_transform=source.transform, num_workers=0)
    data.setup("predict")
    (batch,) = list(data.predict_dataloader())
    with torch.no_grad():
        found = source.module.predict_step(batch, 0)
    for place, row in enumerate(rows):
        assert [row[f"class_{k}"] for k in (1, 2, 3)] == ["abc"[label] for label in found["classes"][place].tolist()]
        scores = [float(row[f"score_{k}"]) for k in (1, 2, 3)]
        np.testing.assert_allclose(scores, found["scores"][place].numpy(), atol=2e-5)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (6, 12), (33, 50)])
def test_means_over_regions_are_torchs(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for parts in (1, 2, 3, 6):
        torch.testing.assert_close(region_means(x, parts), torch.nn.functional.adaptive_avg_pool2d(x, parts))


def test_a_file_that_computes_something_else_is_not_written(runs, tmp_path, monkeypatch, capsys):
    def wrong(network):
        network = folded(network)
        network.head.fc.bias += 0.01
        return network

    monkeypatch.setattr(export_module, "folded", wrong)
    out = tmp_path / "model.safetensors"
    assert main(["export", str(runs["classification"]), "--format", "safetensors", "--output", str(out)]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "gives other results than the checkpoint" in told and "nothing was written" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{run}", "--format", "onnx", "--output", "model.pt"], "--output model.pt must end in .onnx"),
        (["{run}", "--format", "tflite"], "see mirrorla export --help"),
        (["{run}"], "see mirrorla export --help"),
        (["last", "--format", "onnx"], "last of which run? give --run_dir RUN"),
        (["/nonexistent", "--format", "onnx"], "/nonexistent does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(runs, options, message, capsys):
    assert main(["export", *(word.format(run=runs["classification"]) for word in options)]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_an_existing_file_is_never_overwritten(classifiers, runs, capsys):
    path = classifiers["safetensors"]
    before = path.read_bytes()
    assert main(["export", str(runs["classification"]), "--format", "safetensors", "--output", str(path)]) == 2
    assert "exists already; give another name" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_missing_package_is_named_with_the_command_that_installs_it(runs, monkeypatch, capsys):
    monkeypatch.setattr(export_formats.importlib.util, "find_spec", lambda name: None)
    assert main(["export", str(runs["classification"]), "--format", "onnx"]) == 2
    assert "needs onnx; pip install 'mirrorla[export]'" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
def test_foreign_files_are_refused_by_predict(suffix, tmp_path, images, capsys):
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(b"no model")
    assert main(["predict", str(path), f"--data.path={images}"]) == 2
    told = capsys.readouterr().err
    assert f"foreign{suffix} cannot be read" in told and told.count("\n") == 1


def test_programs_are_never_loaded_for_predicting(classifiers, images, monkeypatch, capsys):
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("a program was loaded"))
    assert main(["predict", str(classifiers["torch-export"]), f"--data.path={images}"]) == 2
    told = capsys.readouterr().err
    assert "can run code that somebody put into it" in told and told.count("\n") == 1


def test_last_and_the_default_place_and_the_help(tmp_path, capsys):
    run = save_run(tmp_path / "run", config_of("classification"))
    assert main(["export", "last", "--run_dir", str(run), "--format", "safetensors"]) == 0
    assert {path.name for path in (run / "export").iterdir()} == {
        "step_00000005.safetensors",
        "step_00000005.safetensors.md",
    }
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "mirrorla predict segmenter.onnx" in capsys.readouterr().out


def test_exported_weights_start_another_training(classifiers):
    mirror = MirrorConfig(cross_head=False)
    create_backbone("mirrorla_pico", num_classes=3, mirror=mirror, pretrained=str(classifiers["safetensors"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("variant", ["pico", "xtiny", "tiny"])
@pytest.mark.parametrize("task", ["classification", "segmentation", "upernet", "detection"])
def test_every_task_and_variant_exports(task, variant, name, tmp_path):
    head = {"head": {"kind": "upernet", "channels": 16}} if task == "upernet" else {}
    task = "segmentation" if task == "upernet" else task
    run = save_run(tmp_path / "run", config_of(task, 64, f"mirrorla_{variant}", **head))
    assert main(["export", str(run), "--format", name]) == 0
    source = source_of(run)
    card, network = export_formats.FORMATS[name].read(run / "export" / f"step_00000005{SUFFIX[name]}")
    part = exported_part(source.module.evaluated, task)
    for shape in ((1, 3, 64, 64), (2, 3, 90, 131)):
        images = torch.randn(shape)
        found = network(images)
        assert_close(found, export_formats.runner(part)(images))
        assert len(found) == len(card.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["safetensors", "onnx"])
def test_class_maps_of_a_file_are_the_checkpoints(name, runs, images, tmp_path):
    path, out = tmp_path / f"segmenter{SUFFIX[name]}", tmp_path / "out"
    assert main(["export", str(runs["segmentation"]), "--format", name, "--output", str(path)]) == 0
    assert main(["predict", str(path), f"--data.path={images}", f"--run_dir={out}"]) == 0
    from datamodules.segmentation import SegmentationDataModule

    source = source_of(runs["segmentation"])
    data = SegmentationDataModule(str(images), eval_transform=source.transform, num_workers=0)
    data.setup("predict")
    (batch,) = list(data.predict_dataloader())
    for number, expected in enumerate(source.module.predict_step(batch, 0)["predictions"]):
        with Image.open(out / "predictions" / f"{number}.png") as found:
            wrong = np.count_nonzero(np.asarray(found) != expected.numpy())
        assert wrong <= 2  # a tie may fall to the other side
