"""`mirrorla models`: what there is to train, and what it costs."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning_modules.errors import UsageError, nearest

OPTIONS = ("--compare", "--size", "--help")


def run(verb: str, argv: Sequence[str]) -> int:
    """Print the variants and hosts, or, with --compare, each of them with every kind of attention.

    Args:
        verb: "models".
        argv: its options.

    Returns:
        The exit code.

    Raises:
        UsageError: an unknown option or no size.
    """
    options = _parser(verb).parse_args(argv)
    if options.size < 32:
        raise UsageError(f"--size {options.size} must be 32 pixels or more")
    from mirrorla import complexity  # after mistakes are refused: it takes seconds

    table = complexity.comparison_table if options.compare else complexity.variant_table
    sys.stdout.write(table(options.size) + "\n")
    return 0


def _parser(verb: str) -> argparse.ArgumentParser:
    def refuse(message: str) -> NoReturn:
        wrong = next((word for word in message.split() if word.startswith("--")), "")
        near = nearest(wrong, OPTIONS) if "unrecognized" in message else None
        raise UsageError(message + (f"; did you mean {near!r}?" if near else f"; see mirrorla {verb} --help"))

    parser = argparse.ArgumentParser(
        prog=f"mirrorla {verb}", description="List the variants and hosts: parameters and GMACs.", allow_abbrev=False
    )
    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument("--compare", action="store_true", help="each with every kind of attention, and the core's MACs")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="side of the image (default: 224)")
    return parser
