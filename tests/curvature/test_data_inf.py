"""DataInf against a loop over samples with explicit inverses, from stored gradients and from the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence import DataInf, FactorProjection, InfluenceFunction, RandomProjection
from lightning_influence.attribution import self_influence
from lightning_influence.curvature import Absolute, DataInfCurvature, Relative, StoredEvidence, data_inf
from lightning_influence.errors import CurvatureError, QueryError
from lightning_influence.estimators import Stage
from lightning_influence.gradients import Projection, blocks
from tests.curvature.stored_fit import ASKED, LAYERS, TRAIN, Fit, dense, flat
from tests.gradients.test_projection import FORMS, draw
from tests.stores import loader_of

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
DECAYS = {"hidden.weight": 0.3, "head.bias": 0.1}
PROJECTIONS = [None, RandomProjection(9, seed=1), FactorProjection(2)]


@pytest.fixture(scope="module")
def fit() -> Fit:
    return Fit()


def truth(fit: Fit, projection: Projection | None, damping: float | None, decay: float = 0.0) -> Tensor:
    """(1/N) sum over i of q (g_i g_iᵀ + (λ + wd) I)⁻¹ z, layer by layer, (Q, N)."""
    scores = torch.zeros(len(ASKED), len(TRAIN), dtype=torch.float64)
    for names in LAYERS:
        z, q = flat(fit.train, names, projection), flat(fit.query, names, projection)
        shift = decay + (0.1 * float(z.square().sum(1).mean()) / z.shape[1] if damping is None else damping)
        for g in z:
            inverse = torch.linalg.inv(torch.outer(g, g) + shift * torch.eye(len(g), dtype=torch.float64))
            scores += q @ inverse @ z.T / len(z)
    return scores


@pytest.mark.parametrize("damping", [None, 1e-3, 2.0])
@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_scores_from_a_store(tmp_path: Path, fit: Fit, projection: Projection | None, damping: float | None) -> None:
    """The paper's own damping is the default: a tenth of the mean squared norm over the number of weights."""
    found = fit.scores(fit.store(tmp_path, projection), InfluenceFunction(DataInf(), damping=damping))
    torch.testing.assert_close(found, truth(fit, projection, damping), **CLOSE)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_weight_decay_and_self_influence(tmp_path: Path, fit: Fit, projection: Projection | None) -> None:
    store = fit.store(tmp_path, projection, 0.05)
    for damping in (0.01, 0.0):  # weight decay is enough
        estimator = InfluenceFunction(DataInf(), damping=damping)
        torch.testing.assert_close(fit.scores(store, estimator), truth(fit, projection, damping, 0.05), **CLOSE)
    asked = copy.copy(fit)
    asked.query = fit.train
    own = torch.zeros(len(TRAIN), dtype=torch.float64)
    for names in LAYERS:
        z = flat(fit.train, names, projection)
        for g in z:
            inverse = torch.linalg.inv(torch.outer(g, g) + 0.05 * torch.eye(len(g), dtype=torch.float64))
            own += ((z @ inverse) * z).sum(1) / len(z)
    torch.testing.assert_close(self_influence(Stage(store), estimator), own, **CLOSE)


def test_shards_and_chunks_change_nothing(tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 5, 14):
        store = fit.store(tmp_path / str(size), None, shard_size=size)
        for chunk in (1 << 24, 20):
            with monkeypatch.context() as patch:
                patch.setattr(blocks, "CHUNK_ELEMENTS", chunk)
                found = fit.scores(store, InfluenceFunction(DataInf(), damping=0.01))
            torch.testing.assert_close(found, truth(fit, None, 0.01), **CLOSE)


@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
def test_from_the_model_where_the_store_has_no_gradients(tmp_path: Path, fit: Fit) -> None:
    for batch_size in (1, 4, 14):
        curvature = DataInf().collect(fit.evidence(batch_size))
        assert curvature.needs_model
        solved = curvature.solve(dense(fit.query), Relative())
        scores = sum(solved[n].dense().flatten(1) @ fit.train[n].flatten(1).T for n in fit.names)
        torch.testing.assert_close(scores, truth(fit, None, None), **CLOSE)
    some = fit.store(tmp_path, None, parameters=["h*"])  # training data stream by: all parameters are wanted
    estimator = InfluenceFunction(DataInf(), damping=0.01)
    stage = Stage(some, copy.deepcopy(fit.module), loader_of(TRAIN), stored=False)
    (term,) = estimator.terms(stage)
    assert set(term.parameters) == set(fit.names)
    weights = {name: value.clone() for name, value in stage.module.state_dict().items()}  # type: ignore[union-attr]
    solved = term.transform(dense(fit.query))
    scores = sum(solved[n].dense().flatten(1) @ fit.train[n].flatten(1).T for n in fit.names)
    torch.testing.assert_close(scores, truth(fit, None, 0.01), **CLOSE)
    assert all(torch.equal(weights[n], v) for n, v in stage.module.state_dict().items())  # type: ignore[union-attr]


def diagonal(fit: Fit, names: tuple[str, ...]) -> Tensor:
    """DECAYS of every weight, laid end to end."""
    return torch.cat([torch.full_like(fit.train[name][0].flatten(), DECAYS.get(name, 0.0)) for name in names])


def test_products(tmp_path: Path, fit: Fit) -> None:
    store = fit.store(tmp_path, None)
    curvature = (
        DataInf()
        .collect(StoredEvidence(store, store.checkpoints()[-1], tuple(fit.names)))
        .decayed({"hidden.weight": 0.3, "head.bias": 0.1})
    )
    product = curvature.matvec(dense(fit.query))
    for names in LAYERS:
        z, q = flat(fit.train, names, None), flat(fit.query, names, None)
        decay = torch.cat(
            [torch.full((fit.train[n][0].numel(),), DECAYS.get(n, 0.0), dtype=torch.float64) for n in names]
        )
        torch.testing.assert_close(
            torch.cat([product[n].dense().flatten(1) for n in names], 1), q @ z.T @ z / len(z) + q * decay, **CLOSE
        )
    z = flat(fit.train, ["hidden.weight"], None)
    part = curvature.matvec(dense(fit.query), rows=["hidden.bias"], columns=["hidden.weight"])
    wanted = flat(fit.query, ["hidden.weight"], None) @ z.T @ fit.train["hidden.bias"] / len(z)
    torch.testing.assert_close(part["hidden.bias"].dense(), wanted, **CLOSE)
    assert set(part) == {"hidden.bias"}
    with pytest.raises(CurvatureError, match=r"no entries between head\.bias and hidden\.weight"):
        curvature.matvec(dense(fit.query), rows=["head.bias"], columns=["hidden.weight"])
    with pytest.raises(CurvatureError, match="holds nothing for 'tail'"):
        curvature.matvec(dense(fit.query), rows=["tail"])


def test_decays_that_differ_within_a_layer(tmp_path: Path, fit: Fit) -> None:
    store = fit.store(tmp_path, None)
    evidence = StoredEvidence(store, store.checkpoints()[-1], tuple(fit.names))
    solved = DataInf().collect(evidence).decayed(DECAYS).solve(dense(fit.query), Absolute(0.2))
    for names in LAYERS:
        z, q = flat(fit.train, names, None), flat(fit.query, names, None)
        shift = torch.cat(
            [torch.full((fit.train[n][0].numel(),), 0.2 + DECAYS.get(n, 0.0), dtype=torch.float64) for n in names]
        )
        wanted = sum(q @ torch.linalg.inv(torch.outer(g, g) + shift.diag()) for g in z) / len(z)
        torch.testing.assert_close(torch.cat([solved[n].dense().flatten(1) for n in names], 1), wanted, **CLOSE)


def test_far_from_the_inverse_where_gradients_agree_and_near_where_damping_is_large(tmp_path: Path, fit: Fit) -> None:
    """What the method gives up: the inverse of the mean is not the mean of the inverses."""
    store = fit.store(tmp_path, None)

    def error(damping: float) -> float:
        exact = torch.zeros(len(ASKED), len(TRAIN), dtype=torch.float64)
        for names in LAYERS:
            z, q = flat(fit.train, names, None), flat(fit.query, names, None)
            exact += q @ torch.linalg.inv(z.T @ z / len(z) + damping * torch.eye(z.shape[1]).double()) @ z.T
        found = fit.scores(store, InfluenceFunction(DataInf(), damping=damping))
        return float((found - exact).norm() / exact.norm())

    assert error(100.0) < 1e-3 < 0.1 < error(0.01)


def test_what_is_refused(tmp_path: Path, fit: Fit) -> None:
    store = fit.store(tmp_path / "store", None)
    evidence = StoredEvidence(store, store.checkpoints()[-1], tuple(fit.names))
    curvature = DataInf().collect(evidence)
    for damping in (Absolute(0.0), Relative(0.0)):
        with pytest.raises(CurvatureError, match="divides by the damping"):
            curvature.solve(dense(fit.query), damping)
    with pytest.raises(CurvatureError, match=r"(?s)one block.*gradients of hidden\.bias too"):
        curvature.solve(dense(fit.query, ["hidden.weight"]), Absolute(0.1))
    with pytest.raises(CurvatureError, match=r"(?s)not stored.*HINT.*GradientSnapshot"):
        curvature.state()
    with pytest.raises(CurvatureError, match="not stored"):
        DataInfCurvature.load({}, {})
    with pytest.raises(CurvatureError, match=r"(?s)one gradient from each sample.*observed"):
        DataInf().collect(fit.evidence(4, "exact"))
    with pytest.raises(QueryError, match="estimated from the training data"):
        fit.scores(store, InfluenceFunction(DataInf(), labels="exact"))


def test_weighted_sums(fit: Fit) -> None:
    for form, make in FORMS.items():
        block: Any = make()
        weights = draw(4, 6, seed=9)
        wanted = torch.einsum("qn,n...->q...", weights, block.dense())
        torch.testing.assert_close(data_inf.weighted_sum(block, weights), wanted, msg=form, **CLOSE)
