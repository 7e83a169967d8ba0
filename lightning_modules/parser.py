"""A parser whose every complaint is one line that says which key, what was expected and what was given."""

import re
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_modules.errors import UsageError

_KEY = re.compile(r'Parser key "([^"]+)":')
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$")
_GIVEN = re.compile(r"Given value: (.*)$")
_TYPE = re.compile(r"<class '(?:[\w.]+\.)?(\w+)'>")
_LITERAL = re.compile(r"typing\.Literal\[(.+)\]")
_BOILERPLATE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Problem with given class_path",
    "Parser key",
    "Expected a",
)


class OneLineParser(LightningArgumentParser):
    """Lightning's parser with one-line errors and no abbreviated options.

    Args:
        options: keywords of jsonargparse's ArgumentParser; its signature is not ours to repeat.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UsageError, except inside jsonargparse's own trials, which expect its error.

        Raises:
            UsageError: with the complaint on one line.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        raise UsageError(one_line_complaint(message)) from None


def one_line_complaint(message: str) -> str:
    """Shorten jsonargparse's nested explanation.

    Args:
        message: several lines: the key, every alternative of a union, the value.

    Returns:
        "trainer.max_steps: expected int, got 'two'", or the innermost sentence where no type is at fault.
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    key = ".".join(_KEY.findall(message))
    prefix = f"{key}: " if key else ""
    sentences = [_KEY.sub("", line).strip() for line in lines if not line.startswith(_BOILERPLATE)]
    if sentences:
        return prefix + " ".join(" ".join(sentences).split())
    expected, given = _expectation(lines)
    return f"{prefix}expected {expected}, got {given!r}" if expected else " ".join(message.split())


def _expectation(lines: list[str]) -> tuple[str, str]:
    types, given = [], ""
    for line in lines:
        if found := _EXPECTED.match(line):
            name = _LITERAL.sub(r"one of \1", _TYPE.sub(r"\1", found[1])).replace("NoneType", "null")
            types.append(name)
            given = found[2] or given
        elif (found := _GIVEN.match(line)) and not given:
            given = found[1]
    # Union members of an enclosing optional class say nothing about the value at fault.
    if len(types) > 1 and "Problem with given class_path" in " ".join(lines):
        types = [name for name in types if name != "null"] or types
    return " or ".join(dict.fromkeys(types)), given
