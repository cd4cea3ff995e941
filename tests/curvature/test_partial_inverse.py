"""Inverses on a part of the parameters against dense least squares, and what is true of what they leave over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature import (
    EKFAC,
    Absolute,
    DataInf,
    Dense,
    Freezing,
    Generalized,
    LowRank,
    MatrixFree,
    PartialInverse,
    Projected,
    ProjectedGram,
    Relative,
    SecondOrder,
    Solver,
    Whole,
)
from lightning_influence.errors import CaptureError, CurvatureError
from lightning_influence.gradients import FactorProjection, TargetParameters, chosen_units
from tests import reference
from tests.curvature.settings import (
    classified,
    draws,
    evidence,
    flat,
    matrix_of,
    model,
    shapes_of,
    vectors,
)

EXACT = Solver("minres", tolerance=1e-14, max_iterations=2000)
UNDAMPED = Absolute(0.0)
# The tolerance of EXACT lies at the rounding errors, which some solves do not come below.
pytestmark = pytest.mark.filterwarnings("ignore:.*stopped before its tolerance")
HESSIAN = MatrixFree("hessian", "minres", tolerance=1e-13)


def network() -> Any:
    return model(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


class Setting:
    """A small network with an indefinite Hessian, its matrix written out, and target parameters. Without decay the
    Hessian of a softmax is singular."""

    def __init__(self, statistics: Any = HESSIAN, decay: float = 0.02, seed: int = 0, ratio: float = 0.4) -> None:
        self.module = network()
        self.dataset: TensorDataset = classified(draws(24, 4, seed=seed), seed=seed + 5)
        self.shapes = shapes_of(self.module, [name for name, _ in self.module.named_parameters()])
        rates = dict.fromkeys(self.shapes, decay) if decay else {}
        self.curvature = statistics.collect(evidence(self.module, self.dataset)).decayed(rates)
        self.matrix = matrix_of(self.curvature, self.shapes)
        generator = torch.Generator().manual_seed(seed)
        self.target = chosen_units(
            self.module,
            ratio,
            lambda layer: torch.rand({"network.0": 5, "network.2": 3}[layer], generator=generator),
            {},
        )
        self.inside = self.target.flat(self.shapes)
        self.g = vectors(self.shapes, 2, seed=seed + 1)

    def damped(self, damping: Any) -> Tensor:
        """H + λI, λ by parameter."""
        shifts = self.curvature.shifts(damping)
        parts = [torch.full(shape, shifts[name], dtype=torch.float64).flatten() for name, shape in self.shapes.items()]
        return self.matrix + torch.diag(torch.cat(parts))

    def flat(self, v: Any, count: int = 2) -> Tensor:
        zeros = {name: torch.zeros(count, *shape, dtype=torch.float64) for name, shape in self.shapes.items()}
        return torch.cat([(v[n].dense() if n in v else zeros[n]).flatten(1) for n in self.shapes], 1)

    def change(self, inverse: PartialInverse, damping: Any = UNDAMPED, **options: Any) -> Tensor:
        return self.flat(inverse.change(self.curvature, self.g, damping, **options).change)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-8) -> None:
    assert found.dtype == torch.float64
    assert float((found - truth).norm()) <= tolerance * float(truth.norm())


def test_the_hessian_is_indefinite(setting):
    values = torch.linalg.eigvalsh(setting.matrix)
    assert values.min() < -1e-3 < 1e-3 < values.max()


@pytest.mark.parametrize(
    ("statistics", "decay", "damping"),
    [
        (HESSIAN, 0.02, Absolute(0.0)),
        (HESSIAN, 0.03, Absolute(0.01)),
        (Dense("hessian"), 0.03, Absolute(0.02)),
        (MatrixFree("ggn", "minres", tolerance=1e-13), 0.03, Relative(0.5)),
        (Dense("ggn"), 0.0, Relative(0.1)),
        (EKFAC(), 0.01, Absolute(0.05)),
        (EKFAC(), 0.01, Relative(0.3)),
        (LowRank(6, matrix="ggn"), 0.01, Absolute(0.05)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_all_are_what_dense_algebra_says(statistics, decay, damping):
    s = Setting(statistics, decay)
    h, g = s.damped(damping), flat(s.g, s.shapes)
    close(s.change(Generalized(s.target, EXACT), damping), reference.generalized_change(h, g, s.inside))
    close(s.change(Freezing(s.target, EXACT), damping), reference.freezing_change(h, g, s.inside))
    close(s.change(Projected(s.target), damping), reference.projected_change(h, g, s.inside))
    close(s.change(Whole(), damping), torch.linalg.solve(h, g.T).T)
    v = vectors(s.shapes, 3, seed=70)
    for inverse, transform in (
        (Generalized(s.target, EXACT), reference.generalized_transform),
        (Freezing(s.target, EXACT), reference.freezing_transform),
        (Projected(s.target), reference.projected_transform),
    ):
        close(
            s.flat(inverse.transposed(s.curvature, v, damping), 3), flat(v, s.shapes) @ transform(h, s.inside).T, 1e-7
        )


@pytest.mark.parametrize("kind", [Generalized, Freezing], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["minres", "cg", "neumann", "lstsq"])
def test_all_solvers_come_to_the_same_where_h_is_definite(kind, name):
    s = Setting(Dense("ggn"), decay=0.3)
    inverse = kind(s.target, Solver(name, 1e-12, 20_000))
    truth = {Generalized: reference.generalized_change, Freezing: reference.freezing_change}[kind]
    close(s.change(inverse), truth(s.matrix, flat(s.g, s.shapes), s.inside))
    v = vectors(s.shapes, 2, seed=70)
    transform = {Generalized: reference.generalized_transform, Freezing: reference.freezing_transform}[kind]
    pulled = s.flat(inverse.transposed(s.curvature, v, UNDAMPED))
    close(pulled, flat(v, s.shapes) @ transform(s.matrix, s.inside).T)


def test_a_target_inside_one_block_stays_there():
    """Of a block-diagonal curvature the rows of other blocks are 0 and never asked for."""
    s = Setting(EKFAC(), decay=0.01)
    target = TargetParameters.of(s.module, {"network.2.weight": torch.rand(3, 5, generator=torch.Generator()) < 2})
    inside = target.flat(s.shapes)
    h, g = s.damped(Absolute(0.1)), flat(s.g, s.shapes)
    close(s.change(Generalized(target, EXACT), Absolute(0.1)), reference.generalized_change(h, g, inside))
    pulled = Generalized(target, EXACT).transposed(s.curvature, s.g, Absolute(0.1))
    assert set(pulled) == {"network.2.weight", "network.2.bias"}
    close(s.flat(pulled), g @ reference.generalized_transform(h, inside).T)


@pytest.mark.parametrize("kind", [Generalized, Freezing])
@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [(EXACT, 1e-8), (Solver("lstsq"), 1e-9)],
    ids=["minres", "lstsq"],
)
def test_all_solvers_agree_on_an_indefinite_hessian(setting, kind, solver, tolerance):
    s = Setting(Dense("hessian"))
    truth = {Generalized: reference.generalized_change, Freezing: reference.freezing_change}[kind]
    close(s.change(kind(s.target, solver)), truth(s.matrix, flat(s.g, s.shapes), s.inside), tolerance)


@pytest.mark.parametrize("kind", [Generalized, Freezing])
def test_the_series_comes_to_the_same(kind):
    s = Setting(Dense("hessian"), decay=1.0)  # a series needs many steps where there is more to tell apart
    truth = {Generalized: reference.generalized_change, Freezing: reference.freezing_change}[kind]
    found = s.change(kind(s.target, Solver("neumann", 1e-10, 2000)))
    close(found, truth(s.matrix, flat(s.g, s.shapes), s.inside), 1e-8)


def test_conjugate_gradients_serve_least_squares_and_refuse_an_indefinite_block(setting):
    s = Setting(Dense("hessian"))
    found = s.change(Generalized(s.target, Solver("cg", 1e-14, 2000)))
    close(found, reference.generalized_change(s.matrix, flat(s.g, s.shapes), s.inside))
    assert torch.linalg.eigvalsh(s.matrix[s.inside][:, s.inside]).min() < 0
    with pytest.raises(CurvatureError, match="negative curvature"):
        s.change(Freezing(s.target, Solver("cg", 1e-14, 2000)))


@pytest.mark.parametrize("kind", [Generalized, Freezing, Projected], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("solver", [EXACT, Solver("lstsq")], ids=["minres", "lstsq"])
def test_transposed_is_the_transpose(setting, kind, solver):
    inverse = Projected(setting.target) if kind is Projected else kind(setting.target, solver)
    v = vectors(setting.shapes, 2, seed=40)
    pulled = setting.flat(inverse.transposed(setting.curvature, v, Absolute(0.02)))
    changed = setting.change(inverse, Absolute(0.02))
    close(pulled @ flat(setting.g, setting.shapes).T, flat(v, setting.shapes) @ changed.T)


def test_with_everything_in_k_all_are_the_ordinary_inverse():
    s = Setting(decay=0.05)
    everything = TargetParameters.everything(s.module)
    truth = s.change(Whole(), Absolute(0.01))
    for inverse in (Generalized(everything, EXACT), Freezing(everything, EXACT), Projected(everything)):
        close(s.change(inverse, Absolute(0.01)), truth)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_left_over_undamped(seed):
    """GIF's total residual is never larger than FIF's or PIF's, and its frozen residual never larger than FIF's."""
    s = Setting(Dense("hessian"), seed=seed, ratio=0.2 + 0.05 * (seed % 10))
    g = flat(s.g, s.shapes)
    left = {
        kind: g - s.change(inverse) @ s.matrix
        for kind, inverse in (
            ("GIF", Generalized(s.target, EXACT)),
            ("FIF", Freezing(s.target, EXACT)),
            ("PIF", Projected(s.target)),
        )
    }
    total = {kind: rest.norm(dim=1) for kind, rest in left.items()}
    frozen = {kind: rest[:, ~s.inside].norm(dim=1) for kind, rest in left.items()}
    assert bool((total["GIF"] <= total["FIF"] * (1 + 1e-9)).all())
    assert bool((total["GIF"] <= total["PIF"] * (1 + 1e-9)).all())
    assert bool((frozen["GIF"] <= frozen["FIF"] * (1 + 1e-9)).all())
    assert float(total["GIF"].min()) > 1e-6  # there is something left to compare


def test_an_iteration_costs_two_products(setting):
    calls = []
    matvec = setting.curvature.matvec

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(setting.curvature, name)

        def matvec(self, *args: Any, **options: Any) -> Any:
            calls.append(1)
            return matvec(*args, **options)

    answer = Generalized(setting.target, Solver("minres", 1e-6, 200)).change(Counted(), setting.g, Absolute(0.05))
    assert answer.converged and answer.iterations > 5
    assert len(calls) == answer.products <= 2 * answer.iterations + 3


def test_second_order_is_the_formula(setting):
    part = Dense("hessian").collect(evidence(setting.module, setting.dataset, positions=range(6)))
    share = matrix_of(part, setting.shapes) * 6 / 24

    def of_group(v: Any) -> Any:
        product = part.matvec(v)
        return {name: block.scaled(torch.full((2,), 6 / 24)) for name, block in product.items()}

    h = setting.matrix + 0.3 * torch.eye(len(setting.matrix), dtype=torch.float64)
    first = torch.linalg.solve(h, flat(setting.g, setting.shapes).T)
    truth = (first + torch.linalg.solve(h, share @ first)).T
    close(setting.change(SecondOrder(), Absolute(0.3), of_group=of_group), truth)


@pytest.mark.parametrize("kind", [Generalized, Freezing])
def test_stopping_early_is_said(setting, kind):
    inverse = kind(setting.target, Solver("minres", 1e-12, 2))
    with pytest.warns(UserWarning, match="stopped before its tolerance: after 2 iterations"):
        answer = inverse.change(setting.curvature, setting.g, UNDAMPED)
    assert not answer.converged and answer.iterations == 2 and answer.residual > 1e-12


def test_a_diverging_series_is_told(setting):
    s = Setting(Dense("hessian"))
    with pytest.raises(CurvatureError, match="diverges at scale"):
        s.change(Generalized(s.target, Solver("neumann", 1e-8, 500, scale=1e-3)))


@pytest.mark.parametrize("kind", [Generalized, Freezing])
def test_a_series_that_diverges_after_its_best_iterate_says_so(kind):
    s = Setting(Dense("hessian"), decay=1.0)
    largest = float(torch.linalg.eigvalsh(s.matrix[s.inside][:, s.inside]).max())
    inverse = kind(s.target, Solver("neumann", 1e-12, 500, scale=0.68 * largest))
    with pytest.warns(UserWarning, match=r"neumann diverged in \d+ iterations.*was kept.*scale=") as warned:
        answer = inverse.change(s.curvature, s.g, UNDAMPED)
    assert answer.diverged and answer.report()["diverged"] and not answer.converged
    assert not any("stopped before" in str(each.message) for each in warned)
    assert not inverse.__class__(s.target, EXACT).change(s.curvature, s.g, UNDAMPED).diverged


def test_parameters_that_were_never_trained_are_no_rows():
    """A curvature may know more than was trained."""
    s = Setting(Dense("hessian"), decay=0.05)
    masks = {"network.2.weight": torch.ones(3, 5, dtype=torch.bool)}
    s.module.network[0].weight.requires_grad_(False)
    target = TargetParameters.of(s.module, masks)
    kept = torch.cat([torch.full(shape, n != "network.0.weight").flatten() for n, shape in s.shapes.items()])
    h, g = s.matrix[kept][:, kept], flat(s.g, s.shapes)[:, kept]
    truth = reference.generalized_change(h, g, target.flat(target.shapes))
    close(s.change(Generalized(target, EXACT))[:, kept], truth)


# Refusals


def test_a_curvature_that_lacks_target_parameters():
    s = Setting()
    part = Dense("hessian").collect(evidence(s.module, s.dataset, ["network.2.*"]))
    for inverse in (Generalized(s.target), Freezing(s.target)):
        with pytest.raises(CurvatureError, match=r"holds nothing for network\.0\.weight"):
            inverse.change(part, s.g, Absolute(0.1))


def test_a_curvature_of_projected_gradients_has_no_columns():
    s = Setting()
    gram = ProjectedGram(FactorProjection(2)).collect(evidence(s.module, s.dataset, labels="observed"))
    with pytest.raises(CurvatureError, match="no inverse on a part of its parameters"):
        Generalized(s.target).change(gram, s.g, Absolute(0.1))


def test_data_inf_has_no_columns():
    s = Setting()
    found = DataInf().collect(evidence(s.module, s.dataset, labels="observed"))
    for inverse in (Generalized(s.target), Freezing(s.target)):
        with pytest.raises(CurvatureError, match="no inverse on a part of its parameters"):
            inverse.change(found, s.g, Absolute(0.1))


def test_gradients_that_lack_target_parameters(setting):
    with pytest.raises(CaptureError, match="network"):
        Projected(setting.target).transposed(
            setting.curvature, {"network.0.bias": setting.g["network.0.bias"]}, Absolute(1.0)
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "lissa"},
        {"tolerance": 0.0},
        {"tolerance": float("nan")},
        {"tolerance": float("inf")},
        {"tolerance": "1e-5"},
        {"max_iterations": 0},
        {"max_iterations": 10.0},
        {"max_iterations": True},
        {"scale": -1.0},
        {"scale": float("inf")},
        {"scale": "large"},
    ],
)
def test_no_way_to_solve(wrong):
    with pytest.raises(CurvatureError, match="no way to solve"):
        Solver(**wrong)
