"""How long `mirrorla fit --ckpt_path last` takes to its first new step; a part of `python -m benchmarks.checkpoint`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from datamodules.ledger import LEDGER_VARIABLE, ledger_file

ROOT = Path(__file__).resolve().parent.parent


def command(model: str, folder: Path, steps: int) -> list[str]:
    """The words after `mirrorla`: train a model up to a step on digits, without its average."""
    return [
        *("fit", "--config", "digits/classification", "--run_dir", str(folder / "run"), "--ckpt_path", "last"),
        *("--model.backbone.name", model, "--model.ema_decay", "null"),
        *("--data.path", str(folder / "digits"), "--data.batch_size", "8"),
        *("--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu"),
    ]


def measure_restart(model: str, folder: Path) -> dict[str, float]:
    """Train two steps, then start again for a third.

    Args:
        model: name of a backbone.
        folder: for data and run, empty.

    Returns:
        Seconds to the end of the first new step: restart_s from the last import, restart_with_imports_s from the start
        of the process.
    """
    environment = {**os.environ, LEDGER_VARIABLE: str(folder / "ledger")}
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.restart import resume; resume()"
    for steps in (2, 3):
        words = command(model, folder, steps)
        began_s = time.time()
        done = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"mirrorla {' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    imported_s = float(done.stdout.splitlines()[0])
    stepped_s = ledger_file(folder / "ledger", 2, 0).stat().st_mtime  # one line, written as the step ends
    return {"restart_s": stepped_s - imported_s, "restart_with_imports_s": stepped_s - began_s}


def resume() -> None:
    """Run this process's command line as mirrorla; what the verb would import is imported before, and the time told."""
    import datamodules.module  # noqa: F401
    from lightning_modules import classification, cli, training_cli  # noqa: F401

    print(time.time(), flush=True)
    sys.exit(cli.main(sys.argv[1:]))
