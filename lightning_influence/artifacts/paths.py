"""Where things lie in a store's folder, and the promise that nothing outside it is ever touched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lightning_influence.errors import StoreError

CHECKPOINTS, FROZEN, IN_FLIGHT = "checkpoints", "frozen", "in_flight"


def checkpoint_folder(step: int) -> str:
    """Where the files of a checkpoint lie, relative to the store."""
    return f"{CHECKPOINTS}/step={step:08d}"


def rank_folder(rank: int) -> str:
    """Where the in-flight chunks of a rank lie, relative to the store."""
    return f"{IN_FLIGHT}/rank{rank:05d}"


def local_folder(root: str | os.PathLike[str]) -> Path:
    """``root`` as an absolute path; StoreError for ``s3://bucket`` and its like."""
    text = os.fspath(root)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # a Path has already folded "//" into "/"
        raise StoreError(
            f"{text!r} is not a local folder",
            expected="a path of a mounted file system",
            found=f"an address with the scheme {text.split(':')[0]!r}",
            hint="write to a local folder and copy it afterwards, or mount the remote storage",
        )
    if "\0" in text:
        raise StoreError(
            f"{text!r} is no folder", expected="a path", found="a character that paths cannot have", hint="look at it"
        )
    return Path(text).expanduser().resolve()


def inside(root: Path, relative: str) -> Path:
    """The file that ``relative`` names under ``root`` (resolved); StoreError if it lies anywhere else."""
    pure = PurePosixPath(relative)
    escape = pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in relative or "\0" in relative
    path = root if escape else root.joinpath(*pure.parts)
    try:
        escape = escape or not path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a loop of symbolic links
        escape = True
    if escape:
        raise StoreError(
            f"the store at {root} names a file outside its folder",
            expected="a relative path without '..' and without links that lead out",
            found=repr(relative),
            hint="do not use this store: it is damaged, or was made to read files that are not its own",
        )
    return path


def walk(root: Path) -> Iterator[str]:
    """Every file and link under ``root``, relative, with forward slashes; links are named, not followed."""
    for folder, folders, files in os.walk(root):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted(files + links):
            yield Path(folder, name).relative_to(root).as_posix()
