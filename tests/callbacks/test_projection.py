"""Projected gradients from a real fit: what lies in the store, what is refused, and what queries make of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence import (
    ArtifactStore,
    CurvatureSnapshot,
    DataInf,
    FactorProjection,
    GradientSnapshot,
    InfluenceFunction,
    InfluenceModule,
    ProjectedGram,
    RandomProjection,
    Relative,
    TracIn,
    TracInWE,
)
from lightning_influence.artifacts import StepRange
from lightning_influence.callbacks import opening
from lightning_influence.curvature import recorded_curvature
from lightning_influence.errors import QueryError, StoreError, UnsupportedError
from lightning_influence.gradients import Dense, Projection, unpack
from tests.callbacks.fits import (
    WARNINGS,
    Classifier,
    Texts,
    WeightsBefore,
    dense,
    fit,
    loader,
    padded,
    seeded,
    singles,
    state_hash,
    stored,
    truth,
)

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
NAMES = ["words.weight", "hidden.weight", "hidden.bias", "head.weight", "head.bias"]
PROJECTIONS = [RandomProjection(7, seed=4), FactorProjection(2, seed=4), FactorProjection(64)]


def snapshot(root: Path, projection: Projection | None, **options: Any) -> GradientSnapshot:
    return GradientSnapshot(root / "store", "all", projection=projection, **{"dtype": "float64", **options})


def projected(projection: Projection, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    found = projection.apply({name: Dense(value) for name, value in gradients.items()})
    return {name: block.dense() for name, block in found.items()}


def asked() -> Any:
    return padded([Texts(16)[position] for position in (13, 14, 15)])


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_replay(tmp_path: Path, projection: Projection) -> None:
    module = seeded(Classifier)
    callback = snapshot(tmp_path, projection)
    run = fit(tmp_path, module, callback, precision="64-true")
    store = ArtifactStore.open(tmp_path / "store")
    assert store.manifest.settings["projection"] == projection.record()
    assert "projection" in callback.state_key and run.global_step == 8
    for index, checkpoint in enumerate(store.checkpoints()):
        wanted = projected(projection, truth(module, store.weights(checkpoint), singles(Texts()), NAMES))
        for name in NAMES:
            assert wanted[name].shape[1:] == projection.shape(store.manifest.parameters[name].shape)
            torch.testing.assert_close(stored(store, name, index), wanted[name], **CLOSE)


def test_training_is_bit_identical_and_the_store_small(tmp_path: Path) -> None:
    plain = state_hash(fit(tmp_path, seeded(Classifier)))
    sizes = {}
    for projection in (None, RandomProjection(2), FactorProjection(1)):
        callback = snapshot(tmp_path / str(projection), projection, dtype="float32")
        assert state_hash(fit(tmp_path, seeded(Classifier), callback)) == plain
        store = callback.artifacts
        estimate: Any = store.manifest.facts["estimate"]
        held = sum(
            block.nbytes() for shard in store.shards(store.checkpoints()[0]) for block in unpack(shard.tensors).values()
        )
        sizes[projection] = held
        if projection is not None:
            assert estimate["gradient_bytes"] == held + 24 * 13  # and the records
    assert sizes[RandomProjection(2)] == 13 * 4 * 2 * 5 and sizes[FactorProjection(1)] == 13 * 4 * 5
    assert sizes[RandomProjection(2)] < sizes[None] / 4


@pytest.mark.parametrize("projection", PROJECTIONS[:2], ids=str)
def test_in_flight(tmp_path: Path, projection: Projection) -> None:
    module, before = seeded(Classifier), WeightsBefore()
    callback = snapshot(tmp_path, projection, mode="in_flight")
    fit(tmp_path, module, callback, before, precision="64-true", max_epochs=1)
    store, scores = callback.artifacts, torch.zeros(3, 13, dtype=torch.float64)
    (checkpoint, *_), query = store.checkpoints(), [padded([Texts(16)[position]]) for position in (13, 14, 15)]
    mine = projected(projection, truth(module, store.weights(checkpoint), query, NAMES))
    for shard in store.shards(StepRange(0, 1 << 40)):
        rows = {name: dense(shard, name) for name in NAMES}
        for row, (position, step) in enumerate(
            zip(shard.sample_ids.tolist(), shard.records["step"].tolist(), strict=True)
        ):
            wanted = projected(projection, truth(module, before.at[step - 1], singles(Texts(), [position]), NAMES))
            weight = float(shard.records["rates"][row].sum() / shard.records["batch_size"][row])
            for name in NAMES:
                torch.testing.assert_close(rows[name][row], wanted[name][0], **CLOSE)
                scores[:, position] += weight * (mine[name].flatten(1) @ wanted[name][0].flatten())
    torch.testing.assert_close(InfluenceModule(module, store, TracIn()).scores(asked()), scores, **CLOSE)


def test_shards_do_not_depend_on_batch_size_or_shard_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for batch_size, batches in ((1, 3), (4, 1), (13, 1)):
        monkeypatch.setattr(opening, "shard_size", lambda *_, size=batch_size * batches: size)
        for projection in PROJECTIONS[:2]:
            callback = snapshot(tmp_path / f"{batch_size}-{projection.kind}", projection)
            callback.dataloader = loader(batch_size=batch_size, shuffle=False)
            fit(tmp_path, seeded(Classifier), callback, precision="64-true", max_epochs=1)
            found.append(torch.cat([stored(callback.artifacts, name).flatten(1) for name in NAMES], 1))
    for other in (found[2], found[4]):
        torch.testing.assert_close(other, found[0], **CLOSE)
    for other in (found[3], found[5]):
        torch.testing.assert_close(other, found[1], **CLOSE)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_queries(tmp_path: Path, projection: Projection) -> None:
    """<P T g_q, P g_z> for every T: rates, the optimizer's preconditioner, inverse curvature before and after P."""
    module = seeded(lambda: Classifier("adam"))
    callback = snapshot(tmp_path, projection)
    fit(tmp_path, module, callback, precision="64-true")
    store = ArtifactStore.open(tmp_path / "store")
    ones = [padded([Texts(16)[position]]) for position in (13, 14, 15)]
    plain, conditioned = torch.zeros(3, 13).double(), torch.zeros(3, 13).double()
    own = torch.zeros(13).double()
    for checkpoint in store.checkpoints():
        weights, scales = store.weights(checkpoint), store.preconditioner(checkpoint)
        z = projected(projection, truth(module, weights, singles(Texts()), NAMES))
        q = truth(module, weights, ones, NAMES)
        for name in NAMES:
            rate, both = checkpoint.learning_rate(name), []
            for query in (q[name], q[name] / scales[name]):
                both.append(rate * projected(projection, {name: query})[name].flatten(1) @ z[name].flatten(1).T)
            plain, conditioned = plain + both[0], conditioned + both[1]
            own += rate * z[name].flatten(1).square().sum(1)

    def influence(estimator: Any) -> InfluenceModule:
        return InfluenceModule(copy.deepcopy(module), store, estimator)

    torch.testing.assert_close(influence(TracIn()).scores(asked()), plain, **CLOSE)
    torch.testing.assert_close(influence(TracIn()).self_influence(), own, **CLOSE)
    torch.testing.assert_close(influence(TracIn(preconditioner="optimizer")).scores(asked()), conditioned, **CLOSE)
    with pytest.raises(QueryError, match=r"(?s)self-influence cannot be told from projected.*HINT"):
        influence(TracIn(preconditioner="optimizer")).self_influence()
    best = influence(TracIn()).query(asked(), k=3)
    assert torch.equal(best.proponents.sample_ids, plain.sort(1, descending=True).indices[:, :3])
    for statistics in (ProjectedGram(), DataInf()):
        scores = influence(InfluenceFunction(statistics, damping=0.1)).scores(asked())
        layers = [("words.weight",), ("hidden.weight", "hidden.bias"), ("head.weight", "head.bias")]
        wanted = torch.zeros(3, 13).double()
        for names in layers:
            rows = torch.cat([z[name].flatten(1) for name in names], 1)
            ask = torch.cat([projected(projection, {n: q[n]})[n].flatten(1) for n in names], 1)
            unit = 0.1 * torch.eye(rows.shape[1]).double()
            if isinstance(statistics, ProjectedGram):
                inverse = torch.linalg.inv(rows.T @ rows / 13 + unit)
            else:
                inverse = torch.stack([torch.linalg.inv(torch.outer(g, g) + unit) for g in rows]).mean(0)
            wanted += ask @ inverse @ rows.T
        torch.testing.assert_close(scores, wanted, **CLOSE)


@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
def test_a_curvature_of_whole_gradients_comes_before_the_projection(tmp_path: Path) -> None:
    projection, module = FactorProjection(2), seeded(Classifier)
    callback = snapshot(tmp_path, projection)
    fit(tmp_path, module, callback, CurvatureSnapshot(tmp_path / "store"), precision="64-true")
    store = ArtifactStore.open(tmp_path / "store")
    found = recorded_curvature(store)
    weights = store.weights(found.at)
    z = projected(projection, truth(module, weights, singles(Texts()), NAMES))
    query = truth(module, weights, [padded([Texts(16)[position]]) for position in (13, 14, 15)], NAMES)
    solved = found.curvature.solve({name: Dense(value) for name, value in query.items()}, Relative())
    after = projection.apply(solved)
    wanted = sum(after[name].dense().flatten(1) @ z[name].flatten(1).T for name in NAMES)
    influence = InfluenceModule(module, store, InfluenceFunction("ekfac"))
    torch.testing.assert_close(influence.scores(asked()), wanted, **CLOSE)
    with pytest.raises(QueryError, match="self-influence cannot be told from projected"):
        influence.self_influence()


def test_words_are_refused(tmp_path: Path) -> None:
    module = seeded(Classifier)
    callback = snapshot(tmp_path, FactorProjection(2))
    fit(tmp_path, module, callback, max_epochs=1, precision="64-true")
    with pytest.raises(QueryError, match=r"(?s)TracInWE matches words.*FactorProjection.*HINT.*TracIn\(\)"):
        InfluenceModule(module, callback.artifacts, TracInWE()).scores(asked())
    for estimator in (TracIn("words.*"), InfluenceFunction(ProjectedGram())):
        influence = InfluenceModule(module, callback.artifacts, estimator)
        with pytest.raises(QueryError, match=r"(?s)no words.*projected by FactorProjection"):
            influence.words(asked(), [[0], [1], [2]])


def test_another_projection_cannot_go_on_with_a_store(tmp_path: Path) -> None:
    first = snapshot(tmp_path, FactorProjection(2))
    fit(tmp_path, seeded(Classifier), first, precision="64-true", max_epochs=1)
    for other in (None, FactorProjection(3), FactorProjection(2, seed=1), RandomProjection(2)):
        manifest = copy.copy(first.artifacts.manifest)
        settings = {k: v for k, v in manifest.settings.items() if k != "projection"}
        object.__setattr__(
            manifest, "settings", settings if other is None else {**settings, "projection": other.record()}
        )
        with pytest.raises(StoreError, match=r"the setting 'projection' differs"):
            ArtifactStore.resume(tmp_path / "store", manifest, 4)


def test_arguments(tmp_path: Path) -> None:
    for wrong in (16, "random", FactorProjection, {"rank": 3}):
        with pytest.raises(UnsupportedError, match="this is no projection"):
            GradientSnapshot(tmp_path, projection=wrong)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="top_words has no use"):
        GradientSnapshot(tmp_path, projection=FactorProjection(2), top_words=5)
    assert "projection" not in GradientSnapshot(tmp_path).state_key
    first, second = (GradientSnapshot(tmp_path, projection=FactorProjection(rank)) for rank in (2, 3))
    assert first.state_key != second.state_key
