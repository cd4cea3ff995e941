"""All scores on disk: every process appends records to a part of its own, and rank zero joins them into one table.

    scores.safetensors           "scores" (Q, N) float32, NaN where a sample was not scored
    scores.safetensors.parts/    while scoring: rank-00000.bin, ..., records of whole batches, each with a checksum

A process that is killed leaves at most one torn record, which the checksum gives away: what precedes it counts as done.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_influence.artifacts.disk import (
    free_bytes,
    make_folders,
    sync_folder,
    temporary_name,
    write_all,
    writing,
)
from lightning_influence.errors import QueryError, StoreError

_MAGIC = b"influence-scores-1"
_HEAD = struct.Struct("<18s64sQQ")  # magic, digits, Q, N
_RECORD = struct.Struct("<QI")  # samples, checksum of what follows: ids int64 (B,), scores float32 (B, Q)
_PIECE = 1 << 22  # numbers written or read at a time
_NAME = "scores"

Record = tuple[Tensor, Tensor]  # sample ids (n,), scores (Q, n) float32


def read_scores(path: str | os.PathLike[str]) -> Tensor:
    """The finished table of scores, (Q, N) float32, memory-mapped; NaN where a sample was not scored.

    Raises:
        StoreError: no such file, or another one.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            scores: Tensor = file.get_tensor(_NAME)
            return scores
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{path} holds no finished scores",
            expected="a file that a stream has finished",
            found=f"{type(error).__name__}: {error}",
            hint="let Trainer().predict(influence, train_loader) reach its end; a killed one goes on where it was",
        ) from error


class ScoreFile:
    """The scores of one set of prepared queries against one training set, as far as they are known.

    Args:
        path: of the table.
        recognised: digits that say to which queries, checkpoints and settings the scores belong.
        num_queries, num_samples: Q, N.
        rank: of this process.

    Raises:
        QueryError: the file or one of its parts belongs to other queries.
        StoreError: it is no such file; too little space.
    """

    def __init__(self, path: Path, recognised: str, num_queries: int, num_samples: int, rank: int) -> None:
        self.path, self._parts = path, path.with_name(f"{path.name}.parts")
        self._head = _HEAD.pack(_MAGIC, recognised.encode(), num_queries, num_samples)
        self._recognised, self._shape, self._rank = recognised, (num_queries, num_samples), rank
        self._own = self._parts / f"rank-{rank:05d}.bin"
        self._open: FileIO | None = None
        self._refuse_others()
        needed = 8 * num_queries * num_samples  # parts and table
        if rank == 0 and not path.exists() and free_bytes(path) < needed:
            raise StoreError(
                f"too little space for the scores at {path}",
                expected=f"{needed:,} bytes free",
                found=f"{free_bytes(path):,} bytes free",
                hint="prepare fewer queries, choose another disk, or leave scores_file out and keep the first k",
            )

    def records(self) -> Iterator[Record]:
        """What is known by now: of the finished table, then of every part."""
        if self.path.exists():
            table = read_scores(self.path)
            step = max(1, _PIECE // max(1, self._shape[0]))
            for start in range(0, self._shape[1], step):
                scores = table[:, start : start + step]
                known = (~scores.isnan().any(0)).nonzero().squeeze(1)
                if len(known):
                    yield start + known, scores[:, known]
        for part in self._part_files():
            with open(part, "rb", buffering=0) as file:
                file.seek(_HEAD.size)
                while (record := self._next(file)) is not None:
                    yield record

    def append(self, sample_ids: Tensor, scores: Tensor) -> None:
        """Add the scores (Q, n) float32 of some samples. They count as done when all of them are in the file."""
        body = sample_ids.to("cpu", torch.int64).numpy().tobytes()
        body += scores.T.to("cpu", torch.float32).contiguous().numpy().tobytes()
        with writing(self._own):
            file = self._open = self._open or self._opened()
            write_all(file, memoryview(_RECORD.pack(len(sample_ids), zlib.crc32(body)) + body))

    def close(self) -> None:
        """Force this process's records to the disk."""
        if self._open is not None:
            with writing(self._own), self._open:
                os.fsync(self._open.fileno())
            self._open = None

    def join(self) -> None:
        """Write the table from all that is known and drop the parts (rank zero, when every process has closed)."""
        if self.path.exists() and not self._part_files():
            return  # nothing is new
        queries, samples = self._shape
        header = {
            "__metadata__": {"format": "pt", "recognised": self._recognised},
            _NAME: {"dtype": "F32", "shape": [queries, samples], "data_offsets": [0, 4 * queries * samples]},
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        temporary = temporary_name(self.path, self._rank)
        with writing(self.path):
            make_folders(self.path.parent)
            try:
                with open(temporary, "wb", buffering=0) as file:
                    write_all(file, memoryview(struct.pack("<Q", len(text)) + text))
                    nothing = memoryview(np.full(min(_PIECE, queries * samples), np.nan, np.float32).tobytes())
                    left = 4 * queries * samples
                    while left:  # really written: a disk that is full is found out here
                        write_all(file, nothing[: min(left, len(nothing))])
                        left -= min(left, len(nothing))
                table = np.memmap(temporary, np.float32, "r+", offset=8 + len(text), shape=(queries, samples))
                for ids, scores in self.records():
                    table[:, ids.numpy()] = scores.numpy()
                table.flush()
                del table
                with open(temporary, "rb+", buffering=0) as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            sync_folder(self.path.parent)
            for part in self._part_files():
                part.unlink()
            if self._parts.exists():
                self._parts.rmdir()

    def _opened(self) -> FileIO:
        """This process's part, cut where its last whole record ends."""
        make_folders(self._parts)
        end = 0
        if self._own.exists():
            with open(self._own, "rb", buffering=0) as file:
                if file.read(_HEAD.size) == self._head:
                    end = _HEAD.size
                    while self._next(file) is not None:
                        end = file.tell()
        opened = open(self._own, "r+b" if self._own.exists() else "w+b", buffering=0)  # noqa: SIM115
        opened.truncate(end)
        opened.seek(end)
        if end == 0:
            write_all(opened, memoryview(self._head))
        return opened

    def _next(self, file: FileIO) -> Record | None:
        """The next whole record, if there is one."""
        start = file.read(_RECORD.size)
        if len(start) < _RECORD.size:
            return None
        count, checksum = _RECORD.unpack(start)
        queries, samples = self._shape
        if count > samples:
            return None
        body = _read(file, count * (8 + 4 * queries))
        if body is None or zlib.crc32(body) != checksum:
            return None
        ids = torch.frombuffer(body, dtype=torch.int64, count=count) if count else torch.zeros(0, dtype=torch.int64)
        scores = torch.frombuffer(body, dtype=torch.float32, offset=8 * count) if count * queries else torch.zeros(0)
        return ids, scores.view(count, queries).T

    def _part_files(self) -> list[Path]:
        return sorted(self._parts.glob("rank-*.bin")) if self._parts.exists() else []

    def _refuse_others(self) -> None:
        if self.path.exists():
            read_scores(self.path)  # refuses what is no table
            with safe_open(self.path, framework="pt") as file:
                self._same(self.path, (file.metadata() or {}).get("recognised") == self._recognised)
        for part in self._part_files():
            with open(part, "rb", buffering=0) as file:
                head = file.read(_HEAD.size)
            self._same(part, head == self._head or len(head) < _HEAD.size)

    def _same(self, path: Path, same: bool) -> None:
        if not same:
            raise QueryError(
                f"{path} holds scores of something else",
                expected="scores of these queries, in this order, at these checkpoints, by this estimator and settings",
                found="other ones",
                hint="prepare the same queries again to go on, or choose another scores_file; nothing was overwritten",
            )


def _read(file: FileIO, size: int) -> bytearray | None:
    """So many bytes, or `None` where the file ends before."""
    body = bytearray(size)
    view, got = memoryview(body), 0
    while got < size:
        count = file.readinto(view[got:])
        if not count:
            return None
        got += count
    return body
