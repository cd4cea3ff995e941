"""Reading a store: checkpoints, weights, optimizer records and gradients, each file checked first."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from lightning_influence.artifacts.disk import free_bytes
from lightning_influence.artifacts.journal import Journal, ranks
from lightning_influence.artifacts.json_values import Fields
from lightning_influence.artifacts.ledger import Ledger, check_coverage, read_ledger
from lightning_influence.artifacts.manifest import MANIFEST, Manifest
from lightning_influence.artifacts.records import Artifact, Checkpoint, StepRange
from lightning_influence.artifacts.shard import DYNAMICS, Shard, open_shard
from lightning_influence.artifacts.stage_link import LINK, StageLink
from lightning_influence.artifacts.tensor_files import TensorFile
from lightning_influence.artifacts.verification import problems_of
from lightning_influence.artifacts.weights import frozen_files, join
from lightning_influence.errors import StoreError


class StoreReader:
    """What has been committed to the store at ``root`` by now; it may still be written by others."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root, self._manifest = root, manifest
        self._lock = threading.RLock()
        self._cache: tuple[tuple[object, ...], Ledger] | None = None
        self._ledger()  # a damaged journal is refused at once

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The committed checkpoints in the order of their steps."""
        return self._ledger().ordered_checkpoints()

    def artifacts(self, kind: str | None = None) -> tuple[Artifact, ...]:
        """The committed files, of one kind or all, ordered by step and path."""
        found = (a for a in self._ledger().artifacts.values() if kind is None or a.kind == kind)
        return tuple(sorted(found, key=lambda artifact: (artifact.step, artifact.path)))

    def weights(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """The model's whole state_dict: trained and frozen tensors, tied names sharing one tensor.

        Entries that were not tensors are not in it (``artifacts("weights")[i].meta["left_out"]`` names them).
        """
        return join(self._one(checkpoint, "weights"), self._file)

    def preconditioner(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """√v̂+ε of every parameter that an Adam-like optimizer updates, shaped like the parameter.

        Raises:
            StoreError: the checkpoint has none.
        """
        return self._file(self._one(checkpoint, "optimizer").path).read()

    def curvature(self, artifact: Artifact) -> dict[str, Tensor]:
        """The tensors of a curvature file, one of `artifacts("curvature")`."""
        return self._file(artifact.path).read()

    def tensors(self, artifact: Artifact) -> dict[str, Tensor]:
        """The tensors of a committed file, whatever its kind."""
        return self._file(artifact.path).read()

    def dynamics(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Loss, margin and true-class probability of every sample, each (N,), NaN where not recorded."""
        joined: dict[str, Tensor] = {}
        for shard in self.shards(checkpoint):
            for name in DYNAMICS:
                if name not in shard.records:
                    continue
                values = shard.records[name]
                if name not in joined:
                    wide = torch.promote_types(values.dtype, torch.float32)
                    joined[name] = torch.full((self.manifest.dataset_length,), torch.nan, dtype=wide)
                joined[name][shard.sample_ids] = values.to(joined[name].dtype)
        return joined

    def shards(self, at: Checkpoint | StepRange) -> tuple[Shard, ...]:
        """The gradients at a checkpoint, by position, or of a range of steps, by (mark, rank).

        Only headers are read here; tensors are read, and their file's checksum compared, when they are asked
        for.

        Raises:
            StoreError: the shards of a checkpoint do not cover the training set exactly once; a file is
                missing, truncated or no safetensors file; the store holds no gradients of this kind; a chunk
                lies on both sides of the range's end.
        """
        ledger = self._ledger()
        if isinstance(at, Checkpoint):
            self._known(at)
            where = f"the checkpoint at step {at.step}"
            found = ledger.at(at.step, "gradients")
            if not found:
                raise self._nothing("replayed gradients", where, "in-flight gradients are read by a StepRange")
            found = check_coverage(found, self.manifest.dataset_length, where)
        else:
            chunks = [a for a in ledger.artifacts.values() if a.kind == "in_flight"]
            if not chunks:
                raise self._nothing("in-flight gradients", "any step", "replayed gradients are read by a Checkpoint")
            chunks = [a for a in chunks if _first_step(a) <= at.through and a.step > at.after]
            found = tuple(sorted(chunks, key=lambda chunk: (chunk.mark, chunk.rank)))
            for chunk in found:
                first = _first_step(chunk)
                if first <= at.after or chunk.step > at.through:
                    raise StoreError(
                        f"{chunk.path} lies on both sides of the end of a range of steps",
                        expected=f"ranges that end where chunks end, here after step {chunk.step}",
                        found=f"steps {first} to {chunk.step}, the range ({at.after}, {at.through}]",
                        hint="take the steps of the store's checkpoints as the ends of the ranges",
                    )
        return tuple(open_shard(self._file(a.path), a, self.manifest.dataset_length) for a in found)

    @property
    def identity(self) -> str:
        """What this store is by content, wherever it lies: 64 hex digits over its model, its training set and its last
        weights. Curvatures and gradients that are added later do not change it.

        Raises:
            StoreError: there is no checkpoint yet.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            raise self._nothing("final weights", "any step", "let its fit reach a checkpoint")
        weights = self._one(checkpoints[-1], "weights")
        held = self._ledger().artifacts
        files = [weights.sha256, *(held[path].sha256 for path in sorted(frozen_files(weights)) if path in held)]
        manifest = self.manifest
        model = {name: [*spec.shape, spec.dtype] for name, spec in manifest.parameters.items()}
        about = [manifest.dataset_length, manifest.dataset_fingerprint, model, checkpoints[-1].step, files]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    @property
    def link(self) -> StageLink | None:
        """The pretraining run that this one began from, where a `StageLinker` has said so.

        Raises:
            StoreError: what it said is damaged.
        """
        record = self.manifest.facts.get(LINK)
        try:
            return None if record is None else StageLink.from_json(record)
        except ValueError as error:
            raise StoreError(
                f"the link in {self.root / MANIFEST} is damaged",
                expected="what StageLinker wrote",
                found=str(error),
                hint="restore the store from a copy",
            ) from error

    def verify(self) -> list[str]:
        """Every problem of the store, one sentence each, all checksums computed anew; [] if whole."""
        return problems_of(self.root, self.manifest)

    def free_bytes(self) -> int:
        """Bytes that may still be written on the store's disk."""
        return free_bytes(self.root)

    def require_free(self, needed: int, what: str = "the gradients", less: str = "top_words, a 16-bit dtype") -> None:
        """StoreError if fewer than ``needed`` bytes may still be written; ``less``: what would need fewer."""
        if self.free_bytes() < needed:
            raise StoreError(
                f"too little space for {what} at {self.root}",
                expected=f"{needed:,} bytes free",
                found=f"{self.free_bytes():,} bytes free",
                hint=f"free some space, choose another folder, or store less ({less})",
            )

    def _ledger(self) -> Ledger:
        """The journals as they are now; read anew only when one has changed."""
        with self._lock:
            status = [(rank, os.lstat(Journal(self.root, rank).path)) for rank in ranks(self.root)]
            state = tuple((rank, s.st_ino, s.st_size, s.st_mtime_ns) for rank, s in status)
            if self._cache is None or self._cache[0] != state:
                self._cache = (state, read_ledger(self.root))
            return self._cache[1]

    def _known(self, checkpoint: Checkpoint) -> None:
        if checkpoint.step not in self._ledger().checkpoints:
            steps = sorted(self._ledger().checkpoints)
            raise StoreError(
                f"the store at {self.root} has no checkpoint at step {checkpoint.step}",
                expected=f"one of the steps {steps}",
                found=checkpoint.step,
                hint="take the checkpoints from `store.checkpoints()`",
            )

    def _one(self, checkpoint: Checkpoint, kind: str) -> Artifact:
        self._known(checkpoint)
        found = self._ledger().at(checkpoint.step, kind)
        if len(found) != 1:
            hint = "preconditioners are stored for Adam-like optimizers only" if kind == "optimizer" else "run verify()"
            raise self._nothing(kind, f"the checkpoint at step {checkpoint.step}", hint)
        return found[0]

    def _file(self, path: str) -> TensorFile:
        artifact = self._ledger().artifacts.get(path)
        if artifact is None:
            raise self._nothing(path, "any step", "a file that the store refers to was never committed; run verify()")
        return TensorFile(self.root, path, size=artifact.bytes, sha256=artifact.sha256)

    def _nothing(self, what: str, where: str, hint: str) -> StoreError:
        kinds = sorted({artifact.kind for artifact in self._ledger().artifacts.values()})
        return StoreError(
            f"the store at {self.root} has no {what} at {where}",
            expected=what,
            found=f"files of the kinds {', '.join(kinds) or '(none)'}, mode {self.manifest.mode!r}",
            hint=hint,
        )


def _first_step(chunk: Artifact) -> int:
    return Fields(chunk.meta).integer("first_step") if "first_step" in chunk.meta else chunk.step
