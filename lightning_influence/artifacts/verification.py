"""A whole store looked over: every file that is missing, damaged, unfinished or foreign, in words."""

from __future__ import annotations

from pathlib import Path

from lightning_influence.artifacts.disk import TEMPORARY
from lightning_influence.artifacts.journal import Journal, journal_name, ranks
from lightning_influence.artifacts.ledger import Ledger, check_coverage, read_ledger
from lightning_influence.artifacts.manifest import MANIFEST, Manifest
from lightning_influence.artifacts.paths import CHECKPOINTS, walk
from lightning_influence.artifacts.records import Artifact
from lightning_influence.artifacts.shard import open_shard
from lightning_influence.artifacts.tensor_files import TensorFile
from lightning_influence.artifacts.weights import frozen_files
from lightning_influence.errors import StoreError


def problems_of(root: Path, manifest: Manifest) -> list[str]:
    """Every problem of the store at ``root``, one sentence each; an empty list means that it is whole."""
    problems: list[str] = []
    ledger = read_ledger(root, problems)
    for rank in ranks(root):
        if Journal(root, rank).torn():
            problems.append(
                f"{Journal(root, rank).path.name} ends in an unfinished line (a crash; resuming removes it)"
            )
    for artifact in ledger.artifacts.values():
        problems += _file_problems(root, manifest, artifact)
    problems += _checkpoint_problems(ledger, manifest)
    head = {MANIFEST, *(journal_name(rank) for rank in ranks(root))}
    for relative in walk(root):
        if relative.endswith(TEMPORARY):
            problems.append(f"{relative} is left from an interrupted write (resuming removes it)")
        elif relative not in ledger.artifacts and relative not in head:
            problems.append(f"{relative} is in the folder but in no journal")
    return problems


def _file_problems(root: Path, manifest: Manifest, artifact: Artifact) -> list[str]:
    try:
        file = TensorFile(root, artifact.path, size=artifact.bytes, sha256=artifact.sha256)
        file.verify(anew=True)
        if artifact.kind in ("gradients", "in_flight"):
            _ = open_shard(file, artifact, manifest.dataset_length).sample_ids
    except (StoreError, OSError) as error:
        detail = f"{error.what}: {error.found}" if isinstance(error, StoreError) else str(error)
        return [detail.replace(f"{root}/", "")]
    return []


def _checkpoint_problems(ledger: Ledger, manifest: Manifest) -> list[str]:
    problems = []
    for checkpoint in ledger.ordered_checkpoints():
        step = checkpoint.step
        weights = ledger.at(step, "weights")
        if len(weights) != 1:
            problems.append(f"the checkpoint at step {step} has {len(weights)} weights files")
        for artifact in weights:
            try:
                missing = sorted(frozen_files(artifact) - set(ledger.artifacts))
            except ValueError as error:
                missing, problems = [], [*problems, f"{artifact.path} has a damaged manifest entry: {error}"]
            problems += [f"{artifact.path} needs {path}, which is not in the store" for path in missing]
        shards = ledger.at(step, "gradients")
        try:
            if shards:
                check_coverage(shards, manifest.dataset_length, f"the checkpoint at step {step}")
        except StoreError as error:
            problems.append(f"{error.what}: {error.found}")
    tied = {a.step for a in ledger.artifacts.values() if a.path.startswith(f"{CHECKPOINTS}/")}
    for step in sorted(tied - set(ledger.checkpoints)):
        problems.append(f"the checkpoint at step {step} was never completed (a crash; resuming removes its files)")
    return problems
