"""Options kept in the journal over an upgrade, as plain values by name: another version can read them."""

from __future__ import annotations

import enum
import types
import typing
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


def plain(value: Any) -> Any:
    """A dataclass of options as JSON can express it."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def restored(kind: type[_T], values: dict[str, Any]) -> _T:
    """The dataclass again. What it does not know is left out, and what is not there has its default.

    Raises:
        ValueError: something without a default is missing, or a value is not of its kind.
    """
    hints = typing.get_type_hints(kind)
    given = {}
    for item in fields(typing.cast(Any, kind)):
        if item.name in values:
            given[item.name] = _of_kind(hints[item.name], values[item.name])
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{item.name} is missing")
    return kind(**given)


def _of_kind(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        chosen = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return None if value is None else _of_kind(chosen[0], value)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(_of_kind(inner, item) for item in value)
    if isinstance(hint, type) and is_dataclass(hint):
        return restored(hint, value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    return value
