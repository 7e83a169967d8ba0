"""What an ablation runs: every combination of the values of some keys, once for each seed. Pure; no torch.

A cell's run directory is ROOT/<key=value,…>/seed_<seed>, as a SLURM array names its runs, so its place says what it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lightning_modules.errors import UsageError

ALIASES = {"attention": "model.backbone.attention"}
"""Short names of keys; any other key is written in full."""

_SEED_KEYS = ("seed_everything", "data.seed")
_RESERVED = ("run_dir", "ckpt_path", "config")
_MAX_NAME = 200


@dataclass(frozen=True)
class Factor:
    """One key and what it is set to.

    Attributes:
        name: as it was written; stands in tables and directories.
        values: at least one, the first is what the others are compared with.
    """

    name: str
    values: tuple[str, ...]

    @property
    def key(self) -> str:
        """The option of `mirrorla fit`."""
        return ALIASES.get(self.name, self.name)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        setting: the value of every factor, in their order.
        seed: of the weights and of the data's order and augmentation.
    """

    setting: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Request:
    """One ablation.

    Attributes:
        config: path or packaged name.
        factors: what is varied.
        cells: what is run, in order.
        root: folder of all runs and results.
        fit: options that all runs share.
    """

    config: str
    factors: tuple[Factor, ...]
    cells: tuple[Cell, ...]
    root: Path
    fit: tuple[str, ...]

    @property
    def title(self) -> str:
        """What is varied where, in words."""
        return f"{self.config}: {' × '.join(factor.name for factor in self.factors)}"

    def words(self, cell: Cell) -> tuple[str, ...]:
        """The options of `mirrorla fit` for one cell, but for its run directory."""
        return ("--config", self.config, *self.fit, *options(self.factors, cell))


def read_factor(text: str) -> Factor:
    """The factor of one --over.

    Args:
        text: KEY=V1,V2; commas inside brackets belong to a value.

    Raises:
        UsageError: naming the text and the form it should have.
    """
    name, equals, values = text.partition("=")
    name = name.removeprefix("--").strip()
    found = tuple(value.strip() for value in split_values(values))
    if not equals or not name or not all(found):
        raise UsageError(f"--over {text!r} is not understood; write KEY=V1,V2,…, such as attention=mirror,softmax")
    twice = next((value for value in found if found.count(value) > 1), None)
    if twice is not None:
        raise UsageError(f"--over {name} has {twice!r} twice; give every value once")
    factor = Factor(name, found)
    if factor.key in _SEED_KEYS:
        raise UsageError(f"--over {name}: seeds are given with --seeds {values}")
    if factor.key in _RESERVED:
        raise UsageError(f"--over {name}: that is set for every run; choose a key of the configuration")
    return factor


def split_values(text: str) -> list[str]:
    """Split at commas outside brackets: "a,[b,c]" gives "a" and "[b,c]"."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def read_seeds(text: str) -> tuple[int, ...]:
    """The seeds of --seeds.

    Raises:
        UsageError: no whole numbers from 0 up, or one of them twice.
    """
    words = text.split(",")
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise UsageError(f"--seeds {text!r} must be whole numbers from 0 up by commas, such as 0,1,2")
    seeds = tuple(int(word) for word in words)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text!r} has a seed twice; a run with the same seed says nothing new")
    return seeds


def expand(factors: Sequence[Factor], seeds: Sequence[int]) -> list[Cell]:
    """Every cell, all settings of one seed before the next: what is there early can be compared early.

    Raises:
        UsageError: a key twice, or a setting whose directory's name would be too long.
    """
    keys = [factor.key for factor in factors]
    twice = next((factor.name for factor in factors if keys.count(factor.key) > 1), None)
    if twice is not None:
        raise UsageError(f"--over {twice} is given twice; put all its values into one, by commas")
    settings = list(itertools.product(*(factor.values for factor in factors)))
    long = next((name for setting in settings if len(name := folder_name(factors, setting)) > _MAX_NAME), None)
    if long is not None:
        raise UsageError(f"--over: a run directory's name of {len(long)} letters is too long; at most {_MAX_NAME}")
    return [Cell(setting, seed) for seed in seeds for setting in settings]


def options(factors: Sequence[Factor], cell: Cell) -> list[str]:
    """The options of `mirrorla fit` that make a cell."""
    words = [f"--{factor.key}={value}" for factor, value in zip(factors, cell.setting, strict=True)]
    return [*words, *(f"--{key}={cell.seed}" for key in _SEED_KEYS)]


def label(factors: Sequence[Factor], setting: Sequence[str]) -> str:
    """A setting in words: "attention=relu, model.optim.lr=1e-3"."""
    return ", ".join(f"{factor.name}={value}" for factor, value in zip(factors, setting, strict=True))


def folder_name(factors: Sequence[Factor], setting: Sequence[str]) -> str:
    """The name of a setting's folder: different settings have different names, and SLURM takes all their letters."""
    pairs = zip(factors, setting, strict=True)
    return ",".join(f"{factor.name}={_escaped(value)}" for factor, value in pairs)


def run_dir(root: Path, factors: Sequence[Factor], cell: Cell) -> Path:
    """A cell's run directory."""
    return root / folder_name(factors, cell.setting) / f"seed_{cell.seed}"


def _escaped(value: str) -> str:
    """Like a URL's, with ~ for %: "[a,b]" becomes "~5Ba~2Cb~5D"."""
    return quote(value, safe="+ ").replace("~", "%7E").replace("%", "~")
