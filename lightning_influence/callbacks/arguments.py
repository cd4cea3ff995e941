"""The arguments of a callback are checked as it is made, long before a run could fail because of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_influence.errors import UnsupportedError
from lightning_influence.gradients import Projection


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


def whole_number(**values: object) -> None:
    """UnsupportedError for the first value that is no whole number of 0 or more."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UnsupportedError(
                f"{name} must be a whole number", expected="an int >= 0", found=repr(value), hint=f"pass {name}=0"
            )


def steps(name: str, value: object) -> tuple[int, ...]:
    """`value` as positive whole numbers; UnsupportedError if it is something else."""
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    found = [each for each in given or () if isinstance(each, int) and not isinstance(each, bool) and each > 0]
    if found != given:
        raise UnsupportedError(
            f"{name} must be numbers of optimizer steps",
            expected="a list of whole numbers of 1 or more",
            found=repr(value),
            hint=f"pass for example {name}=[1000, 5000]",
        )
    return tuple(found)


def folder_or_none(name: str, value: object) -> None:
    """UnsupportedError if `value` is no path."""
    if value is not None:
        folder(name, value)


def folder(name: str, value: object) -> None:
    """UnsupportedError if `value` is no path."""
    if not isinstance(value, (str, Path)):
        raise UnsupportedError(
            f"{name} must be a folder", expected="a str or a Path", found=repr(value), hint="pass a path"
        )


def callable_or_none(name: str, value: Any) -> Any:
    """`value`; UnsupportedError if it is something that cannot be called."""
    if value is not None and not callable(value):
        raise UnsupportedError(
            f"{name} must be a function",
            expected="a callable (module, batch) -> (N,), or None",
            found=repr(value),
            hint="pass the function itself, not its name",
        )
    return value


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


def projection_or_none(value: object, top_words: int | None) -> None:
    """UnsupportedError if `value` is no projection, or if words are to be dropped before it."""
    if value is not None and not isinstance(value, Projection):
        raise UnsupportedError(
            "this is no projection",
            expected="RandomProjection(size), FactorProjection(rank) or None",
            found=repr(value),
            hint="pass for example projection=FactorProjection(16), with the brackets",
        )
    if value is not None and top_words is not None:
        raise UnsupportedError(
            "top_words has no use beside a projection",
            expected="projection=, or top_words=",
            found=f"projection={value!r} and top_words={top_words}",
            hint="a projection stores a fixed number of values, however many words there are: leave top_words out",
        )
