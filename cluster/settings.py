"""Reads a SlurmConfig: from the `slurm` section of YAML files and from options, later ones winning key by key."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from cluster.config import SlurmConfig

_NULL = ("null", "~", "")


class _Texts(yaml.SafeLoader):
    """Leaves every scalar a text (YAML takes an unquoted 4:00:00 for 14400) and refuses a key given twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - yaml's own name

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ValueError(f"duplicate key {key.value} (line {key.start_mark.line + 1})")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=True)


def read_yaml(text: str, place: str) -> dict[str, Any]:
    """A whole YAML mapping with every scalar as text.

    Raises:
        ValueError: no YAML, no mapping, or a key given twice.
    """
    try:
        loader = _Texts(text)
        content = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{place} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{place} must hold `key: value` lines, found {type(content).__name__}")
    return content


def slurm_section(path: Path) -> dict[str, Any]:
    """The `slurm` section of a file; empty if it has none.

    Raises:
        ValueError: the file or its section is no mapping.
    """
    section = read_yaml(_text(path), str(path)).get("slurm") or {}
    if not isinstance(section, dict):
        raise ValueError(f"slurm ({path}) must hold `key: value` lines, found {section!r}")
    return section


def without_section(path: Path) -> str:
    """The text of a file with its `slurm` section left empty: every other line is as it was and where it was."""
    text = _text(path)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return text
    lines = text.splitlines(keepends=True)
    for index, (key, _) in enumerate(root.value):
        if key.value == "slurm":
            following = root.value[index + 1][0].start_mark.line if index + 1 < len(root.value) else len(lines)
            first = key.start_mark.line
            return "".join([*lines[:first], *["\n"] * (following - first), *lines[following:]])
    return text


def overrides(options: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Options of the command line as a layer: ("partition", "gpu"), ("environment.NCCL_DEBUG", "INFO")."""
    layer: dict[str, Any] = {}
    for name, text in options:
        key, dot, inner = name.partition(".")
        if dot and key == "environment":
            layer.setdefault("environment", {})[inner] = text
        else:
            layer[name] = text
    return layer


def merge(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> SlurmConfig:
    """Build a configuration; later layers win key by key, `environment` variable by variable.

    Args:
        layers: (where it stands, its keys) in order: ("configs/slurm/debug.yaml", {"partition": "debug"}).

    Raises:
        ValueError: an unknown key (the nearest is named), a value of another type, or one that is not valid.
    """
    hints = typing.get_type_hints(SlurmConfig)
    values: dict[str, Any] = {}
    for place, layer in layers:
        for key, value in layer.items():
            if key not in hints:
                near = difflib.get_close_matches(str(key), hints, n=1)
                hint = f"nearest: slurm.{near[0]}" if near else f"valid: {', '.join(hints)}"
                raise ValueError(f"unknown key slurm.{key} ({place}); {hint}")
            new = _convert(value, hints[key])
            if new is _WRONG:
                expected = _describe(hints[key])
                raise ValueError(f"slurm.{key} {value!r} ({place}) is not valid; expected {expected}")
            values[key] = {**values.get(key, {}), **new} if key == "environment" else new
    return SlurmConfig(**values)


_WRONG: Any = object()


def _wanted(hint: Any) -> Any:
    """int of `int | None`, and any other type as it is."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(option for option in options if option is not type(None))


def _convert(value: Any, hint: Any) -> Any:
    """A text, list or mapping of texts in a field's type, or _WRONG."""
    wanted, origin = _wanted(hint), typing.get_origin(_wanted(hint))
    if wanted is not hint and value in _NULL:
        return None
    if origin is tuple:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        is_list = isinstance(items, list) and all(isinstance(item, str) for item in items)
        return tuple(items) if is_list else _WRONG
    if origin not in (None, Literal):
        is_mapping = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
        return value if is_mapping else _WRONG
    if not isinstance(value, str):
        return _WRONG
    if origin is Literal:
        return value if value in typing.get_args(wanted) else _WRONG
    if wanted is bool:
        return {"true": True, "false": False}.get(value, _WRONG)
    try:
        return wanted(value)
    except ValueError:
        return _WRONG


def _describe(hint: Any) -> str:
    wanted = _wanted(hint)
    if typing.get_origin(wanted) is Literal:
        return "one of " + ", ".join(typing.get_args(wanted))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(wanted, "a list of texts" if typing.get_origin(wanted) is tuple else "NAME: value lines")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
