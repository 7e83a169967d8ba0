"""What a job's configuration files and options say about its training, without building anything."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.deepspeed import Division, division
from cluster.settings import read_yaml

DEFAULT_LANES = 8
_NULL = (None, "null", "~", "")


@dataclass(frozen=True)
class Training:
    """The settings of a training as written, later ones over earlier ones.

    Attributes:
        values: dotted key -> text, `init_args` left out: {"data.batch_size": "1024", "trainer.strategy": "ddp"}.
    """

    values: Mapping[str, Any]

    def text(self, key: str, default: str | None = None) -> str | None:
        """A setting; `default` where it is not written or null."""
        value = self.values.get(key)
        return default if value in _NULL or not isinstance(value, str) else value

    def number(self, key: str, default: float | None = None) -> float | None:
        """A setting as a number; `default` where it is not written or no number."""
        try:
            return float(self.text(key) or "")
        except ValueError:
            return default

    def whole(self, key: str, default: int) -> int:
        """A setting as a whole number."""
        number = self.number(key)
        return default if number is None or number != int(number) else int(number)

    def is_on(self, key: str) -> bool:
        """Whether a switch is written as true."""
        return str(self.text(key)).lower() == "true"

    @property
    def strategy(self) -> str:
        """Name or class of the strategy: "ddp", "zero2", "ZeroStrategy"."""
        return (self.text("trainer.strategy", "auto") or "auto").rpartition(".")[2]

    @property
    def deepspeed(self) -> Mapping[str, Any]:
        """The DeepSpeed configuration, if one is written out."""
        prefix = "trainer.strategy.config."
        found: dict[str, Any] = {}
        for key, value in self.values.items():
            if key.startswith(prefix):
                *parents, leaf = key.removeprefix(prefix).split(".")
                place = found
                for parent in parents:
                    place = place.setdefault(parent, {})
                place[leaf] = value
        return found

    @property
    def division(self) -> Division:
        """What the strategy divides among ranks and offloads."""
        if self.deepspeed:
            return division(self.deepspeed)
        if self.strategy in ("fsdp2", "FSDP2Strategy"):
            return Division(3)
        if self.strategy == "ZeroStrategy":
            return Division(self.whole("trainer.strategy.stage", 2))
        names = {f"zero{stage}": stage for stage in (1, 2, 3)}
        return Division(names.get(self.strategy, 0))

    @property
    def is_averaging(self) -> bool:
        """Whether an averaged copy of the weights is kept."""
        return self.text("model.ema_decay") is not None


def read(files: Sequence[Path], options: Iterable[str]) -> Training:
    """Merge configuration files and options, as `mirrorla fit` does.

    Args:
        files: in order.
        options: of the command line; --config is passed over.

    Raises:
        ValueError: a file that is no YAML mapping.
    """
    values: dict[str, Any] = {}
    for path in files:
        _merge(values, _flat(read_yaml(path.read_text(encoding="utf-8"), str(path))))
    words = list(options)
    for index, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        following = words[index + 1] if index + 1 < len(words) and not words[index + 1].startswith("--") else ""
        if name != "config":
            key = ".".join(part for part in name.split(".") if part not in ("init_args", "class_path"))
            _merge(values, {key: value if equals else following})
    return Training(values)


def _merge(values: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Another class, or a plain name in place of one, drops the settings of the class before."""
    for key, value in new.items():
        if isinstance(value, str) and values.get(key) != value:
            for old in [name for name in values if name.startswith(f"{key}.")]:
                del values[old]
        values[key] = value


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in mapping.items():
        if name == "class_path":
            found[prefix.rstrip(".")] = value
        elif isinstance(value, Mapping):
            found |= _flat(value, prefix if name == "init_args" else f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
