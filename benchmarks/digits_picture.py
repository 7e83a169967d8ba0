"""Draws what the digits' networks see: `python -m benchmarks.digits_picture`, after `python -m benchmarks.digits`.

A column a held-out scene; from top to bottom the scene, the boxes and masks of detection, the class map of
segmentation, as `mirrorla predict` draws them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.common import RESULTS
from datamodules.sources import SourceOptions, open_source

TASKS = ("detection", "segmentation")
SIDE = 240


def scenes(folder: Path, count: int) -> None:
    """Write the first held-out scenes as PNG files."""
    source = open_source("digits", SourceOptions(task="detection", scenes=5 * count))
    for number, sample in enumerate(source.splits["val"]):
        (folder / f"{number}.png").write_bytes(sample.read()["png"])


def predictions(run: Path, config: str, images: Path) -> list[Path]:
    """The pictures that `mirrorla predict` leaves of a folder of images, in the images' order."""
    command = [sys.executable, "-m", "lightning_modules.cli", "predict", "--config", f"digits/{config}"]
    command += ["--run_dir", str(run), "--ckpt_path", "last", "--data.path", str(images)]
    subprocess.run(command, check=True)
    ending = ".overlay.png" if config == "segmentation" else ".png"
    return [run / "predictions" / f"{path.stem}{ending}" for path in sorted(images.iterdir())]


def montage(rows: Sequence[Sequence[Path]]) -> Image.Image:
    """Pictures side by side, each fitted into a square."""
    sheet = Image.new("RGB", (SIDE * len(rows[0]), SIDE * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, path in enumerate(row):
            picture = Image.open(path).convert("RGB")
            scale = SIDE / max(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            sheet.paste(picture.resize(size, Image.Resampling.BICUBIC), (SIDE * x, SIDE * y))
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Predict and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-digits"), help="where the runs are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=4, help="scenes")
    parser.add_argument("--output", type=Path, default=RESULTS / "digits_scenes.png")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes(folder, args.count)
        rows = [sorted(folder.iterdir())]
        rows += [predictions(args.runs / f"{task}-{args.seed}", task, folder) for task in TASKS]
        montage(rows).save(args.output, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
