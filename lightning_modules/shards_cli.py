"""`mirrorla shards VERB`: a parser made from the typed functions of datamodules.commands."""

import inspect
import logging
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from lightning_modules import console
from lightning_modules.errors import UsageError
from lightning_modules.parser import OneLineParser


def commands() -> dict[str, Callable[..., Any]]:
    """The verbs below `shards`."""
    from datamodules import commands as functions

    return {
        "pack": functions.pack,
        "index": functions.index,
        "verify": functions.verify,
        "info": functions.info,
    }


def run(verb: str, argv: Sequence[str]) -> int:
    """Parse the options of one shards command and call it.

    Args:
        verb: "shards".
        argv: the command and its options.

    Returns:
        The function's integer result as exit code, 0 for any other result; a string result is printed.

    Raises:
        UsageError: an unknown command or option.
    """
    console.quiet_libraries()
    console.speak(rank=0)
    found = commands()
    parser = OneLineParser(prog=f"mirrorla {verb}", description="Pack, index, verify and describe shards.")
    required: dict[str, list[str]] = {}
    subcommands = parser.add_subcommands(required=False)
    for name, function in found.items():
        required[name] = _required_names(function)
        child = OneLineParser(prog=f"mirrorla {verb} {name}", description=inspect.getdoc(function))
        child.add_function_arguments(function, as_positional=True)
        first_line = (inspect.getdoc(function) or name).splitlines()[0]
        subcommands.add_subcommand(name, child, help=first_line)
    if not argv:
        raise UsageError(f"which one? mirrorla {verb} {'|'.join(found)} …; see mirrorla {verb} --help")
    words = [argv[0], *unname(argv[1:], required.get(argv[0], []))]
    options = parser.instantiate_classes(parser.parse_args(words))
    result = found[options.subcommand](**options[options.subcommand].as_dict())
    if isinstance(result, str):
        logging.getLogger("mirrorla").info("%s", result)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def unname(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Let required values be given by name as well as by place: `pack --source digits --out DIR`.

    Args:
        argv: words after the command.
        names: the command's required parameters, in order.

    Returns:
        The words with the required values first, in order, and without their names.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in names:
            given[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    if not given:
        return list(argv)
    places = list(takewhile(lambda word: not word.startswith("-"), rest))
    options = rest[len(places) :]
    filled = [given[name] if name in given else places.pop(0) for name in names if name in given or places]
    return [*filled, *places, *options]


def _required_names(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]
