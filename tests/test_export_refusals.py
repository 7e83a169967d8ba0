"""Runs and files that must not be exported: each is refused in one line and nothing of them is executed."""

import json

import pytest
import torch
import yaml

from lightning_modules import export as export_module
from lightning_modules.checkpoint import step_path
from lightning_modules.cli import main
from lightning_modules.commit import hash_file
from lightning_modules.export_card import ExportCard
from lightning_modules.manifest import MANIFEST, FileRecord, read_manifest, write_manifest
from tests.export_runs import config_of, save_run


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], 0.0),
        ([[1.0, 2.0], [3.0]], [[1.0, 2.5], [3.0]], 0.2),
        ([[1.0, float("nan")]], [[1.0, 2.0]], float("inf")),
        ([[1.0]], [[1.0, 2.0]], float("inf")),
    ],
)
def test_the_relative_error_sees_shapes_and_what_is_not_finite(found, expected, error):
    tensors = [[torch.tensor(values) for values in side] for side in (found, expected)]
    assert export_module.relative_error(*tensors) == pytest.approx(error)


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (self.canary.touch, ())


def reseal(path):
    manifest = read_manifest(path)
    names = [file.name for file in path.iterdir() if file.name != MANIFEST]
    files = {name: FileRecord((path / name).stat().st_size, hash_file(path / name)) for name in names}
    (path / MANIFEST).unlink()
    write_manifest(path, type(manifest)(**{**vars(manifest), "files": files}))


def refused(run, capsys, *options):
    code = main(["export", str(run), "--format", "safetensors", *options])
    told = capsys.readouterr().err
    assert code == 2 and told.splitlines()[-1].startswith("mirrorla export: error: "), told
    assert not (run / "export").exists()
    return told.splitlines()[-1]


def test_an_evil_pickle_is_never_executed(tmp_path, capsys):
    run, canary = save_run(tmp_path / "run", config_of("classification")), tmp_path / "canary"
    path = step_path(run / "checkpoints", 5)
    torch.save({"global_step": 5, "state_dict": {}, "mirrorla": Evil(canary)}, path / "state.pt")
    reseal(path)
    assert "cannot be read as tensors and plain values" in refused(run, capsys)
    assert not canary.exists()
    torch.load(path / "state.pt", weights_only=False)
    assert canary.exists(), "the canary is a live one"


def test_damage_is_refused(tmp_path, capsys):
    run = save_run(tmp_path / "run", config_of("classification"))
    path = step_path(run / "checkpoints", 5)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert "is damaged" in refused(path, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(class_path="os.system"), "model 'os.system' cannot be exported"),
        (lambda c: c["model"]["init_args"].update(num_classes=4), "num_classes is 3 but the configuration builds 4"),
        (lambda c: c["model"]["init_args"]["backbone"].update(depth=4), "depth"),
        (lambda c: c.pop("model"), "is no configuration of a run"),
    ],
)
def test_a_configuration_that_chooses_something_else_is_refused(change, message, tmp_path, capsys):
    run = save_run(tmp_path / "run", config_of("classification"))
    path = step_path(run / "checkpoints", 5)
    config = yaml.safe_load((path / "config.yaml").read_text())
    change(config)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    reseal(path)
    assert message in refused(run, capsys)


def test_a_card_of_another_version_is_refused():
    for text in (None, "", "{", json.dumps({"task": "x"})):
        with pytest.raises(ValueError, match="card"):
            ExportCard.from_json(text, "file.onnx")
