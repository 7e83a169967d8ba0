"""`mirrorla fit|validate|test|predict` from the first line to the files it leaves, in this process."""

import csv
import json

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules import stop_signals
from lightning_modules.checkpoint import list_checkpoints, load_plain, read_scores
from lightning_modules.cli import main

CONFIG = ["--config", "digits/classification"]
SMALL = ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2", "--trainer.log_every_n_steps", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """A run of two short epochs."""
    root = tmp_path_factory.mktemp("trained")
    assert main(["fit", *CONFIG, *SMALL, f"--data.path={digits}", f"--run_dir={root}", "--trainer.max_epochs=2"]) == 0
    stop_signals.restore()
    return root


def events_of(root):
    events = EventAccumulator(str(root / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def test_run_directory_holds_what_it_should(trained):
    names = {path.name for path in trained.iterdir()}
    files = {"config.yaml", "environment.json", "attempts.jsonl"}
    assert names == {*files, "checkpoints", "heartbeat", "lease", "logs", "tensorboard"}
    assert [path.name for path in list_checkpoints(trained / "checkpoints")] == [
        "step_00000003",
        "step_00000006",
    ]
    assert len(read_scores(trained / "checkpoints")) == 1
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["packages"]["torch"]
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["model"]["init_args"]["backbone"]["name"] == "mirrorla_pico"
    assert config["trainer"]["max_epochs"] == 2
    assert config["run_dir"] == str(trained)
    assert "epoch 2/2  step 6" in (trained / "logs" / "rank_0.log").read_text()


def test_tensorboard_holds_the_tables_tags(trained):
    events = events_of(trained)
    tags = events.Tags()
    wanted = {
        *("train/loss", "train/grad_norm", "lr/decay", "lr/no_decay", "val/loss", "val/top1", "val/top5"),
        *("throughput/images_per_s", "time/step_p50_ms", "time/step_p95_ms", "time/data_wait_share", "memory/peak_gib"),
        *("mirror/retained_energy/q/layer_0", "mirror/u_head_energy_max/layer_1", "attn/entropy/layer_0"),
    }
    assert wanted <= set(tags["scalars"])
    assert set(tags["images"]) == {"figures/predictions", "figures/confusion", "figures/per_class_accuracy"}
    assert {f"run/{name}/text_summary" for name in ("config", "environment", "attempt")} <= set(tags["tensors"])
    assert any(tag.startswith("mirror/theta") for tag in tags["histograms"])
    assert [event.step for event in events.Scalars("train/loss")] == list(range(6))
    assert [event.step for event in events.Scalars("val/top1")] == [2, 5]


def test_final_lines_say_result_place_and_command(digits, tmp_path, capsys):
    options = [f"--data.path={digits}", f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps", "2"]
    assert main(["fit", *CONFIG, *SMALL, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("validation top-1 (EMA)  ")
    assert lines[0].endswith("%")
    assert lines[-2] == f"run directory   {tmp_path / 'run'}"
    assert lines[-1].startswith("TensorBoard  ")
    assert lines[-1].endswith(f"tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}")


def test_terminal_is_quiet(digits, tmp_path, capfd):
    options = [f"--data.path={digits}", f"--run_dir={tmp_path / 'run'}", "--trainer.max_epochs", "1"]
    assert main(["fit", *CONFIG, *SMALL, *options]) == 0
    told = capfd.readouterr().err.splitlines()
    starts = ("run directory ", "model  ", "dataset  ", "devices  ", "attempt 1, ", "epoch 1/1 ")
    assert len(told) == len(starts)
    assert all(line.startswith(start) for line, start in zip(told, starts, strict=True))


def test_short_options_and_later_files_override(digits, tmp_path, capsys):
    later = tmp_path / "later.yaml"
    later.write_text("trainer:\n  max_epochs: 7\nmodel:\n  init_args:\n    label_smoothing: 0.3\n")
    options = ["--data.batch_size", "32", "--model.optim.lr", "2e-3", "--trainer.max_steps", "2", "--print_config"]
    with pytest.raises(SystemExit) as left:
        main(["fit", *CONFIG, "--config", str(later), "--config", "trainer/cpu", *options])
    assert left.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert (model["optim"]["lr"], model["label_smoothing"], model["backbone"]["name"]) == (2e-3, 0.3, "mirrorla_pico")
    assert data["batch_size"] == 32
    assert config["trainer"]["max_steps"] == 2
    assert config["trainer"]["max_epochs"] == 7
    assert config["trainer"]["accelerator"] == "cpu"


def test_saved_config_runs_again(trained, capsys):
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", str(trained / "config.yaml"), "--print_config"])
    assert left.value.code == 0
    again = yaml.safe_load(capsys.readouterr().out)
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert {**again, "ckpt_path": None} == {**saved, "ckpt_path": None}


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_evaluation_takes_the_best_and_leaves_the_run_alone(trained, digits, capsys, verb):
    before = sorted(path.name for path in (trained / "tensorboard").iterdir())
    assert main([verb, "--config", str(trained / "config.yaml")]) == 0
    out, err = capsys.readouterr()
    assert f"step_{read_scores(trained / 'checkpoints')[0].step:08d}" in err
    name = {"validate": "validation", "test": "test"}[verb]
    assert out.startswith(f"{name} top-1 (EMA)  ")
    assert sorted(path.name for path in (trained / "tensorboard").iterdir()) == before


def test_validation_of_the_best_repeats_its_score(trained, capsys):
    assert main(["validate", "--config", str(trained / "config.yaml"), "--ckpt_path", "best"]) == 0
    expected = f"{read_scores(trained / 'checkpoints')[0].value:.2%}"
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == expected


def test_predictions_are_one_row_per_image(trained, digits):
    assert main(["predict", "--config", str(trained / "config.yaml"), "--data.eval_batch_size", "50"]) == 0
    with (trained / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["id"]) for row in rows] == list(range(359))
    assert set(rows[0]) == {"id", *(f"{name}_{place}" for name in ("class", "score") for place in range(1, 6))}
    scores = [float(rows[0][f"score_{place}"]) for place in range(1, 6)]
    assert scores == sorted(scores, reverse=True)
    assert {row["class_1"] for row in rows} <= {str(digit) for digit in range(10)}
    (trained / "predictions.csv").unlink()


def test_last_starts_from_nothing_and_says_so(digits, tmp_path, capsys):
    command = ["fit", *CONFIG, *SMALL, f"--data.path={digits}", f"--run_dir={tmp_path}", "--ckpt_path", "last"]
    assert main([*command, "--trainer.max_epochs", "1"]) == 0
    assert f"none yet in {tmp_path}/checkpoints: starting from step 0" in capsys.readouterr().err
    assert main([*command, "--trainer.max_epochs", "2"]) == 0
    told = capsys.readouterr().err
    assert "attempt 2" in told
    assert "resumed at step 3, reason: completed" in told
    assert [event.step for event in events_of(tmp_path).Scalars("train/loss")] == list(range(6))


def test_finished_run_started_again_only_reports(trained, capsys):
    before = events_of(trained).Scalars("val/top1")
    assert main(["fit", "--config", str(trained / "config.yaml"), "--ckpt_path", "last"]) == 0
    assert f"{before[-1].value:.2%}" in capsys.readouterr().out.splitlines()[0]
    assert [event.step for event in events_of(trained).Scalars("val/top1")] == [event.step for event in before]
    assert len((trained / "attempts.jsonl").read_text().splitlines()) == 4  # a start and an end each


def test_result_is_that_of_the_last_step(digits, tmp_path, capsys):
    """Training ends inside the second epoch: the score of the first one would be another network's."""
    options = [
        f"--data.path={digits}",
        f"--run_dir={tmp_path}",
        "--trainer.max_steps",
        "5",
        "--trainer.max_epochs",
        "9",
    ]
    assert main(["fit", *CONFIG, *SMALL, *options]) == 0
    told = capsys.readouterr().out.splitlines()[0]
    assert main(["validate", "--config", str(tmp_path / "config.yaml"), "--ckpt_path", "last"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == told
    assert [event.step for event in events_of(tmp_path).Scalars("val/top1")] == [2, 5]


def test_peer_backbone_trains_in_the_same_module(digits, tmp_path, capsys):
    options = [f"--data.path={digits}", f"--run_dir={tmp_path}", "--trainer.max_epochs", "1"]
    peer = ["--model.backbone.name", "test_convnext", "--model.ema_decay", "null", "--data.num_workers", "0"]
    assert main(["fit", *CONFIG, *SMALL, *options, *peer]) == 0
    assert capsys.readouterr().out.startswith("validation top-1  ")
    checkpoint = load_plain(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert checkpoint["mirrorla"]["backbone"] == "test_convnext"
    assert not any(isinstance(value, torch.nn.Module) for value in checkpoint.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do where there is no GPU")
def test_a_recipe_for_gpus_says_how_to_run_without_one(tmp_path, digits, capfd):
    command = ["fit", *CONFIG, "--config", "trainer/gpu", f"--data.path={digits}", f"--run_dir={tmp_path / 'r'}"]
    assert main(command) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mirrorla fit: error:") and error.endswith("without a GPU add --config trainer/cpu")


def test_the_tensorboard_line_can_be_pasted_into_this_shell(monkeypatch):
    import shutil
    from pathlib import Path

    from lightning_modules.training_cli import _tensorboard_program

    monkeypatch.setenv("PATH", "/nowhere")
    assert Path(_tensorboard_program()).is_file()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert _tensorboard_program() == "tensorboard"


def test_a_new_run_starts_from_the_averaged_weights_of_another(trained, digits, tmp_path, capfd):
    checkpoint = list_checkpoints(trained / "checkpoints")[-1]
    options = [f"--model.backbone.pretrained={checkpoint}", f"--data.path={digits}", f"--run_dir={tmp_path / 'r'}"]
    assert main(["fit", *CONFIG, *SMALL, *options, "--trainer.max_steps=1"]) == 0
    assert f"{checkpoint}: " in (said := capfd.readouterr().err) and "tensors loaded\n" in said
