"""The arguments of a callback are checked as it is made, long before a run could fail because of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_influence.errors import UnsupportedError


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """UnsupportedError if `value` is none of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise UnsupportedError(f"unknown {name}", expected=", ".join(allowed), found=repr(value), hint="choose one")


def positive(**values: object) -> None:
    """UnsupportedError for the first value that is neither `None` nor a whole number of 1 or more."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UnsupportedError(
                f"{name} must be a positive whole number",
                expected="an int >= 1",
                found=repr(value),
                hint=f"pass {name}=1 or more, as a number",
            )


def folder_or_none(name: str, value: object) -> None:
    """UnsupportedError if `value` is no path."""
    if value is not None and not isinstance(value, (str, Path)):
        raise UnsupportedError(
            f"{name} must be a folder", expected="a str or a Path", found=repr(value), hint="pass a path, or None"
        )


def names(name: str, value: object) -> str | tuple[str, ...]:
    """`value` as one name or several; UnsupportedError if it is neither."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and all(isinstance(each, str) for each in value):
        return tuple(value)
    raise UnsupportedError(
        f"{name} must be a name or names",
        expected='"word_embeddings", "last_layer", "all", or names and globs over parameter names',
        found=repr(value),
        hint='pass for example parameters=["word_embeddings", "head.*"]',
    )


def goes_with(mode: str, per_mode: Mapping[str, tuple[str, Any, str]]) -> None:
    """UnsupportedError for an argument that `mode` has no use for; `per_mode`: name to (its mode, value, hint)."""
    for name, (needed, value, hint) in per_mode.items():
        if value is not None and mode != needed:
            raise UnsupportedError(
                f"{name} has no effect with mode='{mode}'",
                expected=f"mode='{needed}', or no {name}",
                found=f"mode='{mode}' and {name}=",
                hint=hint,
            )
