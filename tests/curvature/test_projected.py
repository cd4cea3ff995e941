"""The Gram matrix of projected gradients against its formula: from a store, from the model, through an estimator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence import FactorProjection, InfluenceFunction, ProjectedGram, RandomProjection, TracIn
from lightning_influence.attribution import self_influence
from lightning_influence.curvature import Absolute, BlockDiagonal, Curvature, ProjectedCurvature, StoredEvidence
from lightning_influence.errors import CurvatureError, QueryError, StoreError
from lightning_influence.estimators import Stage
from lightning_influence.gradients import Dense, Projection
from lightning_influence.gradients import blocks as room
from tests.curvature.stored_fit import ASKED, LAYERS, TRAIN, Fit, dense, flat

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
PROJECTIONS = [None, RandomProjection(9, seed=1), FactorProjection(2), FactorProjection(40)]
DECAY = 0.05


@pytest.fixture(scope="module")
def fit() -> Fit:
    return Fit()


def truth(
    fit: Fit, projection: Projection | None, layers: Any = LAYERS, damping: Any = None, decay: float = 0
) -> Tensor:
    """sum over layers of phi(q)ᵀ (Φᵀ Φ / N + wd I + λ I)⁻¹ phi(z), (Q, N)."""
    scores = torch.zeros(len(ASKED), len(TRAIN), dtype=torch.float64)
    for names in layers:
        z, q = flat(fit.train, names, projection), flat(fit.query, names, projection)
        gram = z.T @ z / len(z)
        shift = 0.1 * gram.diagonal().mean() if damping is None else damping
        scores += q @ torch.linalg.inv(gram + (shift + decay) * torch.eye(len(gram), dtype=torch.float64)) @ z.T
    return scores


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_scores_from_a_store(tmp_path: Path, fit: Fit, projection: Projection | None) -> None:
    """No model is at hand but for the queries, and no training data."""
    store = fit.store(tmp_path, projection)
    for damping in (None, 1e-3):
        found = fit.scores(store, InfluenceFunction(ProjectedGram(), damping=damping))
        torch.testing.assert_close(found, truth(fit, projection, damping=damping), **CLOSE)
    whole = InfluenceFunction(ProjectedGram(per="model"), damping=0.01)
    found = fit.scores(store, whole)
    torch.testing.assert_close(found, truth(fit, projection, [tuple(fit.names)], 0.01), **CLOSE)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_weight_decay_and_self_influence(tmp_path: Path, fit: Fit, projection: Projection | None) -> None:
    store = fit.store(tmp_path, projection, DECAY)
    estimator = InfluenceFunction(ProjectedGram(projection), damping=0.01)
    found = fit.scores(store, estimator)
    torch.testing.assert_close(found, truth(fit, projection, damping=0.01, decay=DECAY), **CLOSE)
    own = torch.zeros(len(TRAIN), dtype=torch.float64)
    for names in LAYERS:
        z = flat(fit.train, names, projection)
        gram = z.T @ z / len(z) + (0.01 + DECAY) * torch.eye(z.shape[1], dtype=torch.float64)
        own += ((z @ torch.linalg.inv(gram)) * z).sum(1)
    torch.testing.assert_close(self_influence(Stage(store), estimator), own, **CLOSE)


def test_some_parameters_and_other_shards(tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    projection, found = FactorProjection(2), []
    for size in (1, 5, 14):
        store = fit.store(tmp_path / str(size), projection, shard_size=size)
        for chunk in (1 << 24, 20):
            with monkeypatch.context() as patch:
                patch.setattr(room, "CHUNK_ELEMENTS", chunk)
                estimator = InfluenceFunction(ProjectedGram(), damping=0.01, parameters="h*")
                found.append(fit.scores(store, estimator))
    for scores in found:
        torch.testing.assert_close(scores, truth(fit, projection, LAYERS[1:], 0.01), **CLOSE)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_on_gradients_as_they_are(tmp_path: Path, fit: Fit, projection: Projection | None) -> None:
    """An unprojected store: Pᵀ (G + λ)⁻¹ P, from the store, and the same from the model."""
    store = fit.store(tmp_path, None)
    estimator = InfluenceFunction(ProjectedGram(projection), damping=0.01)
    wanted = truth(fit, projection, damping=0.01)
    torch.testing.assert_close(fit.scores(store, estimator), wanted, **CLOSE)
    for batch_size in (3, 14):
        evidence = fit.evidence(batch_size)
        curvature = ProjectedGram(projection).collect(evidence)
        for again in (curvature, stored(curvature)):
            solved = again.solve(dense(fit.query), Absolute(0.01))
            scores = sum(solved[n].dense().flatten(1) @ fit.train[n].flatten(1).T for n in fit.names)
            torch.testing.assert_close(scores, wanted, **CLOSE)


def stored(curvature: Curvature) -> Curvature:
    """As it comes back from a store."""
    tensors, config = curvature.state()
    return Curvature.kinds[curvature.kind].load(tensors, config)


def test_a_curvature_of_the_same_projection_acts_within(tmp_path: Path, fit: Fit) -> None:
    projection = FactorProjection(2)
    store = fit.store(tmp_path, projection)
    evidence = StoredEvidence(store, store.checkpoints()[-1], tuple(fit.names))
    inner = ProjectedGram().collect(evidence)
    assert isinstance(inner, BlockDiagonal)
    curvature = ProjectedCurvature(inner, projection, evidence.shapes)
    assert curvature.within(FactorProjection(2)) is inner and curvature.within(FactorProjection(2, seed=1)) is None
    assert curvature.parameters == tuple(fit.names)
    product = curvature.matvec(dense(fit.query))
    for names in LAYERS:
        z, q = flat(fit.train, names, projection), flat(fit.query, names, projection)
        sizes = [flat(fit.query, [name], projection).shape[1] for name in names]
        for name, part in zip(names, (q @ z.T @ z / len(z)).split(sizes, 1), strict=True):
            shape = projection.shape(fit.query[name].shape[1:])
            back = projection.lift({name: Dense(part.reshape(-1, *shape))}, evidence.shapes)[name].dense()
            torch.testing.assert_close(product[name].dense(), back, **CLOSE)
    with pytest.raises(StoreError, match="unknown form"):
        tensors, config = curvature.state()
        ProjectedCurvature.load(tensors, {**config, "inner": {**config["inner"], "kind": "unheard of"}})


def test_what_is_refused(tmp_path: Path, fit: Fit) -> None:
    store = fit.store(tmp_path / "projected", FactorProjection(2))
    with pytest.raises(CurvatureError, match=r"(?s)projected otherwise.*FactorProjection\(rank=2"):
        fit.scores(store, InfluenceFunction(ProjectedGram(FactorProjection(3))))
    with pytest.raises(CurvatureError, match=r"(?s)does not fit.*at most 5"):
        fit.scores(store, InfluenceFunction(ProjectedGram(at_most=5)))
    with pytest.raises(CurvatureError, match="cannot be inverted"):
        fit.scores(store, InfluenceFunction(ProjectedGram(per="model"), damping=0.0))
    with pytest.raises(CurvatureError, match="this is no projection"):
        ProjectedGram(16)  # type: ignore[arg-type]
    with pytest.raises(CurvatureError, match="unknown size of blocks"):
        ProjectedGram(per="head")  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="estimated from the training data"):
        fit.scores(store, InfluenceFunction(ProjectedGram(), labels="sampled"))
    with pytest.raises(QueryError, match="names what is not known"):
        fit.scores(store, InfluenceFunction(ProjectedGram(), parameters="tail.*"))
    assert ProjectedGram(FactorProjection(3)).settings() == {
        "projection": {"kind": "factor", "rank": 3, "seed": 0},
        "per": "layer",
        "at_most": 8192,
    }


def test_a_full_rank_projection_is_the_fisher(tmp_path: Path, fit: Fit) -> None:
    """and so TracIn and influence of such a store are those of an unprojected one."""
    whole, same = fit.store(tmp_path / "a", None), fit.store(tmp_path / "b", FactorProjection(40))
    for estimator in (TracIn(), InfluenceFunction(ProjectedGram(), damping=0.1)):
        first, second = (fit.scores(store, estimator) for store in (whole, same))
        torch.testing.assert_close(first, second, **CLOSE)
