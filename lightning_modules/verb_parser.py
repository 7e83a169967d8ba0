"""The argument parser of verbs that are not trainings: plain argparse, whose refusals are one line of ours."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import NoReturn

from lightning_modules.errors import UsageError


class VerbParser(ArgumentParser):
    """Of one verb.

    Args:
        verb: as typed after `mirrorla`.
        description: what --help says before the options.
        epilog: and after them.
    """

    def __init__(self, verb: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"mirrorla {verb}",
            description=description,
            epilog=epilog,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Refuse.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message}; see {self.prog} --help")
