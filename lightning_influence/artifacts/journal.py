"""A rank's append-only journal: one checked JSON line for every commit, a torn last line ignored.

A line is ``{"record": <kind>, ..., "check": <16 hex digits over the rest>}``. The line feed is its last byte
and is written with it, so what stands after the last line feed was never committed. A whole line whose check
digits are wrong is damage, not a crash, and is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_influence.artifacts.disk import make_folders, read_bytes, replace_file, sync_folder, write_all, writing
from lightning_influence.artifacts.json_values import CHECK, Json, canonical, digest, parse
from lightning_influence.errors import StoreError

_NAME = re.compile(r"manifest-rank(\d{5,})\.jsonl")


def journal_name(rank: int) -> str:
    return f"manifest-rank{rank:05d}.jsonl"


def ranks(root: Path) -> list[int]:
    """The ranks that have a journal in the store at ``root``."""
    found = (_NAME.fullmatch(name) for name in os.listdir(root))
    return sorted(int(match[1]) for match in found if match and journal_name(int(match[1])) == match[0])


def _line(record: dict[str, Json]) -> bytes:
    return canonical({**record, CHECK: digest(record)}).encode() + b"\n"


class Journal:
    """The journal of one rank of the store at ``root``."""

    def __init__(self, root: Path, rank: int) -> None:
        self.root, self.rank = root, rank
        self.path = root / journal_name(rank)

    def read(self) -> list[dict[str, Any]]:
        """Every committed record, in the order of the commits; StoreError if one is damaged."""
        records = []
        for record in self.scan():
            if isinstance(record, StoreError):
                raise record
            records.append(record)
        return records

    def scan(self) -> Iterator[dict[str, Any] | StoreError]:
        """Every committed record, a damaged one as the error that says so."""
        *lines, _torn = read_bytes(self.root, self.path.name).split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                record = parse(line)
                if record.get(CHECK) != digest(record):
                    raise ValueError("its check digits do not match its content")
                yield record
            except ValueError as error:
                yield self.damage(f"line {number}", error)

    def damage(self, line: str, error: Exception) -> StoreError:
        return StoreError(
            f"{line} of {self.path} is damaged",
            expected="a commit record as the library wrote it",
            found=str(error),
            hint="restore the journal from a copy of the store; the other files are not touched by this",
        )

    def torn(self) -> bool:
        """Whether a crash left an unfinished last line."""
        return not (read_bytes(self.root, self.path.name) or b"\n").endswith(b"\n")

    def append(self, records: Sequence[dict[str, Json]]) -> None:
        """Commit ``records`` in one write, forced to the disk; a write that fails is taken back."""
        data = b"".join(_line(record) for record in records)
        with writing(self.path):
            new = not self.path.exists()
            make_folders(self.root)
            with open(self.path, "ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    write_all(file, memoryview(data))
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(before)
                    raise
            if new:
                sync_folder(self.root)

    def replace(self, records: Sequence[dict[str, Json]]) -> None:
        """Write the journal anew with ``records`` only, in one step."""
        data = b"".join(_line(record) for record in records)
        replace_file(self.path, lambda file: write_all(file, memoryview(data)), self.rank)
