"""What every test shares: third-party warnings that are known and not ours, everything else being an error."""

import pytest

KNOWN = (
    # Lightning 2.6 checks a pytree class that torch 2.15 renames.
    "ignore:.*LeafSpec:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for rule in KNOWN:
            item.add_marker(pytest.mark.filterwarnings(rule))
