"""Find a configuration by path or by packaged name, in a checkout and in an installed wheel alike."""

from __future__ import annotations

import difflib
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# A wheel carries the configs inside this package; an editable install leaves them beside it.
_FOLDERS = (_HERE / "configs", _HERE.parent / "configs")


def packaged_configs() -> list[str]:
    """Names of the packaged configs, such as "digits/classification", sorted."""
    folder = _folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """Find a config: a path first, then a packaged name.

    Args:
        name: a path, or a packaged name with or without ".yaml".

    Returns:
        The file.

    Raises:
        FileNotFoundError: neither exists; the nearest packaged names are given.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = packaged_configs()
    wanted = name.removesuffix(".yaml")
    if wanted in packaged:
        return _folder() / f"{wanted}.yaml"
    near = difflib.get_close_matches(wanted, packaged, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"packaged configs: {', '.join(packaged)}"
    raise FileNotFoundError(f"config {name!r} is neither a file nor a packaged config; {hint}")


def _folder() -> Path:
    return next(folder for folder in _FOLDERS if folder.is_dir())
