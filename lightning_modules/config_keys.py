"""Which keys a configuration may have: the parser's and, below model and data, the chosen classes' arguments."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

from lightning_modules.errors import UsageError, nearest

_CLASS_WORDS = frozenset({"class_path", "dict_kwargs", "help"})

Keys = Mapping[str, Any]
"""Children of a key: name -> type annotation; None instead of a mapping means that anything goes below."""


def load_class(path: str, key: str) -> type:
    """Import a class by its dotted path.

    Args:
        path: "lightning_modules.classification.ClassificationModule".
        key: the option it was given for, used in messages.

    Raises:
        UsageError: naming the path and the nearest class of its module.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError):
        raise UsageError(f"{key} {path!r}: there is no module {module_name!r}") from None
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [
            n for n, value in vars(module).items() if isinstance(value, type) and value.__module__ == module_name
        ]
        near = nearest(name, classes)
        hint = f"nearest: {module_name}.{near}" if near else f"it has {', '.join(classes) or 'no classes'}"
        raise UsageError(f"{key} {path!r}: module {module_name!r} has no class {name!r}; {hint}")
    return found


def arguments_of(annotation: Any) -> Keys | None:
    """Names below a key of this type.

    Args:
        annotation: a dataclass, a class built from init_args, an optional of one, or any other type.

    Returns:
        Field or argument names with their types; None where the keys are not ours to know.
    """
    for option in (annotation, *typing.get_args(annotation)):
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            hints = typing.get_type_hints(option)
            return {field.name: hints[field.name] for field in dataclasses.fields(option)}
    return None


def constructor_arguments(cls: type) -> Keys | None:
    """Arguments of a class's constructor, with those of its bases as long as it hands keywords on to them.

    Returns:
        Names with their types; None when the last of them takes arbitrary keywords.
    """
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        hints = typing.get_type_hints(base.__init__)  # type: ignore[misc]
        named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        found = {**{name: hints.get(name, Any) for name in named}, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found
    return None


class KeyTree:
    """The valid keys of one verb.

    Args:
        options: the parser's option names without dashes: "trainer.max_epochs", "run_dir".
        classes: the classes chosen for "model" and "data"; a missing one leaves its keys unchecked.
    """

    def __init__(self, options: Iterable[str], classes: Mapping[str, type]) -> None:
        self._classes = {key: constructor_arguments(cls) for key, cls in classes.items()}
        self._tops: dict[str, set[str]] = {}
        for option in options:
            top, _, rest = option.partition(".")
            self._tops.setdefault(top, set())
            if rest:
                self._tops[top].add(rest.split(".")[0])

    def children(self, keys: tuple[str, ...]) -> set[str]:
        """Names valid right below a key; empty when it has none or they are not known."""
        found = self._below(keys)
        return set(found) if found is not None else set()

    def first_unknown(self, keys: tuple[str, ...]) -> int | None:
        """Position of the first key that is not valid, or None."""
        for position, key in enumerate(keys):
            valid = self._below(keys[:position])
            if valid is None:
                return None
            if key not in valid:
                return None if position and key in _CLASS_WORDS else position
        return None

    def suggest(self, keys: tuple[str, ...]) -> str | None:
        """The valid dotted key most like `keys`, whose last part is unknown.

        The same name elsewhere below the same top comes first, then a similar sibling, then a similar name elsewhere.
        """
        *parents, name = keys
        leaves = {path.rpartition(".")[2]: path for path in self._paths(keys[:1])} if parents else {}
        if name in leaves:
            return leaves[name]
        sibling = nearest(name, self.children(tuple(parents)))
        if sibling:
            return ".".join([*parents, sibling])
        near = nearest(name, leaves)
        return leaves[near] if near else None

    def _below(self, keys: tuple[str, ...]) -> Iterable[str] | None:
        if not keys:
            return self._tops
        if keys[0] in ("model", "data"):
            known = self._classes.get(keys[0])
            for key in keys[1:]:
                if known is None or key not in known:
                    return None
                known = arguments_of(known[key])
            return known
        return self._tops.get(keys[0]) or None if len(keys) == 1 else None

    def _paths(self, keys: tuple[str, ...]) -> Iterator[str]:
        for child in self._below(keys) or ():
            yield ".".join((*keys, child))
            if len(keys) < 6:
                yield from self._paths((*keys, child))
