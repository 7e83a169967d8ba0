"""The command line: quick help, one-line refusals with exit code 2, tracebacks for the unexpected."""

import importlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_modules import cli, exit_codes
from lightning_modules.exit_codes import ExitCode, describe

SCRIPT = str(Path(sys.executable).parent / "mirrorla")
FIT = ["fit", "--config", "digits/classification"]


def test_help_is_quick_and_needs_no_torch():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3
    assert all(re.search(rf"^  {verb} ", done.stdout, re.MULTILINE) for verb in cli.VERBS)
    program = "import sys; from lightning_modules.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_models_lists_the_variants(capsys):
    assert cli.main(["models"]) == 0
    assert "mirrorla_tiny" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"mirrorla \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fti"], "mirrorla: error: there is no verb 'fti'; did you mean 'fit'?"),
        (["zzzz"], "mirrorla: error: there is no verb 'zzzz'; choose one of fit, validate, test, predict, sha"),
        (["models", "x"], "mirrorla models: error: unrecognized arguments: x; see mirrorla models --help"),
        (["fit"], "mirrorla fit: error: no model is configured; give --config, for example --config dig"),
        (["fit", "--config", "digits/clasification"], "neither a file nor a packaged config; did you mean dig"),
        ([*FIT, "--trainer.max_step", "2"], "unknown key trainer.max_step (command line); nearest: trainer.max_steps"),
        ([*FIT, "--model.lr", "2"], "error: unknown key model.lr (command line); nearest: model.optim.lr"),
        ([*FIT, "--trainer.max_steps", "two"], "error: trainer.max_steps: expected int, got 'two'"),
        ([*FIT, "--data.batch_size", "3.5"], "error: data.batch_size: expected int, got '3.5'"),
        ([*FIT, "--model.backbone.mirror.init", "x"], "init: expected one of 'neutral', 'aligned', 'uniform', got 'x'"),
        ([*FIT, "--model.optim.lr", "-1"], "error: optim.lr -1.0 must be above 0, for example 1e-3"),
        ([*FIT, "--model.backbone.name", "mirrorla_tini"], "'mirrorla_tini' is unknown: did you mean 'mirrorla_ti"),
        ([*FIT, "--model", "os.Foo"], "model 'os.Foo' (command line) is outside the allowed packages"),
        ([*FIT, "--ckpt_path", "nope"], "error: ckpt_path nope does not exist; use last, best, a"),
        ([*FIT, "extra"], "mirrorla fit: error: unrecognized arguments: extra"),
        (["test", *FIT[1:], "--run_dir", "nowhere"], "nowhere/checkpoints holds no checkpoint; train with"),
        (["shards"], "error: which one? mirrorla shards pack|index|verify|info"),
        (["shards", "pack", "--source", "digts"], "error: source: expected one of 'digits', 'digits-recall', 'digits-"),
        (["shards", "info", "nowhere"], "mirrorla shards: error: dataset folder nowhere does not exist"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    importlib.import_module("lightning_modules.training_cli")  # the second is counted from the end of the imports
    importlib.import_module("datamodules.commands")
    start_s = time.process_time()
    assert cli.main(words) == 2
    assert time.process_time() - start_s < 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.num_classes", "12"],
            "error: model.num_classes 12 differs from the data's 10 classes; use --mod",
        ),
        (["--data.batch_size", "60"], "error: data.batch_size 60 is not divisible by 8 lanes; nearest valid: 56"),
        (
            ["--data.path", "nowhere", "--data.sources", "null"],
            "error: dataset folder nowhere does not exist; pack",
        ),
        (
            ["--run_dir", "file/run"],
            "error: run_dir file/run cannot be written (Not a directory); give another",
        ),
        (["--trainer.devices", "zero"], "error: trainer: "),
        (["--checkpoint.keep_last", "0"], "error: checkpoint.keep_last 0 must be 2 or above"),
    ],
    ids=["classes", "batch", "data", "run_dir", "devices", "retention"],
)
def test_mistakes_in_the_set_up_exit_with_2(options, message, digits, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main([*FIT, "--data.path", str(digits), "--run_dir", "run", *options]) == 2
    told = capsys.readouterr().err
    assert message in told.splitlines()[-1]
    assert "Traceback" not in told


def test_failure_while_running_exits_with_1(digits, capsys, tmp_path):
    damaged = tmp_path / "digits"
    shutil.copytree(digits, damaged)
    tar = next((damaged / "train").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    for start in range(512, len(content) - 512, 1024):  # somewhere in nearly every image
        content[start + 40] ^= 0xFF
    tar.write_bytes(content)
    assert cli.main([*FIT, f"--data.path={damaged}", f"--run_dir={tmp_path / 'run'}"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("mirrorla fit: error: ")
    assert str(tar) in told[-1]


def test_unexpected_exceptions_keep_their_traceback(monkeypatch):
    def fail(verb, argv):
        return torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setitem(cli.VERBS, "models", fail)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        cli.main(["models"])


def test_interrupted_verb_exits_with_130(monkeypatch, capsys):
    def interrupt(verb, argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "models", interrupt)
    assert cli.main(["models"]) == 130


def test_occupied_run_is_refused(digits, capsys, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000003").mkdir()
    assert cli.main([*FIT, f"--data.path={digits}", f"--run_dir={tmp_path}"]) == 2
    assert "already holds step_00000003; continue it with --ckpt_path last" in capsys.readouterr().err


def test_shards_are_packed_and_described(tmp_path, capsys):
    assert cli.main(["shards", "pack", "--source", "digits", "--out", str(tmp_path / "digits")]) == 0
    assert cli.main(["shards", "info", str(tmp_path / "digits")]) == 0
    assert "1438" in capsys.readouterr().out
    assert cli.main(["shards", "verify", str(tmp_path / "digits")]) == 0


def test_every_exit_code_has_one_meaning_and_is_in_the_help(capsys):
    assert set(exit_codes.MEANINGS) == set(ExitCode)
    assert len({meaning.text for meaning in exit_codes.MEANINGS.values()}) == len(ExitCode)
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {code:<5}{describe(code)}" in out for code in ExitCode)
    assert [describe(code) for code in (76, 139, 200)] == [
        "a rank hung and was named",
        "stopped by signal 11",
        "exit code 200",
    ]
