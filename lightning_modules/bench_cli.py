"""`mirrorla bench NAME`: runs the benchmarks of the repository; a wheel does not carry them."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning_modules import console
from lightning_modules.errors import UsageError, nearest

BENCHMARKS = {
    "attention": "kernels and layers over shapes, or one layer over tokens, beside their rivals",
    "backbone": "training throughput and memory of whole models beside timm's",
    "checkpoint": "what a checkpoint costs a training beside Lightning's, and a restart",
    "loader": "samples a second of every stage of loading beside other readers",
}


def run(verb: str, argv: Sequence[str]) -> int:
    """Run one benchmark.

    Args:
        verb: "bench".
        argv: its name and options.

    Returns:
        The exit code: 0 measured, 1 when a result is wrong and so not timed.

    Raises:
        UsageError: an unknown benchmark or option, or no benchmarks beside this installation.
    """
    console.quiet_libraries()
    if not argv:
        raise UsageError(f"which one? mirrorla {verb} {'|'.join(BENCHMARKS)} …; see mirrorla {verb} --help")
    name, *words = argv
    if name in ("-h", "--help", "help"):
        sys.stdout.write(_overview(verb))
        return 0
    if name not in BENCHMARKS:
        near = nearest(name, BENCHMARKS)
        hint = f"did you mean {near!r}?" if near else f"choose one of {', '.join(BENCHMARKS)}"
        raise UsageError(f"there is no benchmark {name!r}; {hint}")
    if importlib.util.find_spec("benchmarks") is None:
        raise UsageError("benchmarks/ is part of the repository and not of the wheel: pip install -e . in a checkout")
    module = importlib.import_module(f"benchmarks.{name}")  # by name: no package may depend on them
    _refuse_mistakes(module.parser(), f"mirrorla {verb} {name}", words)
    code: int = module.main(words)
    return code


def _refuse_mistakes(parser: argparse.ArgumentParser, prog: str, words: Sequence[str]) -> None:
    """Answer --help, and wrong options in one line, before anything runs."""

    def refuse(message: str) -> NoReturn:
        raise UsageError(message)

    parser.prog = prog
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(words)


def _overview(verb: str) -> str:
    lines = [f"  {name:11}{text}" for name, text in BENCHMARKS.items()]
    usage = f"usage: mirrorla {verb} NAME [options]"
    return "\n".join([usage, "", *lines, "", f"Options of a benchmark: mirrorla {verb} NAME --help", ""])
