"""Refuse a bad configuration in one line before anything is built: duplicate or unknown keys, foreign classes.

jsonargparse alone lets the last of two equal YAML keys win, abbreviates options and explains a misspelt key over twenty
lines. These checks run first; types of values stay jsonargparse's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.config_keys import KeyTree
from lightning_modules.errors import UsageError, one_line
from mirrorla.config_files import find_config

ALLOWED_PACKAGES = (
    *("lightning_modules", "datamodules", "mirrorla"),
    *("lightning", "torch", "torchvision", "torchmetrics", "timm"),
)
_CLASS_KEYS = {"class_path", "model", "data", "callbacks", "logger", "strategy", "plugins", "profiler", "accelerator"}
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Setting:
    """One key of a configuration and where it was written.

    Attributes:
        keys: path of the key, `init_args` left out: ("model", "optim", "lr").
        value: the scalar, or None for a mapping or list.
        place: "configs/a.yaml:12" or "command line".
    """

    keys: tuple[str, ...]
    value: str | None
    place: str

    @property
    def name(self) -> str:
        """The key as an option: model.optim.lr."""
        return ".".join(self.keys)


def expand_configs(argv: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Replace every --config value by the file it means.

    Args:
        argv: options after the verb.

    Returns:
        The options with paths in place of packaged names, and those paths in order.

    Raises:
        FileNotFoundError: neither a file nor a packaged config; the nearest is named.
    """
    expanded, files = [], []
    is_value = False
    for word in argv:
        flag, equals, name = word.partition("=")
        if is_value or (flag in ("--config", "-c") and equals):
            path = find_config(word if is_value else name)
            files.append(path)
            expanded.append(str(path) if is_value else f"{flag}={path}")
        else:
            expanded.append(word)
        is_value = not is_value and word in ("--config", "-c")
    return expanded, files


def read_settings(path: Path) -> list[Setting]:
    """Every key of a YAML file, with its line.

    Raises:
        UsageError: the file is no YAML mapping, or a mapping has the same key twice.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{path}:{line} is not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {one_line(error)}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path} must hold `key: value` lines, found {type(root).__name__}")
    return list(_walk(root, (), path))


def command_settings(argv: Sequence[str]) -> list[Setting]:
    """Every dotted or plain option of a command line; --config itself is left out."""
    settings = []
    for index, word in enumerate(argv):
        if not word.startswith("--") or word.split("=")[0] == "--config":
            continue
        option, equals, value = word[2:].partition("=")
        following = argv[index + 1] if index + 1 < len(argv) and not argv[index + 1].startswith("--") else None
        keys = tuple(key for key in option.rstrip("+").split(".") if key != "init_args")
        settings.append(Setting(keys, value if equals else following, "command line"))
    return settings


def refuse_foreign_classes(settings: Sequence[Setting]) -> None:
    """Allow classes of this project and of the libraries it builds on only.

    Raises:
        UsageError: naming the class path and its place.
    """
    for setting in settings:
        value = setting.value
        if value is None or setting.keys[-1] not in _CLASS_KEYS or not _DOTTED.fullmatch(value):
            continue
        if value.split(".")[0] not in ALLOWED_PACKAGES:
            raise UsageError(
                f"{setting.name} {value!r} ({setting.place}) is outside the allowed packages: "
                f"{', '.join(ALLOWED_PACKAGES)}"
            )


def refuse_unknown_keys(settings: Sequence[Setting], tree: KeyTree) -> None:
    """Compare every key with what the parser and the chosen classes accept.

    Raises:
        UsageError: naming the key, its place and the nearest valid key.
    """
    for setting in settings:
        unknown = tree.first_unknown(setting.keys)
        if unknown is None:
            continue
        wrong = ".".join(setting.keys[: unknown + 1])
        guess = tree.suggest(setting.keys[: unknown + 1])
        siblings = ", ".join(sorted(tree.children(setting.keys[:unknown])))
        hint = f"nearest: {guess}" if guess else f"valid: {siblings}"
        raise UsageError(f"unknown key {wrong} ({setting.place}); {hint}")


def chosen_classes(settings: Sequence[Setting]) -> dict[str, str]:
    """The class path of `model` and of `data`; of several files and options the last counts."""
    chosen = {}
    for setting in settings:
        is_path = setting.keys in (("model", "class_path"), ("data", "class_path"))
        if setting.value is not None and (is_path or setting.keys in (("model",), ("data",))):
            chosen[setting.keys[0]] = setting.value
    return chosen


def _walk(node: yaml.Node, keys: tuple[str, ...], path: Path) -> Iterator[Setting]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _walk_item(item, keys, path)
        return
    if not isinstance(node, yaml.MappingNode):
        return
    first_lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in first_lines:
            name = ".".join([*keys, key])
            raise UsageError(f"duplicate key {name} ({path}:{line}); it is already given in line {first_lines[key]}")
        first_lines[key] = line
        inner = keys if key == "init_args" else (*keys, key)
        if key != "init_args":
            yield Setting(inner, _scalar(value_node), f"{path}:{line}")
        yield from _walk(value_node, inner, path)


def _walk_item(item: yaml.Node, keys: tuple[str, ...], path: Path) -> Iterator[Setting]:
    """Keys inside a list belong to a class of their own, which jsonargparse checks."""
    if isinstance(item, yaml.ScalarNode):
        yield Setting(keys, item.value, f"{path}:{item.start_mark.line + 1}")
    yield from _walk(item, keys, path)


def _scalar(node: Any) -> str | None:
    return node.value if isinstance(node, yaml.ScalarNode) else None
