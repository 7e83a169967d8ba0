"""Fetches Fashion-MNIST from Debian and packs it: `python -m benchmarks.fashion_mnist` or `make fashion-mnist`.

Xiao et al. 2017: 70 000 grey images of clothes, 28x28 pixels, ten classes. Beside the whole of it stands a subset, the
first 10 000 training images with the whole test set as validation, for comparisons on a CPU. Needs Debian's or Ubuntu's
apt-get and dpkg-deb, not root; what is there already is left alone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datamodules.pack import pack
from datamodules.sources_base import Source
from datamodules.sources_idx import idx

PACKAGE = "dataset-fashion-mnist"
SUBSET = 10_000


def fetch(folder: Path) -> None:
    """Put the package's IDX files into a folder.

    Args:
        folder: to make; an existing one is left alone.

    Raises:
        OSError: no apt-get or dpkg-deb on this machine.
        CalledProcessError: the package cannot be had; apt-get has said why.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        package = next(Path(scratch).glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(Path(scratch) / "files")], check=True)
        shutil.move(Path(scratch) / "files/usr/share/datasets/fashion-mnist", folder)


def subset(source: Source, count: int) -> Source:
    """The first training images of a source, all the others as they are."""
    return replace(source, splits={**source.splits, "train": source.splits["train"][:count]})


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch, pack twice, say where."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--folder", type=Path, default=Path("data"), help="where the three folders are made")
    folder: Path = made.parse_args(argv).folder
    try:
        fetch(folder / "fashion-mnist-idx")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.stderr.write(
            f"{PACKAGE} cannot be fetched ({error}): put the four IDX files into {folder}/fashion-mnist-idx instead\n"
        )
        return 1
    whole = idx(folder / "fashion-mnist-idx")
    for name, source in (("fashion-mnist", whole), ("fashion-mnist-10k", subset(whole, SUBSET))):
        info = pack(source, str(folder / name))
        sys.stdout.write(f"{folder / name}: {info.splits['train'].samples} train\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
