"""Files that are open when a process forks, so that the child reads them without moving the parent's place in them.

A forked process shares the offset of every file that was open, so that `seek` and `read` in the one move the other.
Where the system can, the child opens such files anew; elsewhere the parent puts its offsets back.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

if sys.platform != "win32":
    import fcntl

_ANEW = "/proc/self/fd"  # opening an entry opens the file itself again, with an offset of its own
_LISTS = (_ANEW, "/dev/fd")  # folders with an entry for each open file
_OUTPUT = (1, 2)  # what is written there must stay in one order with what the parent writes


def open_files_anew() -> None:
    """In a forked process: an offset of its own for every readable file, where it is now.

    Files that are only written to stay shared, and so do those that cannot be opened again.
    """
    for number, flags in _readable():
        with suppress(OSError):
            anew = os.open(f"{_ANEW}/{number}", flags)
            try:
                os.lseek(anew, os.lseek(number, 0, os.SEEK_CUR), os.SEEK_SET)
                os.dup2(anew, number, inheritable=os.get_inheritable(number))
            finally:
                os.close(anew)


@contextmanager
def places_kept() -> Iterator[None]:
    """In the parent: put offsets back in the files that a forked process cannot open anew.

    A file that was closed meanwhile is left alone, and so is one that can be written to and has changed.
    """
    places = []
    for number, flags in _readable():
        if not _can_be_opened_anew(number, flags):
            with suppress(OSError):
                places.append((number, _file(number, flags), os.lseek(number, 0, os.SEEK_CUR)))
    try:
        yield
    finally:
        flags_now = dict(_readable()) if places else {}
        for number, file, place in places:
            with suppress(OSError):
                if number in flags_now and _file(number, flags_now[number]) == file:
                    os.lseek(number, place, os.SEEK_SET)


def _readable() -> list[tuple[int, int]]:
    """Number and flags of every regular file that this process has open for reading."""
    found: list[tuple[int, int]] = []
    if sys.platform == "win32":
        return found
    folder = next((folder for folder in _LISTS if os.path.isdir(folder)), None)
    for number in sorted(map(int, os.listdir(folder))) if folder is not None else ():
        with suppress(OSError):
            flags = fcntl.fcntl(number, fcntl.F_GETFL)
            writes_only = flags & os.O_ACCMODE == os.O_WRONLY
            if stat.S_ISREG(os.fstat(number).st_mode) and not writes_only and number not in _OUTPUT:
                found.append((number, flags))
    return found


def _can_be_opened_anew(number: int, flags: int) -> bool:
    """Whether a child may; trying it here would give up the locks that this process has on the file."""
    needed = os.R_OK if flags & os.O_ACCMODE == os.O_RDONLY else os.R_OK | os.W_OK
    return os.access(f"{_ANEW}/{number}", needed, effective_ids=os.access in os.supports_effective_ids)


def _file(number: int, flags: int) -> tuple[int, ...]:
    """What stays the same while it is the same file, and nobody writes through it."""
    now = os.fstat(number)
    written = () if flags & os.O_ACCMODE == os.O_RDONLY else (now.st_size, now.st_mtime_ns)
    return (now.st_dev, now.st_ino, *written)
