"""CurvatureSnapshot on two processes: training unchanged on both, and curvatures as one process makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_influence import ArtifactStore
from lightning_influence.artifacts import StepRange
from lightning_influence.curvature import Curvature, Diagonal, TrainingEvidence, recorded_curvature, statistics_of
from lightning_influence.fitted import weights_at
from lightning_influence.gradients import Dense, select, unpack
from lightning_influence.replay import TrainingData
from tests.distributed.model import SAMPLES, Classifier, loader
from tests.distributed.test_snapshot import PADDED, launch

WHAT = ("plain", "curvature", "curvature_in_flight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pair of processes fits three times."""
    folder = tmp_path_factory.mktemp("ddp")
    launch(folder, *(f"curvature:{what}" for what in WHAT))
    return folder


def outcome(folder: Path, what: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{what}-rank{rank}.json").read_text())
    return found


@pytest.mark.parametrize("what", WHAT[1:])
def test_training_is_bit_identical_on_both_ranks(folder: Path, what: str) -> None:
    for rank in range(2):
        plain, watched = outcome(folder, "plain", rank), outcome(folder, what, rank)
        assert plain["end"] == watched["end"] and plain["steps"] == watched["steps"]


@pytest.mark.parametrize("what", WHAT[1:])
def test_one_store_where_rank_zero_says_with_each_curvature_once(folder: Path, what: str) -> None:
    assert [p.name for p in folder.glob(f"{what}*") if p.is_dir() and p.name.split("-")[0] == what] == [what]
    store = ArtifactStore.open(folder / what)
    assert store.verify() == []
    files = store.artifacts("curvature")
    assert {file.rank for file in files} == {0}
    found = [(file.step, file.meta["name"]) for file in files]
    assert found == (
        [(3, "diagonal"), (4, "ekfac"), (6, "diagonal"), (6, "ekfac")] if what == "curvature" else [(6, "diagonal")]
    )
    if what == "curvature":
        assert {file.step for file in store.artifacts("gradients")} == {3, 4, 6}
        assert set(store.manifest.facts["curvature_overhead"]) == {"ekfac", "diagonal"}  # type: ignore[arg-type]


def alone(store: ArtifactStore, name: str, step: int) -> tuple[Curvature, TrainingEvidence]:
    """The same estimate, at the same weights, in this one process."""
    settings: dict[str, Any] = {"labels": "sampled", "seed": 5} if name == "ekfac" else {"at_most": 21, "batch_size": 3}
    module = Classifier().double()
    (at,) = (c for c in store.checkpoints() if c.step == step)
    with weights_at(module, store, at):
        evidence = TrainingEvidence(module, select(module, "all"), TrainingData.of(loader()), **settings)
        return statistics_of(name).collect(evidence), evidence


def products(curvature: Curvature) -> dict[str, torch.Tensor]:
    """With the same random vectors: eigenvectors may differ by signs, and in a degenerate space by more."""
    draw = torch.Generator().manual_seed(2)
    shapes = {name: tuple(p.shape) for name, p in Classifier().named_parameters()}
    vectors = {n: Dense(torch.randn(4, *s, generator=draw, dtype=torch.float64)) for n, s in shapes.items()}
    return {name: block.dense() for name, block in curvature.matvec(vectors).items()}


@pytest.mark.parametrize(("name", "step"), [("ekfac", 4), ("ekfac", 6), ("diagonal", 3), ("diagonal", 6)])
def test_curvatures_are_those_of_one_process(folder: Path, name: str, step: int) -> None:
    store = ArtifactStore.open(folder / "curvature")
    (at,) = (c for c in store.checkpoints() if c.step == step)
    found = recorded_curvature(store, name, at)
    expected, evidence = alone(store, name, step)
    assert (found.num_samples, found.labels) == (evidence.num_samples, evidence.labels)
    assert (found.num_samples, found.labels) == ((SAMPLES, "sampled") if name == "ekfac" else (21, "exact"))
    ours, theirs = products(found.curvature), products(expected)
    for parameter, product in theirs.items():
        torch.testing.assert_close(ours[parameter], product, rtol=1e-10, atol=1e-12)
    tensors, _ = expected.state()
    (file,) = (f for f in store.artifacts("curvature") if (f.step, f.meta["name"]) == (step, name))
    for key, tensor in store.curvature(file).items():
        if key.endswith(("eigenvalues", "diagonal")):
            torch.testing.assert_close(tensor, tensors[key], rtol=1e-10, atol=1e-12)


def test_in_flight_the_batches_of_both_ranks_are_added(folder: Path) -> None:
    """Beside it, in the same backward passes, every gradient was stored."""
    store = ArtifactStore.open(folder / "curvature_in_flight")
    (file,) = store.artifacts("curvature")
    shards = store.shards(StepRange(0, 1 << 40))
    count = sum(shard.num_samples for shard in shards)
    assert file.meta["num_samples"] == count == 2 * PADDED
    found = store.curvature(file)
    for number, name in enumerate(file.meta["parameters"]):  # type: ignore[arg-type, var-annotated]
        squares = sum(unpack(shard.tensors)[str(name)].dense().square().sum(0) for shard in shards)
        torch.testing.assert_close(found[f"{number}.diagonal"], squares / count, rtol=1e-10, atol=1e-14)
    assert Diagonal.name == file.meta["name"]
