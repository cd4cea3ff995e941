"""GradientSnapshot on two processes: training unchanged on both, and one store that does not show who wrote it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_influence import ArtifactStore, GradientSnapshot, InfluenceModule, TracIn
from lightning_influence.artifacts import Shard, StepRange
from lightning_influence.callbacks import replay_recorder
from lightning_influence.gradients import unpack
from tests.distributed.launches import SMALL
from tests.distributed.model import BATCH, EPOCHS, SAMPLES, STORED, Classifier, Sentences, collate, loader, trainer

ROOT = Path(__file__).parents[2]
MODES = ("replay", "in_flight")
PADDED = SAMPLES + SAMPLES % 2  # DistributedSampler repeats a sample to give both ranks as many


def launch(folder: Path, *launches: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests/distributed/launches.py"), str(folder), *launches],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pair of processes fits eight times."""
    folder = tmp_path_factory.mktemp("ddp")
    strategies = ("ddp", "ddp_find_unused_parameters_true")
    fits = [f"{strategy}:{what}" for strategy in strategies for what in ("plain", *MODES)]
    launch(folder, *fits, "ddp:resumed", "ddp:refusals")  # the last one, because it ends the connection of the two
    return folder


def outcome(folder: Path, name: str, rank: int, end: int = EPOCHS) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}-{end}-rank{rank}.json").read_text())
    return found


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
@pytest.mark.parametrize("mode", MODES)
def test_training_is_bit_identical_on_both_ranks(folder: Path, strategy: str, mode: str) -> None:
    for rank in range(2):
        plain, watched = outcome(folder, f"{strategy}-plain", rank), outcome(folder, f"{strategy}-{mode}", rank)
        assert plain["end"] == watched["end"]
        assert plain["steps"] == watched["steps"]
    assert outcome(folder, f"{strategy}-{mode}", 0)["end"]["weights"] == watched["end"]["weights"]
    assert outcome(folder, f"{strategy}-{mode}", 0)["end"]["torch"] != watched["end"]["torch"]


@pytest.mark.parametrize("mode", MODES)
def test_store_lies_where_rank_zero_says(folder: Path, mode: str) -> None:
    assert sorted(p.name for p in folder.glob(f"ddp-{mode}*") if p.is_dir()) == [f"ddp-{mode}"]
    store = ArtifactStore.open(folder / f"ddp-{mode}")
    assert store.verify() == []
    assert {a.rank for a in store.artifacts()} == {0, 1}


class Copying(Classifier):
    """Has the weights of another run at the end of its epochs; trains on nothing in earnest."""

    source: ArtifactStore

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for checkpoint in self.source.checkpoints():
            if checkpoint.step == self.trainer.global_step:
                self.load_state_dict(self.source.weights(checkpoint))


def test_replay_store_is_that_of_one_process(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_recorder, "_SHARD_BYTES", SMALL)
    theirs = ArtifactStore.open(folder / "ddp-replay")
    batches = -(-PADDED // 2 // BATCH)
    snapshot = GradientSnapshot(tmp_path / "one", ["word_embeddings", "last_layer"])
    one = trainer(snapshot, accumulate_grad_batches=2, limit_train_batches=batches)
    copying = Copying()
    copying.source = theirs
    one.fit(copying, loader(shuffle=True))
    ours = ArtifactStore.open(tmp_path / "one")
    assert len(ours.checkpoints()) == EPOCHS and ours.verify() == []
    assert [c.to_json() for c in ours.checkpoints()] == [c.to_json() for c in theirs.checkpoints()]
    assert [(a.path, a.sha256) for a in ours.artifacts()] == [(a.path, a.sha256) for a in theirs.artifacts()]
    for artifact in ours.artifacts():
        assert (ours.root / artifact.path).read_bytes() == (theirs.root / artifact.path).read_bytes()
    spans = {a.span: a.rank for a in theirs.artifacts("gradients")}
    assert len(spans) > 2 and set(spans.values()) == {0, 1}, "both ranks wrote"
    assert ours.manifest.shard_size == theirs.manifest.shard_size
    assert ours.manifest.parameters == theirs.manifest.parameters
    assert ours.manifest.dataset_fingerprint == theirs.manifest.dataset_fingerprint


def records(store: ArtifactStore) -> list[tuple[int, Shard]]:
    """(rank, chunk), in the order of the batches of each rank."""
    chunks = [shard for shard in store.shards(StepRange(0, 1 << 40))]
    ranks = [a.rank for a in sorted(store.artifacts("in_flight"), key=lambda a: (a.mark, a.rank))]
    return list(zip(ranks, chunks, strict=True))


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_in_flight_records_are_what_the_ranks_used(folder: Path, strategy: str) -> None:
    store = ArtifactStore.open(folder / f"{strategy}-in_flight")
    used, found = defaultdict(list), defaultdict(list)
    for rank in range(2):
        for number, step in enumerate(outcome(folder, f"{strategy}-in_flight", rank)["steps"], start=1):
            for ids in step["ids"]:
                used[rank] += [(number, i, step["rate"], len(ids) * 2 * 2) for i in ids]  # accumulation, ranks
    for rank, chunk in records(store):
        columns = chunk.sample_ids, chunk.records["step"], chunk.records["rates"], chunk.records["batch_size"]
        assert columns[2].shape == (chunk.num_samples, 1)
        for i, step, (rate,), size in zip(*(column.tolist() for column in columns), strict=True):
            found[rank].append((step, i, rate, size))
    assert found == used
    for epoch in range(EPOCHS):
        half = PADDED // 2
        handed_out = [i for rank in range(2) for _, i, *_ in found[rank][epoch * half : (epoch + 1) * half]]
        assert len(handed_out) == PADDED and set(handed_out) == set(range(SAMPLES))
    assert all(len(found[rank]) == EPOCHS * PADDED // 2 for rank in range(2))


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_in_flight_records_sum_to_the_reduced_gradient(folder: Path, strategy: str) -> None:
    store = ArtifactStore.open(folder / f"{strategy}-in_flight")
    steps = outcome(folder, f"{strategy}-in_flight", 0)["steps"]
    assert steps[-1]["gradients"] == outcome(folder, f"{strategy}-in_flight", 1)["steps"][-1]["gradients"]
    for name in STORED:
        reduced = torch.tensor([step["gradients"][name] for step in steps])
        summed, size = torch.zeros_like(reduced, dtype=torch.float64), torch.zeros(len(steps), dtype=torch.float64)
        for _, chunk in records(store):
            rows = unpack(chunk.tensors)[name].dense().double()
            share = chunk.records["batch_size"].reshape(-1, *[1] * (rows.ndim - 1))
            summed.index_add_(0, chunk.records["step"] - 1, rows / share)
            size.index_add_(0, chunk.records["step"] - 1, (rows / share).flatten(1).norm(dim=1))
        assert (((summed - reduced).flatten(1).norm(dim=1) / size) < 1e-6).all(), name


@pytest.mark.parametrize("mode", MODES)
def test_merged_store_answers_queries(folder: Path, mode: str) -> None:
    store = ArtifactStore.open(folder / f"ddp-{mode}")
    module: LightningModule = Classifier()
    influence = InfluenceModule(module, store, TracIn(), k=3)
    scores = influence.scores(collate([Sentences()[i] for i in range(4)]))
    assert scores.shape == (4, SAMPLES) and bool(scores.isfinite().all())
    assert bool((scores.abs().sum(0) > 0).all()), "every sample was seen by one of the ranks"


def test_resumed_fit_goes_on_with_the_records_of_both_ranks(folder: Path) -> None:
    store = ArtifactStore.open(folder / "ddp-resumed")
    assert store.verify() == [] and len(store.checkpoints()) == 1 + EPOCHS
    assert sorted(p.name for p in folder.glob("ddp-resumed*") if p.is_dir()) == ["ddp-resumed"]
    for rank in range(2):
        steps = [step for end in (1, 2) for step in outcome(folder, "ddp-resumed", rank, end)["steps"]]
        used = [i for step in steps for ids in step["ids"] for i in ids]
        assert [i for r, chunk in records(store) if r == rank for i in chunk.sample_ids.tolist()] == used


def test_rank_zero_refusing_a_folder_ends_both_ranks(folder: Path) -> None:
    said = [(folder / f"refused-rank{rank}.txt").read_text() for rank in range(2)]
    assert said[0].startswith("StoreError") and "is not empty" in said[0]
    assert said[1].startswith(("RuntimeError", "DistBackendError")) and "closed by peer" in said[1]
    assert [p.name for p in (folder / "full").iterdir()] == ["notes.txt"]


def test_forked_and_spawned_processes(tmp_path: Path) -> None:
    launches = {"ddp_fork": "replay", "ddp_spawn": "in_flight"}
    launch(tmp_path, *(f"{strategy}:{mode}" for strategy, mode in launches.items()))
    for strategy, mode in launches.items():
        store = ArtifactStore.open(tmp_path / f"{strategy}-{mode}")
        assert store.verify() == [] and {a.rank for a in store.artifacts()} == {0, 1}
        assert len(store.checkpoints()) == EPOCHS + (mode == "in_flight")
    for rank in range(2):
        forked, spawned = (outcome(tmp_path, f"{strategy}-{mode}", rank) for strategy, mode in launches.items())
        assert forked == spawned
