"""Files that are either wholly there or not there: atomic replacement, crashes, full disks."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TypeVar

from lightning_influence.artifacts.paths import inside
from lightning_influence.errors import StoreError

T = TypeVar("T")

TEMPORARY = ".tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT}


def regular_size(root: Path, relative: str) -> int:
    """Size in bytes of the regular file ``relative``; StoreError if it is missing or not a plain file."""
    path = inside(root, relative)
    try:
        status = path.stat()
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read",
            expected="a file that the store's manifest lists",
            found=error.strerror,
            hint="restore the file from a copy of the store; `verify()` lists everything that is missing",
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(
            f"{path} is not a plain file",
            expected="a regular file",
            found="a folder, a device or a pipe",
            hint="restore the file from a copy of the store",
        )
    return status.st_size


def check_size(root: Path, relative: str, size: int) -> None:
    """StoreError unless the file ``relative`` is there and has ``size`` bytes."""
    found = regular_size(root, relative)
    if found != size:
        raise StoreError(
            f"{inside(root, relative)} has the wrong size",
            expected=f"{size:,} bytes",
            found=f"{found:,} bytes",
            hint="restore the file from a copy of the store; `verify()` lists every problem",
        )


def read_bytes(root: Path, relative: str) -> bytes:
    """The content of a small file of the store."""
    regular_size(root, relative)
    path = inside(root, relative)
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read",
            expected="a readable file",
            found=error.strerror,
            hint="check the permissions of the store's folder",
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an operating system's refusal to write ``path`` into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        raise StoreError(
            f"no space left to write {path}" if full else f"{path} cannot be written",
            expected="room on the disk" if full else "a writable folder",
            found=f"{error.strerror or error}, {free_bytes(path):,} bytes free",
            hint="free some space and resume from a Lightning checkpoint; what was committed is still there"
            if full
            else "check the path, its permissions, and that the disk is mounted for writing",
        ) from error


def temporary_name(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.rank{rank:05d}{TEMPORARY}")


def replace_file(path: Path, write: Callable[[FileIO], T], rank: int) -> T:
    """Write a file under a temporary name, force it to the disk, and only then give it its name.

    A crash at any moment leaves the old file (or none) and perhaps a temporary one, never half a file under
    ``path``.
    """
    temporary = temporary_name(path, rank)
    with writing(path):
        make_folders(path.parent)
        try:
            with open(temporary, "wb", buffering=0) as file:
                result = write(file)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return result


def write_all(file: FileIO, data: memoryview) -> None:
    """Write every byte: an unbuffered file may take fewer than it is given."""
    while len(data):
        data = data[file.write(data) :]


def make_folders(folder: Path) -> None:
    """Create ``folder`` and its missing parents so that their names survive a power cut."""
    missing = [folder, *folder.parents]
    missing = [parent for parent in missing if not parent.exists()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Force a folder's list of names to the disk (a no-op where folders cannot be opened)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Bytes that may still be written on the disk that holds, or will hold, ``path``."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
