"""The folder on disk where a fit leaves what later queries need: weights, gradients, rates, records.

    manifest.json                                       what the store is about
    manifest-rank00000.jsonl                            the commits of one rank, a line each
    checkpoints/step=00000120/weights.safetensors       trained tensors and buffers
    checkpoints/step=00000120/optimizer.safetensors     √v̂+ε of Adam-like optimizers
    checkpoints/step=00000120/curvature-ekfac.safetensors   curvature at these weights
    checkpoints/step=00000120/gradients-00000.safetensors   replayed gradients, a shard of dataset positions
    frozen/<16 hex>.safetensors                         frozen tensors, once for all checkpoints
    in_flight/rank00000/chunk-00000024.safetensors      gradients captured while training

A file is written under a temporary name, forced to the disk and renamed; it belongs to the store only once a
journal line says so. Every path is checked to stay inside the folder, and only safetensors are ever read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.artifacts.disk import check_size, make_folders, temporary_name, writing
from lightning_influence.artifacts.journal import Journal, ranks
from lightning_influence.artifacts.json_values import Json, plain
from lightning_influence.artifacts.ledger import Ledger, artifact_record, check_coverage, checkpoint_record
from lightning_influence.artifacts.manifest import MANIFEST, Manifest, read_manifest, refuse_difference, write_manifest
from lightning_influence.artifacts.paths import FROZEN, checkpoint_folder, inside, local_folder, rank_folder
from lightning_influence.artifacts.reader import StoreReader
from lightning_influence.artifacts.records import Artifact, Checkpoint
from lightning_influence.artifacts.resume import bring_back
from lightning_influence.artifacts.shard import SAMPLE_IDS, check_rows
from lightning_influence.artifacts.stage_link import LINK, StageLink
from lightning_influence.artifacts.tensor_files import write_tensors
from lightning_influence.artifacts.weights import FrozenTensors, frozen_files, lay_out, weights_meta
from lightning_influence.errors import StoreError


class ArtifactStore(StoreReader):
    """Weights, gradients and their records of one fit; made by `create`, `open` or `resume`.

    Writing calls may come from a background thread. With several processes, rank zero creates (or resumes)
    first, the others after a barrier, and a second barrier stands before the first write.
    """

    def __init__(self, root: Path, manifest: Manifest, rank: int | None) -> None:
        super().__init__(root, manifest)
        self._rank = rank
        self._frozen = FrozenTensors(self.artifacts("frozen"))
        self._frozen_written: dict[str, Artifact] = {}
        self._committed = {a.path: a.sha256 for a in self.artifacts() if a.rank == rank}

    @classmethod
    def create(cls, root: str | os.PathLike[str], manifest: Manifest, rank: int = 0) -> ArtifactStore:
        """A new store in an empty or missing folder; ranks above zero join the one of rank zero.

        Raises:
            StoreError: the folder is not empty, not local, or cannot be written; a rank joins another run's
                store.
        """
        folder = local_folder(root)
        _refuse_file(folder)
        if rank == 0:
            leftover = temporary_name(folder / MANIFEST, 0).name
            present = sorted(set(os.listdir(folder)) - {leftover}) if folder.exists() else []
            if present:
                raise StoreError(
                    f"the folder {folder} is not empty",
                    expected="an empty or new folder, or a fit that resumes from a Lightning checkpoint",
                    found=", ".join(present[:5]) + (f" and {len(present) - 5} more" if len(present) > 5 else ""),
                    hint="pass ckpt_path to resume its fit, choose another folder, or delete this one",
                )
            with writing(folder):
                make_folders(folder)
            write_manifest(folder, manifest)
        else:
            refuse_difference(folder, read_manifest(folder), manifest)
        journal = Journal(folder, rank)
        if rank in ranks(folder):
            raise StoreError(
                f"rank {rank} already has records in the store at {folder}",
                expected="a store that rank zero has just created",
                found=journal.path.name,
                hint="let rank zero create the store first, with a barrier before the other ranks join",
            )
        journal.replace([])
        return cls(folder, manifest, rank)

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> ArtifactStore:
        """A store for reading, at its last commit; one that is still being written may be open too.

        Raises:
            StoreError: nothing there, not a store, damaged, another schema version, or not a local folder.
        """
        folder = local_folder(root)
        _refuse_file(folder)
        if not folder.exists():
            raise StoreError(
                f"there is no artifact store at {folder}",
                expected=f"a folder with a {MANIFEST}",
                found="no such folder",
                hint="give the folder that the callback printed at the start of the fit",
            )
        return cls(folder, read_manifest(folder), None)

    @classmethod
    def resume(
        cls,
        root: str | os.PathLike[str],
        manifest: Manifest,
        mark: int | None,
        rank: int = 0,
        world_size: int | None = None,
    ) -> ArtifactStore:
        """The store of an earlier run, brought back to the moment when every rank had seen ``mark`` batches.

        Records after ``mark`` belong to steps that will be trained again: they are dropped, as are
        checkpoints that were never completed and files of interrupted writes. ``mark=0`` starts over;
        ``mark=None`` keeps all that is complete (to add to a finished fit). ``world_size`` lets rank zero
        clean up after ranks that are no more.

        Raises:
            StoreError: no store there; it belongs to another run (the first difference is named); this rank
                holds fewer records than ``mark`` requires; a file that must stay is missing.
        """
        folder = local_folder(root)
        _refuse_file(folder)
        return cls(folder, bring_back(folder, manifest, mark, rank, world_size), rank)

    @property
    def rank(self) -> int:
        """The rank that writes through this object; zero where it only reads."""
        return self._rank or 0

    def write(
        self,
        kind: str,
        path: str,
        tensors: Mapping[str, Tensor],
        *,
        step: int,
        mark: int,
        meta: Mapping[str, Json] | None = None,
    ) -> Artifact:
        """Write one safetensors file. It belongs to the store only after `commit`.

        Raises:
            StoreError: the store is open for reading; the path leads outside or is committed already; a
                tensor cannot be stored; the disk is full (the temporary file is removed, what was committed
                stays).
        """
        rank = self._writer()
        target = inside(self.root, path)
        if target.suffix != ".safetensors" or path in self._committed:
            raise StoreError(
                f"{path} cannot be written into the store at {self.root}",
                expected="a new file whose name ends in .safetensors",
                found="a committed file" if path in self._committed else "another ending",
                hint="committed files never change; resume the store to drop records",
            )
        artifact = Artifact(path, kind, step, mark, 0, "", meta or {}, rank)  # refuses its meta data first
        size, sha256 = write_tensors(target, tensors, rank)
        return replace(artifact, bytes=size, sha256=sha256)

    def write_weights(
        self, step: int, mark: int, state_dict: Mapping[str, Any], frozen_names: Collection[str] = ()
    ) -> list[Artifact]:
        """Write a module's state_dict; returns the files to commit with the checkpoint.

        Tied tensors are stored once; tensors in ``frozen_names`` once for all checkpoints, by content.
        Entries that are not tensors are left out with a warning.
        """
        layout = lay_out(state_dict, frozen_names, self._frozen)
        if layout.new_frozen:
            digests = {name: layout.digests[name] for name in layout.new_frozen}
            name = hashlib.sha256("".join(sorted(digests.values())).encode()).hexdigest()[:16]
            path = f"{FROZEN}/{name}.safetensors"
            artifact = self.write("frozen", path, layout.new_frozen, step=step, mark=mark, meta={"digests": digests})
            self._frozen.add(artifact)
            self._frozen_written[path] = artifact
        meta = weights_meta(layout, self._frozen)
        weights = self.write(
            "weights",
            f"{checkpoint_folder(step)}/weights.safetensors",
            layout.own,
            step=step,
            mark=mark,
            meta=meta,
        )
        written = [self._frozen_written[path] for path in sorted(frozen_files(weights)) if path in self._frozen_written]
        return [*(a for a in written if a.path not in self._committed), weights]

    def write_preconditioner(self, step: int, mark: int, tensors: Mapping[str, Tensor]) -> Artifact:
        """Write √v̂+ε by parameter name."""
        path = f"{checkpoint_folder(step)}/optimizer.safetensors"
        return self.write("optimizer", path, tensors, step=step, mark=mark)

    def write_curvature(
        self, at: Checkpoint, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Json]
    ) -> Artifact:
        """Write a curvature of the weights of a checkpoint."""
        path = f"{checkpoint_folder(at.step)}/curvature-{name}.safetensors"
        return self.write("curvature", path, tensors, step=at.step, mark=at.mark, meta=meta)

    def write_gradients(
        self,
        step: int,
        mark: int,
        span: tuple[int, int],
        tensors: Mapping[str, Tensor],
        records: Mapping[str, Tensor] | None = None,
        meta: Mapping[str, Json] | None = None,
    ) -> Artifact:
        """Write the replayed gradients of the positions [start, stop): one shard of the manifest's size.

        Args:
            tensors: packed gradients, names with ``|``.
            records: other tensors with one row per sample (loss, margin, probability, ...), plain names.
        """
        start, stop = span
        size, length = self.manifest.shard_size, self.manifest.dataset_length
        if not 0 <= start < stop or start % size or stop != min(start + size, length):
            raise StoreError(
                f"the positions {start} to {stop} are no shard of this store",
                expected=f"multiples of {size}, cut at {length}",
                found=f"[{start}, {stop})",
                hint="shards go by dataset position, whatever the number of processes",
            )
        ids = torch.arange(start, stop)
        check_rows(records or {}, tensors, ids)
        return self.write(
            "gradients",
            f"{checkpoint_folder(step)}/gradients-{start // size:05d}.safetensors",
            {**tensors, **(records or {}), SAMPLE_IDS: ids},
            step=step,
            mark=mark,
            meta={**(meta or {}), "span": [start, stop]},
        )

    def write_in_flight(
        self,
        steps: tuple[int, int],
        mark: int,
        batches: int,
        sample_ids: Tensor,
        tensors: Mapping[str, Tensor],
        records: Mapping[str, Tensor] | None = None,
        meta: Mapping[str, Json] | None = None,
    ) -> Artifact:
        """Write gradients captured while training: the ``batches`` batches up to ``mark`` on this rank.

        Args:
            steps: optimizer steps of the chunk's first and last record.
            sample_ids: (N,) int64 dataset positions; a sample may occur more than once.
            tensors, records: as for `write_gradients`.

        Chunks are read by whole ranges of steps: end one at every checkpoint of the store, and one at every
        Lightning checkpoint, where a resumed fit must find them.
        """
        if not 0 < batches <= mark or steps[0] > steps[1]:
            raise ValueError(f"a chunk of {batches} batches up to {mark}, steps {steps[0]} to {steps[1]}")
        check_rows(records or {}, tensors, sample_ids)
        return self.write(
            "in_flight",
            f"{rank_folder(self.rank)}/chunk-{mark - batches:08d}.safetensors",
            {**tensors, **(records or {}), SAMPLE_IDS: sample_ids},
            step=steps[1],
            mark=mark,
            meta={**(meta or {}), "batches": batches, "first_step": steps[0]},
        )

    def commit(self, *artifacts: Artifact) -> None:
        """Make written files part of the store: one journal line each, together, forced to the disk."""
        self._append(artifacts, [])

    def commit_checkpoint(self, checkpoint: Checkpoint, artifacts: Sequence[Artifact]) -> None:
        """Make a checkpoint exist, with rank zero's own files of it; called after every rank's commits.

        Raises:
            StoreError: not rank zero; the step is committed already; its weights or frozen tensors are
                missing; its gradients, if it has any, do not cover the training set exactly once.
        """
        self._only_rank_zero("commits checkpoints")
        with self._lock:
            ledger = self._ledger()
            if checkpoint.step in ledger.checkpoints:
                raise StoreError(
                    f"the checkpoint at step {checkpoint.step} is committed already",
                    expected="one checkpoint for a step",
                    found="a second one",
                    hint="snapshot at most once for an optimizer step",
                )
            whole = Ledger({**ledger.artifacts, **{a.path: a for a in artifacts}}, ledger.checkpoints)
            weights = whole.at(checkpoint.step, "weights")
            missing = [f for a in weights for f in frozen_files(a) if f not in whole.artifacts]
            if len(weights) != 1 or missing:
                raise StoreError(
                    f"the checkpoint at step {checkpoint.step} is not complete",
                    expected="its weights and the frozen tensors that they refer to",
                    found=f"no {missing[0]}" if missing else f"{len(weights)} weights files",
                    hint="commit every file that write_weights returned",
                )
            if shards := whole.at(checkpoint.step, "gradients"):
                check_coverage(shards, self.manifest.dataset_length, f"the checkpoint at step {checkpoint.step}")
            self._append(artifacts, [checkpoint])

    def record(self, key: str, value: Json) -> None:
        """Keep a small fact (overhead, staleness, bytes) in the manifest; rank zero only."""
        self._only_rank_zero("records facts")
        with self._lock:
            manifest = self._manifest.with_fact(key, plain(value, f"the fact {key!r}"))
            write_manifest(self.root, manifest)
            self._manifest = manifest

    def record_link(self, link: StageLink) -> None:
        """Keep what the run says of the one that it began from; rank zero only."""
        self.record(LINK, link.to_json())

    def _append(self, artifacts: Sequence[Artifact], checkpoints: Sequence[Checkpoint]) -> None:
        rank = self._writer()
        with self._lock:
            fresh = {a.path: a for a in artifacts if self._committed.get(a.path) != a.sha256}
            for artifact in fresh.values():
                check_size(self.root, artifact.path, artifact.bytes)
                if artifact.rank != rank or artifact.path in self._committed:
                    raise StoreError(
                        f"{artifact.path} cannot be committed by rank {rank}",
                        expected="a file that this rank has written and not committed before",
                        found=f"a file of rank {artifact.rank}",
                        hint="every rank commits its own files, once",
                    )
            lines = [artifact_record(a) for a in fresh.values()] + [checkpoint_record(c) for c in checkpoints]
            if lines:
                Journal(self.root, rank).append(lines)
            self._committed |= {path: artifact.sha256 for path, artifact in fresh.items()}

    def _writer(self) -> int:
        if self._rank is None:
            raise StoreError(
                f"the store at {self.root} is open for reading only",
                expected="a store from ArtifactStore.create or ArtifactStore.resume",
                found="one from ArtifactStore.open",
                hint="resume with mark=None to add to a finished store",
            )
        return self._rank

    def _only_rank_zero(self, what: str) -> None:
        if self._writer() != 0:
            raise StoreError(
                f"rank {self._rank} {what}",
                expected="rank 0",
                found=f"rank {self._rank}",
                hint="guard the call with trainer.is_global_zero",
            )

    def __repr__(self) -> str:
        writes = "reading" if self._rank is None else f"rank {self._rank}"
        return f"ArtifactStore({str(self.root)!r}, {writes}, {len(self.checkpoints())} checkpoints)"


def _refuse_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise StoreError(
            f"{folder} is not a folder",
            expected="the folder of an artifact store",
            found="a file",
            hint="give the folder that holds the manifest.json",
        )
