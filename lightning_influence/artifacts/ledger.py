"""All journals of a store read together: its committed files and its checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_influence.artifacts.journal import Journal, ranks
from lightning_influence.artifacts.json_values import Fields, Json
from lightning_influence.artifacts.paths import inside
from lightning_influence.artifacts.records import Artifact, Checkpoint
from lightning_influence.errors import StoreError


@dataclass(frozen=True)
class Ledger:
    """What has been committed: files by path, and checkpoints by step."""

    artifacts: Mapping[str, Artifact]
    checkpoints: Mapping[int, Checkpoint]

    def at(self, step: int, kind: str) -> tuple[Artifact, ...]:
        return tuple(a for a in self.artifacts.values() if a.kind == kind and a.step == step)

    def ordered_checkpoints(self) -> tuple[Checkpoint, ...]:
        return tuple(self.checkpoints[step] for step in sorted(self.checkpoints))


def artifact_record(artifact: Artifact) -> dict[str, Json]:
    return {"record": "artifact", **artifact.to_json()}


def checkpoint_record(checkpoint: Checkpoint) -> dict[str, Json]:
    return {"record": "checkpoint", **checkpoint.to_json()}


def read_record(record: Mapping[str, Any], rank: int) -> Artifact | Checkpoint:
    """The commit that one journal line says; ValueError or StoreError if it says none."""
    kind = Fields(record).text("record")
    if kind == "artifact":
        return Artifact.from_json(record, rank)
    if kind == "checkpoint" and rank == 0:
        return Checkpoint.from_json(record)
    raise ValueError(f"a record of the kind {kind!r} in the journal of rank {rank}")


def read_ledger(root: Path, problems: list[str] | None = None) -> Ledger:
    """The journals of the store at ``root``; a damaged line raises, or is added to ``problems``.

    Raises:
        StoreError: a line is damaged, names a file outside the store, or commits something twice.
    """
    artifacts: dict[str, Artifact] = {}
    checkpoints: dict[int, Checkpoint] = {}
    for rank in ranks(root):
        journal = Journal(root, rank)
        for number, record in enumerate(journal.scan(), start=1):
            try:
                if isinstance(record, StoreError):
                    raise record
                entry = read_record(record, rank)
                known: Mapping[Any, object] = artifacts if isinstance(entry, Artifact) else checkpoints
                key: Any = entry.path if isinstance(entry, Artifact) else entry.step
                if key in known:
                    raise ValueError(f"{key!r} is committed twice")
                if isinstance(entry, Artifact):
                    inside(root, entry.path)
                    artifacts[entry.path] = entry
                else:
                    checkpoints[entry.step] = entry
            except (ValueError, StoreError) as error:
                refusal = error if isinstance(error, StoreError) else journal.damage(f"line {number}", error)
                if problems is None:
                    raise refusal from None
                problems.append(f"{refusal.what}: {refusal.found}")
    return Ledger(artifacts, checkpoints)


def check_coverage(shards: Iterable[Artifact], length: int, where: str) -> tuple[Artifact, ...]:
    """The shards in order; StoreError unless they cover [0, length) without gap or overlap."""
    ordered = sorted(shards, key=lambda shard: shard.span or (0, 0))
    end, problem = 0, None
    for shard in ordered:
        start, stop = shard.span or (0, 0)
        if start != end and problem is None:
            if start > end:
                problem = f"no shard for the positions {end} to {start - 1}"
            else:
                problem = f"two shards for the positions {start} to {min(end, stop) - 1}, one of them {shard.path}"
        end = max(end, stop)
    if problem is None and end != length:
        beyond = f"positions up to {end - 1}"
        problem = beyond if end > length else f"no shard for the positions {end} to {length - 1}"
    if problem is not None:
        raise StoreError(
            f"the gradients of {where} do not cover the training set",
            expected=f"every position from 0 to {length - 1} in exactly one shard",
            found=problem,
            hint="replay this checkpoint again, or leave it out of the checkpoints that the estimator uses",
        )
    return tuple(ordered)


def check_chunks(chunks: Sequence[Artifact], mark: int, rank: int) -> None:
    """StoreError unless a rank's chunks follow each other without gap or overlap and reach ``mark``."""
    ordered = sorted(chunks, key=lambda chunk: chunk.mark)
    end = ordered[0].mark - ordered[0].batches if ordered else 0
    for chunk in ordered:
        if chunk.mark - chunk.batches != end:
            break
        end = chunk.mark
    if end != mark:
        raise StoreError(
            f"the in-flight records of rank {rank} do not reach the Lightning checkpoint that is resumed",
            expected=f"the batches of this rank up to {mark}, without gap or repetition",
            found=f"the batches up to {end}",
            hint="resume from an earlier Lightning checkpoint, or start the fit again with an empty folder",
        )
