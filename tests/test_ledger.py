"""The ledger says what every rank trained on, and a kill costs it at most the line being written."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from datamodules.ledger import (
    Entry,
    Ledger,
    format_entry,
    ledger_file,
    ledger_folder,
    next_attempt,
    parse_entries,
    read_attempt,
)
from datamodules.module import ClassificationDataModule
from datamodules.pack import pack
from datamodules.transforms import EvalTransform, TrainTransform
from lightning_modules.callbacks.checkpointing import CheckpointConfig
from lightning_modules.callbacks.figures import MonitoringConfig
from lightning_modules.callbacks.ledger import KeepLedger
from lightning_modules.run_directory import RunDirectory
from lightning_modules.wiring import Wiring, build_callbacks

entries = st.builds(
    Entry,
    st.integers(0, 10**9),
    st.integers(0, 1000),
    st.lists(st.integers(-1, 10**9), min_size=1, max_size=9).map(tuple),
    st.floats(allow_nan=False),
)


@given(st.lists(entries, max_size=5), st.integers(0, 30))
def test_entries_come_back_bit_for_bit_and_a_torn_line_is_left_out(rows, torn):
    whole = "".join(map(format_entry, rows))
    assert parse_entries(whole) == rows
    last = format_entry(Entry(10**9, 7, (1, 2, 3), 0.1))
    assert parse_entries(whole + last[: min(torn, len(last) - 1)]) == rows


def test_a_line_is_what_the_documentation_says():
    assert format_entry(Entry(3, 1, (5, 6), 0.5)) == "3 1 5,6 0x1.0000000000000p-1\n"
    assert math.isnan(parse_entries(format_entry(Entry(0, 0, (1,), math.nan)))[0].loss)


def test_attempts_are_numbered_after_those_present():
    assert next_attempt([]) == 1
    assert next_attempt(["attempt_0001.rank_00000.ledger", "attempt_0012.rank_00003.ledger", "other"]) == 13


def test_the_folder_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("MIRRORLA_LEDGER_DIR", raising=False)
    assert ledger_folder() is None
    monkeypatch.setenv("MIRRORLA_LEDGER_DIR", "")
    assert ledger_folder() is None
    monkeypatch.setenv("MIRRORLA_LEDGER_DIR", "somewhere")
    assert ledger_folder() == Path("somewhere")


def test_an_attempt_never_writes_into_the_file_of_another(tmp_path):
    path = ledger_file(tmp_path, 1, 0)
    ledger = Ledger(path)
    ledger.append(0, 0, [1, 2], 0.5)
    ledger.close()
    with pytest.raises(FileExistsError):
        Ledger(path)
    assert read_attempt(tmp_path, 1) == [[Entry(0, 0, (1, 2), 0.5)]]


def test_lines_written_before_a_kill_are_there_after_it(tmp_path):
    script = (
        "import sys; from pathlib import Path; from itertools import count; from datamodules.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "for step in count():\n"
        "    ledger.append(step, 0, range(2000), step / 3)\n"
        "    print(step, flush=True)\n"
    )
    path = ledger_file(tmp_path, 1, 0)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        while int(process.stdout.readline()) < 50:
            pass
        process.send_signal(signal.SIGKILL)
        reported = [50, *map(int, process.stdout.read().split())][-1]
    text = path.read_text()
    assert text.endswith("\n")
    rows = parse_entries(text)
    assert [row.step for row in rows] == list(range(len(rows)))
    assert len(rows) > reported
    assert all(row.ids == tuple(range(2000)) and row.loss == row.step / 3 for row in rows)


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 10)
        self.losses = []

    def training_step(self, batch, batch_idx):
        logits = self.layer(batch["image"].flatten(1))
        loss = torch.nn.functional.cross_entropy(logits, batch["label"])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_training_keeps_its_ledger(tmp_path):
    pack("digits", str(tmp_path / "digits"))
    transform = TrainTransform(8, crop=False, auto_augment=None, color_jitter=0.0, random_erasing=0.0)
    data = ClassificationDataModule(
        str(tmp_path / "digits"), 512, num_workers=0, train_transform=transform, eval_transform=EvalTransform(8, None)
    )
    model = Linear()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    folder = tmp_path / "ledger"
    trainer = Trainer(accelerator="cpu", max_epochs=2, limit_val_batches=0, callbacks=[KeepLedger(folder)], **quiet)
    trainer.fit(model, datamodule=data)
    (rows,) = read_attempt(folder, 1)
    assert [(row.step, row.epoch) for row in rows] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert [row.loss for row in rows] == model.losses
    assert all(len(row.ids) == 512 for row in rows)
    assert len({*rows[0].ids, *rows[1].ids}) == 1024


def test_the_command_line_keeps_a_ledger_only_when_asked_to(tmp_path, monkeypatch):
    wiring = Wiring("fit", RunDirectory(tmp_path), None, 0, "", CheckpointConfig(), MonitoringConfig())
    monkeypatch.delenv("MIRRORLA_LEDGER_DIR", raising=False)
    assert not any(isinstance(callback, KeepLedger) for callback in build_callbacks(wiring, Linear(), False))
    monkeypatch.setenv("MIRRORLA_LEDGER_DIR", str(tmp_path))
    assert any(isinstance(callback, KeepLedger) for callback in build_callbacks(wiring, Linear(), False))
