"""Mistakes of a user, told apart from mistakes of ours: one line for the first, a traceback for the second.

Standard library only.
"""

import difflib
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

_PROJECT = Path(__file__).resolve().parent.parent
_PACKAGES = ("cluster", "datamodules", "lightning_modules", "mirrorla")
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
_USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class UsageError(ValueError):
    """The command cannot be carried out as given; the message is one line: what, where, the value and the mend."""


def is_users_mistake(error: BaseException) -> bool:
    """Whether an exception was raised by this project's code (or by the standard library on its behalf) for its user.

    A ValueError out of torch or Lightning is not: nobody can mend it from its message, so its traceback stays.
    """
    if isinstance(error, UsageError):
        return True
    if not isinstance(error, _USER_ERRORS):
        return False
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(_PROJECT) and path.relative_to(_PROJECT).parts[0] in _PACKAGES:
            return True
        if not path.is_relative_to(_STANDARD_LIBRARY) or "site-packages" in path.parts:
            return False
    return False


def one_line(error: BaseException) -> str:
    """The message of an exception on one line; an OSError says which file."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like `word`, if any is like it."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None
