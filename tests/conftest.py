"""What every test shares: packed data, restored signals, and the few third-party warnings that are no errors."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from datamodules.pack import pack
from lightning_modules import stop_signals

KNOWN = (
    # Lightning 2.6 checks a pytree class that torch 2.15 renames.
    "ignore:.*LeafSpec:FutureWarning",
)


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


@pytest.fixture(autouse=True)
def signals_restored() -> Iterator[None]:
    """A command run in this process takes over the stop signals; give them back."""
    yield
    stop_signals.restore()
