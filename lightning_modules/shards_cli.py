"""`mirrorla shards COMMAND`: each parser and its help are made from a typed function of datamodules.commands."""

import inspect
import logging
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import DefaultHelpFormatter

from lightning_modules import console
from lightning_modules.errors import UsageError, nearest
from lightning_modules.parser import OneLineParser

_SECTION = re.compile(r"^(Args|Examples|Returns|Raises):\n", re.MULTILINE)
_OPTION = re.compile(r"--[a-z][a-z_-]*")


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and examples, and writes options with dashes."""

    def format_help(self) -> str:
        return _OPTION.sub(lambda option: option[0].replace("_", "-"), super().format_help())


def commands() -> dict[str, Callable[..., Any]]:
    """The commands of `shards`, by name."""
    from datamodules import commands as functions
    from datamodules.bench import bench

    return {
        "pack": functions.pack,
        "index": functions.index,
        "verify": functions.verify,
        "info": functions.info,
        "bench": bench,
    }


def run(verb: str, argv: Sequence[str]) -> int:
    """Parse the options of one command and call it.

    Args:
        verb: "shards".
        argv: the command and its options, written with dashes or underscores.

    Returns:
        The function's integer result as exit code, 0 for any other result; a string result is printed.

    Raises:
        UsageError: an unknown command or option.
    """
    console.quiet_libraries()
    console.speak(rank=0)
    found = commands()
    if not argv:
        raise UsageError(f"which one? mirrorla {verb} {'|'.join(found)} …; see mirrorla {verb} --help")
    name, *words = argv
    if name in ("-h", "--help", "help"):
        sys.stdout.write(_overview(verb, found))
        return 0
    if name not in found:
        near = nearest(name, found)
        hint = f"did you mean {near!r}?" if near else f"choose one of {', '.join(found)}"
        raise UsageError(f"there is no command {name!r}; {hint}")
    options = build_parser(f"mirrorla {verb} {name}", found[name]).parse_args([underscored(word) for word in words])
    result = found[name](**options.as_dict())
    if isinstance(result, str):
        logging.getLogger("mirrorla").info("%s", result)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def build_parser(prog: str, function: Callable[..., Any]) -> OneLineParser:
    """A parser of a function's parameters; those that may be given by place come first and without a name.

    Args:
        prog: what the usage line begins with.
        function: typed, with a Google docstring: its text, Args and Examples become the help.
    """
    text, sections = _docstring(function)
    examples = sections.get("Examples", "")
    parser = OneLineParser(
        prog=prog,
        description=text,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=_HelpFormatter,
    )
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    by_place = inspect.Parameter.POSITIONAL_OR_KEYWORD in kinds
    parser.add_function_arguments(function, as_group=False, as_positional=by_place)
    return parser


def underscored(word: str) -> str:
    """`--shard-size-mib=64` as the parser knows it, `--shard_size_mib=64`; other words stay as they are."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else word


def _overview(verb: str, found: dict[str, Callable[..., Any]]) -> str:
    width = max(map(len, found)) + 2
    lines = [f"  {name:{width}}{_docstring(function)[0].splitlines()[0]}" for name, function in found.items()]
    usage = f"usage: mirrorla {verb} COMMAND [options]"
    return "\n".join([usage, "", *lines, "", f"Options of a command: mirrorla {verb} COMMAND --help", ""])


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """A docstring's text, and its sections by title."""
    text, *parts = _SECTION.split(inspect.getdoc(function) or "")
    return text.strip(), {title: body.rstrip() for title, body in zip(parts[::2], parts[1::2], strict=True)}
