"""Bringing a rank's part of a store back to the moment of a Lightning checkpoint, without leftovers.

Everything is checked before anything is changed, the journal is replaced in one step before any file goes,
and so a crash in here leaves a store that the next resume cleans.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning_influence.artifacts.disk import TEMPORARY, check_size, writing
from lightning_influence.artifacts.journal import Journal, ranks
from lightning_influence.artifacts.ledger import check_chunks, check_coverage, read_ledger, read_record
from lightning_influence.artifacts.manifest import Manifest, read_manifest, refuse_difference
from lightning_influence.artifacts.paths import CHECKPOINTS, FROZEN, rank_folder, walk
from lightning_influence.artifacts.records import Artifact, Checkpoint
from lightning_influence.artifacts.weights import frozen_files


def bring_back(root: Path, manifest: Manifest, mark: int | None, rank: int, world_size: int | None) -> Manifest:
    """Drop what ``rank`` committed after ``mark`` batches or never finished; returns the stored manifest.

    Rank zero also removes what no journal lists, and with ``world_size`` the later records of ranks that are
    no more.

    Raises:
        StoreError: no store, another run's store, a damaged journal, or fewer records than ``mark`` requires.
    """
    stored = read_manifest(root)
    refuse_difference(root, stored, manifest)
    ledger = read_ledger(root)
    complete = {step for step, at in ledger.checkpoints.items() if mark is None or at.mark <= mark}
    for step in sorted(complete):
        if shards := ledger.at(step, "gradients"):
            check_coverage(shards, stored.dataset_length, f"the checkpoint at step {step}")
    gone = [other for other in ranks(root) if rank == 0 and world_size is not None and other >= world_size]
    plans = {each: _plan(root, each, mark, complete) for each in (rank, *gone)}
    for plan in plans.values():
        for artifact in plan.kept:
            check_size(root, artifact.path, artifact.bytes)
    if stored.mode == "in_flight" and mark is not None:
        check_chunks([artifact for artifact in plans[rank].kept if artifact.kind == "in_flight"], mark, rank)
    for plan in plans.values():
        if plan.changed:
            plan.journal.replace(plan.lines)
        for path in plan.dropped:
            with writing(root / path):
                (root / path).unlink(missing_ok=True)
    _sweep(root, rank, gone)
    return stored


class _Plan:
    """What stays of one journal."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.lines: list[dict[str, Any]] = []
        self.kept: list[Artifact] = []
        self.dropped: list[str] = []
        self.changed = True


def _plan(root: Path, rank: int, mark: int | None, complete: Collection[int]) -> _Plan:
    plan = _Plan(Journal(root, rank))
    if not plan.journal.path.exists():
        return plan  # a rank that joins only now: its empty journal is written
    lines = plan.journal.read()
    entries = [read_record(line, rank) for line in lines]
    needed: set[str] = set()
    for entry in entries:
        if isinstance(entry, Artifact) and entry.kind == "weights" and entry.step in complete:
            needed |= frozen_files(entry)

    def stays(entry: Artifact | Checkpoint) -> bool:
        if isinstance(entry, Checkpoint) or entry.path.startswith(f"{CHECKPOINTS}/"):
            return entry.step in complete
        if entry.kind == "frozen":
            return entry.path in needed
        return mark is None or entry.mark <= mark

    for line, entry in zip(lines, entries, strict=True):
        if stays(entry):
            plan.lines.append(line)
            if isinstance(entry, Artifact):
                plan.kept.append(entry)
        elif isinstance(entry, Artifact):
            plan.dropped.append(entry.path)
    plan.changed = len(plan.lines) != len(lines) or plan.journal.torn()
    return plan


def _sweep(root: Path, rank: int, gone: Collection[int]) -> None:
    """Delete interrupted writes of this rank (and of ranks that are gone) and files in no journal."""
    listed = set(read_ledger(root).artifacts)
    endings = tuple(f".rank{each:05d}{TEMPORARY}" for each in (rank, *gone))
    folders = [f"{rank_folder(each)}/" for each in (rank, *gone)]
    if rank == 0:
        folders += [f"{CHECKPOINTS}/", f"{FROZEN}/"]
    for relative in list(walk(root)):
        unlisted = relative.endswith(".safetensors") and relative not in listed
        if relative.endswith(endings) or (unlisted and relative.startswith(tuple(folders))):
            with writing(root / relative):
                (root / relative).unlink(missing_ok=True)
    if rank == 0 and (root / CHECKPOINTS).is_dir():
        for folder in sorted((root / CHECKPOINTS).iterdir()):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
