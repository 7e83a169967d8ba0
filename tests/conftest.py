"""What every test shares: packed data, restored signals, and the few third-party warnings that are no errors."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from datamodules.pack import pack
from lightning_modules import stop_signals

KNOWN = (
    # Lightning 2.6 checks a pytree class that torch 2.15 renames.
    "ignore:.*LeafSpec:FutureWarning",
    # Lightning advises srun wherever it is installed.
    "ignore:The .srun. command is available on your system:UserWarning",
)

# A shared machine's pauses are no faults of the code; in CI hypothesis repeats the same examples by itself.
settings.register_profile("house", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for rule in KNOWN:
            item.add_marker(pytest.mark.filterwarnings(rule))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded digits, packed once for a test process."""
    path = tmp_path_factory.getbasetemp() / "digits"
    pack("digits", str(path))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """57 training and 21 validation images of 3 classes, packed into shards of a few samples."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 57), ("val", 21)):
        for i in range(count):
            path = folder / split / "abc"[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    pack("imagefolder", str(folder / "packed"), data=str(folder), shard_size_mib=0.04)
    return folder / "packed"


@pytest.fixture(autouse=True)
def signals_restored() -> Iterator[None]:
    """A command run in this process takes over the stop signals; give them back."""
    yield
    stop_signals.restore()
