"""Samples of several training runs on one scale, and what such a scale needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import (
    ArtifactStore,
    CurvatureSnapshot,
    GradientSnapshot,
    InfluenceFunction,
    InfluenceModule,
    MultiStage,
    Proximity,
    QueryError,
    SmallProximity,
    StageLinker,
)
from lightning_influence.curvature import recorded_curvature
from lightning_influence.gradients import Dense
from tests.callbacks.fits import WARNINGS
from tests.two_stages import Finetuned, Network, begun, data, fit, rows

pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in WARNINGS),
    pytest.mark.filterwarnings("ignore:The model was far from a stationary point"),
]
PRE, MIDDLE, LAST, ASKED = data(20, 3, 0), data(16, 2, 1), data(12, 2, 2), data(4, 2, 3)
ENCODER, HEAD = ("encoder.0.weight", "encoder.0.bias"), ("head.weight", "head.bias")
LAM = 0.05


def recorded(folder: Path) -> tuple[GradientSnapshot, CurvatureSnapshot]:
    return GradientSnapshot(folder, "all"), CurvatureSnapshot(folder)


class Chain:
    """Pretraining; a head trained on the fixed encoder; both tuned further."""

    def __init__(self, root: Path) -> None:
        self.root = root
        torch.manual_seed(0)
        self.first = Network(3).double()
        fit(root, self.first, PRE, *recorded(root / "first"))
        self.middle = begun(self.first, frozen=True)
        linker = StageLinker(root / "middle", pretrain=root / "first")
        fit(root, self.middle, MIDDLE, linker, *recorded(root / "middle"))
        self.last = Finetuned().double()
        self.last.load_state_dict(self.middle.state_dict())
        fit(root, self.last, LAST, StageLinker(root / "last", pretrain=root / "middle"), *recorded(root / "last"))

    def influence(self, form: Any = None, **options: Any) -> InfluenceModule:
        solved = InfluenceFunction("ekfac", damping=LAM)
        inner = MultiStage(solved, finetuned=solved, module=self.first)
        method = MultiStage(
            inner, form, finetuned=solved, module=self.middle, train_loader=DataLoader(MIDDLE, 4), **options
        )
        return InfluenceModule(self.last, self.root / "last", method, train_loader=DataLoader(LAST, 4))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))


def all_scores(ranking: Any, length: int) -> Tensor:
    """(Q, N) of an attribution with k = N."""
    found: Tensor = torch.zeros_like(ranking.scores).scatter(1, ranking.sample_ids, ranking.scores)
    assert found.shape[1] == length
    return found


def solve(store: ArtifactStore, module: Any, v: Tensor, held: dict[str, float], names: tuple[str, ...]) -> Tensor:
    """(H + λ + diag(held))⁻¹ v by the matrix of the stored curvature's products."""
    curvature = recorded_curvature(store).curvature
    sizes = [module.get_parameter(name).numel() for name in names]
    eye = torch.eye(sum(sizes), dtype=v.dtype)
    named = {
        name: Dense(part.reshape(-1, *module.get_parameter(name).shape))
        for name, part in zip(names, eye.split(sizes, 1), strict=True)
    }
    product = curvature.matvec(named)
    matrix = torch.cat([product[name].dense().flatten(1) for name in names], 1)
    shifts = [torch.full((size,), LAM + held.get(name, 0.0)) for name, size in zip(names, sizes, strict=True)]
    return torch.linalg.solve(matrix + torch.diag(torch.cat(shifts).to(matrix)), v.T).T


def test_three_runs_with_a_frozen_one_in_the_middle(chain):
    """Each run's scores by explicit matrices: the last two by their own solve of what was pulled back to them."""
    influence, alpha = chain.influence(Proximity(0.1)), 0.1
    mixed = influence.mixed(ASKED.tensors, k=20)
    last, middle, first = (
        all_scores(run.proponents, len(dataset)) for run, dataset in zip(mixed.runs, (LAST, MIDDLE, PRE), strict=True)
    )
    names = (*ENCODER, *HEAD)
    shared = ArtifactStore.open(chain.root / "last").link
    assert shared is not None and set(shared.shared) == set(names) and shared.frozen == ()
    held, own = dict.fromkeys(names, 2 * alpha), rows(chain.last, ASKED)
    x = solve(ArtifactStore.open(chain.root / "last"), chain.last, own, held, names)
    torch.testing.assert_close(last, x @ rows(chain.last, LAST).T / len(LAST), rtol=1e-5, atol=1e-7)
    size = sum(chain.middle.get_parameter(name).numel() for name in ENCODER)
    moved = solve(ArtifactStore.open(chain.root / "middle"), chain.middle, 2 * alpha * x[:, size:], {}, HEAD)
    trained = rows(chain.middle, MIDDLE)[:, size:]
    torch.testing.assert_close(middle, moved @ trained.T / len(MIDDLE), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(first, influence.scores(ASKED.tensors) / len(PRE), rtol=1e-5, atol=1e-7)
    amounts = torch.stack([scores.abs().sum(1) for scores in (last, middle, first)], 1)
    torch.testing.assert_close(mixed.amounts, amounts, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(mixed.shares, amounts / amounts.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)
    assert "3" not in repr(mixed).partition("queries")[0] and repr(mixed).count("%") == 3


def test_of_a_frozen_start_only_the_head_pulls_in_finetuning(chain):
    solved = InfluenceFunction("ekfac", damping=LAM)
    influence = InfluenceModule(
        chain.middle, chain.root / "middle", MultiStage(solved, finetuned=solved), train_loader=DataLoader(MIDDLE, 4)
    )
    mixed = influence.mixed(ASKED.tensors, k=16)
    size = sum(chain.middle.get_parameter(name).numel() for name in ENCODER)
    x = solve(ArtifactStore.open(chain.root / "middle"), chain.middle, rows(chain.middle, ASKED)[:, size:], {}, HEAD)
    expected = x @ rows(chain.middle, MIDDLE)[:, size:].T / len(MIDDLE)
    torch.testing.assert_close(all_scores(mixed.finetuning.proponents, 16), expected, rtol=1e-5, atol=1e-7)


def test_more_samples_than_a_run_has_are_all_of_them(chain):
    mixed = chain.influence(Proximity(0.1)).mixed(ASKED.tensors, k=1000)
    assert [run.proponents.scores.shape[1] for run in mixed.runs] == [12, 16, 20]


def test_a_curvature_of_the_encoder_alone_says_nothing_of_what_the_head_pulls(tmp_path):
    torch.manual_seed(0)
    first = Network(3).double()
    fit(tmp_path, first, PRE, *recorded(tmp_path / "first"), epochs=1)
    module = begun(first)
    snapshots = GradientSnapshot(tmp_path / "fine", "all"), CurvatureSnapshot(tmp_path / "fine", parameters="encoder.*")
    fit(tmp_path, module, MIDDLE, StageLinker(tmp_path / "fine", pretrain=tmp_path / "first"), *snapshots, epochs=1)
    influence = InfluenceModule(module, tmp_path / "fine", MultiStage(InfluenceFunction("ekfac")))
    assert influence.scores(ASKED.tensors).shape == (4, 20)  # the encoder's own answer is all that this needs
    with pytest.raises(QueryError, match=r"cannot answer for head\.weight, head\.bias"):
        influence.mixed(ASKED.tensors)


def test_gradients_that_are_missing_are_named(tmp_path):
    torch.manual_seed(0)
    first = Network(3).double()
    fit(tmp_path, first, PRE, *recorded(tmp_path / "first"), epochs=1)
    for name, snapshots in (("none", ()), ("head", (GradientSnapshot(tmp_path / "head", "last_layer"),))):
        module = begun(first)
        linker = StageLinker(tmp_path / name, pretrain=tmp_path / "first")
        fit(tmp_path, module, MIDDLE, linker, CurvatureSnapshot(tmp_path / name), *snapshots, epochs=1)
        influence = InfluenceModule(module, tmp_path / name, MultiStage(InfluenceFunction("ekfac")))
        with pytest.raises(QueryError, match="the finetuning run's store holds no gradients of") as refused:
            influence.mixed(ASKED.tensors)
        assert "GradientSnapshot(parameters='all')" in str(refused.value)


def test_scales_that_are_none_are_refused(chain):
    plain = InfluenceModule(chain.first, chain.root / "first", InfluenceFunction("ekfac"))
    with pytest.raises(QueryError, match="one training run to attribute to"):
        plain.mixed(ASKED.tensors)
    with pytest.raises(QueryError, match="only rank"):
        chain.influence(SmallProximity()).mixed(ASKED.tensors)
    for k in (0, -1, 2.5, "3"):
        with pytest.raises(QueryError, match="k must be positive"):
            chain.influence(Proximity(0.1)).mixed(ASKED.tensors, k=k)


def test_a_run_in_the_middle_needs_its_module_and_a_frozen_one_its_data(chain):
    solved = InfluenceFunction("ekfac", damping=LAM)
    for options, message in (
        ({}, "the module of every run but the first"),
        ({"module": chain.middle}, "the shared parameters stayed frozen"),
    ):
        method = MultiStage(MultiStage(solved), Proximity(0.1), **options)
        influence = InfluenceModule(chain.last, chain.root / "last", method, train_loader=DataLoader(LAST, 4))
        for ask in (influence.scores, influence.mixed):
            with pytest.raises(QueryError, match=message):
                ask(ASKED.tensors)
