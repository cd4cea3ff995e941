"""Plain JSON values: one canonical text for a value, and checked reading of fields that come from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from lightning_influence.errors import StoreError

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
T = TypeVar("T")

CHECK = "check"


def canonical(value: Json) -> str:
    """One line of ASCII, sorted keys: equal values have equal text. TypeError for what JSON cannot hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def plain(value: Any, what: str) -> Any:
    """``value`` as it will come back from a file (tuples become lists, mappings dicts).

    Raises:
        StoreError: ``value`` holds something that JSON cannot (a tensor, a class, a non-string key).
    """
    try:
        back = json.loads(canonical(_thawed(value)))
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{what} cannot be written as JSON",
            expected="None, booleans, numbers, strings, and lists and string-keyed dictionaries of them",
            found=str(error),
            hint="turn the value into plain numbers and strings, or leave it out",
        ) from error
    return back


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"the key {wrong[0]!r} is not a string")
        return {key: _thawed(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_thawed(inner) for inner in value]
    return value


def digest(record: Mapping[str, Json]) -> str:
    """Sixteen hex digits over a record's content, its own ``check`` field left out."""
    content = {key: value for key, value in record.items() if key != CHECK}
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]


def parse(text: bytes) -> dict[str, Any]:
    """The JSON object in ``text``; ValueError if it is anything else."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, not {type(value).__name__}")
    return value


class Fields:
    """Typed access to a JSON object from a file that nobody vouches for; every mismatch is a ValueError."""

    def __init__(self, record: Any) -> None:
        if not isinstance(record, dict):
            raise ValueError(f"an object was expected, not {type(record).__name__}")
        self.record: dict[str, Any] = record

    def _get(self, key: str, kinds: type | tuple[type, ...]) -> Any:
        if key not in self.record:
            raise ValueError(f"the field {key!r} is missing")
        value = self.record[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ValueError(f"the field {key!r} holds {type(value).__name__}")
        return value

    def text(self, key: str) -> str:
        return str(self._get(key, str))

    def optional_text(self, key: str) -> str | None:
        return None if self.record.get(key) is None else self.text(key)

    def integer(self, key: str) -> int:
        value = int(self._get(key, int))
        if value < 0:
            raise ValueError(f"the field {key!r} is negative: {value}")
        return value

    def number(self, key: str) -> float:
        return float(self._get(key, (int, float)))

    def object(self, key: str) -> dict[str, Any]:
        return dict(self._get(key, dict))

    def texts(self, key: str) -> tuple[str, ...]:
        return self.items(key, _as_text)

    def integers(self, key: str) -> tuple[int, ...]:
        return self.items(key, _as_integer)

    def items(self, key: str, read: Callable[[Any], T]) -> tuple[T, ...]:
        return tuple(read(item) for item in self._get(key, list))


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a string was expected, not {type(value).__name__}")
    return value


def _as_integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"a count was expected, not {value!r}")
    return value
