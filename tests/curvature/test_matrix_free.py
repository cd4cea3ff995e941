"""Solving by products alone against the dense matrix in float64, what is reported of it, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.curvature import Absolute, Damping, MatrixFree, Relative
from lightning_influence.curvature import Dense as DenseStatistics
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Dense, Gradients, Rows
from tests.curvature.losses import Case, bags, classifier, draws, language_model, regression

SOLVERS: list[Any] = ["cg", "minres", "lissa"]


def vectors(case: Case, count: int = 2, seed: int = 0) -> dict[str, Dense]:
    """Random ones, the last parameter first."""
    named = reversed(list(case.module.named_parameters()))
    return {name: Dense(draws(count, *p.shape, seed=seed + k)) for k, (name, p) in enumerate(named)}


def flat(case: Case, v: Gradients) -> Tensor:
    return torch.cat([v[name].dense().flatten(1) for name, _ in case.module.named_parameters()], 1)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.fixture(autouse=True)
def no_warning_is_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "make", [classifier, lambda: bags("offsets", "mean"), language_model], ids=["mlp", "bag", "lm"]
)
def test_solve_is_that_of_the_dense_matrix(make, solver):
    case = make()
    settings = MatrixFree("ggn", solver, tolerance=1e-12, max_iterations=3000)
    curvature = settings.collect(case.evidence(batch_size=100))
    matrix, v = case.ggn(), vectors(case)
    damping = 0.5 * float(torch.linalg.eigvalsh(matrix)[-1])
    solved = curvature.solve(v, Absolute(damping))
    shifted = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    assert list(solved) == list(v) and all(type(block) is Dense for block in solved.values())
    close(flat(case, solved), torch.linalg.solve(shifted, flat(case, v).T).T)
    found = curvature.last_solution
    assert found.converged and 0 < found.iterations < 500 and float(found.residual.max()) <= 1e-12


def test_it_agrees_with_the_dense_statistics():
    case = classifier()
    v = vectors(case)
    evidence, decay = case.evidence(batch_size=100), {"network.0.weight": 0.1}
    dense: Any = DenseStatistics("ggn").collect(evidence).decayed(decay)
    free = MatrixFree(tolerance=1e-12).collect(evidence).decayed(decay)
    for name, block in dense.solve(v, Absolute(0.02)).items():
        close(free.solve(v, Absolute(0.02))[name].dense(), block.dense())
    for name, block in dense.matvec(v).items():
        close(free.matvec(v)[name].dense(), block.dense())


def test_minres_solves_with_an_indefinite_hessian():
    case = classifier()
    matrix, v = case.hessian(), vectors(case)
    assert float(torch.linalg.eigvalsh(matrix)[0]) < -0.01
    curvature = MatrixFree("hessian", "minres", tolerance=1e-11).collect(case.evidence(batch_size=100))
    shifted = matrix + 1e-3 * torch.eye(len(matrix), dtype=torch.float64)
    close(flat(case, curvature.solve(v, Absolute(1e-3))), torch.linalg.solve(shifted, flat(case, v).T).T, 1e-7)


@pytest.mark.parametrize(("solver", "message"), [("cg", "negative curvature"), ("lissa", "diverges")])
def test_other_solvers_refuse_an_indefinite_hessian(solver, message):
    case = classifier()
    curvature = MatrixFree("hessian", solver).collect(case.evidence(batch_size=100))
    with pytest.raises(CurvatureError, match=message):
        curvature.solve(vectors(case), Absolute(1e-3))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (None, None),
        (["network.0.bias"], None),
        (["network.2.weight", "network.0.bias"], ["network.0.weight"]),
        (None, ["network.2.bias"]),
        (["network.2.bias"], []),
    ],
)
@pytest.mark.parametrize("left_out", [[], ["network.0.weight"]])
def test_any_rows_and_columns(rows, columns, left_out):
    case = classifier()
    curvature = MatrixFree("hessian").collect(case.evidence()).decayed({"network.0.weight": 0.3, "network.2.bias": 0.2})
    v = {name: block for name, block in vectors(case).items() if name not in left_out}
    if columns is not None:
        columns = [name for name in columns if name not in left_out]
    used = {name: block if name in v and (columns is None or name in columns) else None for name, block in v.items()}
    whole = {n: used.get(n) or Dense(torch.zeros(2, *p.shape).double()) for n, p in case.module.named_parameters()}
    decay = [
        torch.full_like(p, {"network.0.weight": 0.3, "network.2.bias": 0.2}.get(n, 0.0)).reshape(-1)
        for n, p in case.module.named_parameters()
    ]
    product = flat(case, whole) @ (case.hessian() + torch.diag(torch.cat(decay)))
    sizes = [p.numel() for p in case.module.parameters()]
    expected = dict(zip(whole, product.detach().split(sizes, 1), strict=True))
    found = curvature.matvec(v, rows, columns)
    wanted = rows if rows is not None else [name for name in v if columns is None or name in columns]
    assert list(found) == wanted
    for name in wanted if columns != [] else []:
        close(found[name].dense().flatten(1), expected[name])


def test_sparse_vectors_and_parameters_of_the_evidence_alone():
    case = bags("rows", "sum")
    name = "network.bag.weight"
    curvature = MatrixFree(tolerance=1e-12).collect(case.evidence(name))
    words = Rows.from_tokens(torch.tensor([[1, 2], [3, 3]]), draws(2, 2, 3), num_words=6, padding_idx=0)
    solved = curvature.solve({name: words}, Absolute(0.1))[name].dense().flatten(1)
    matrix = case.ggn()[:18, :18] + 0.1 * torch.eye(18, dtype=torch.float64)
    close(solved, torch.linalg.solve(matrix, words.dense().flatten(1).T).T)
    assert curvature.parameters == (name,)


class Counted(Damping):
    """Asks for the mean eigenvalue."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def of(self, mean_eigenvalue: float) -> float:
        self.seen.append(mean_eigenvalue)
        return 1.0

    def times(self, factor: float) -> Damping:
        return self


def test_the_mean_eigenvalue_is_estimated_once_and_only_if_it_is_asked_for(monkeypatch):
    case = classifier()
    curvature = MatrixFree().collect(case.evidence(batch_size=100))
    walks = []
    monkeypatch.setattr(case.module, "on_before_batch_transfer", lambda batch, _: walks.append(1) or batch)
    curvature.solve(vectors(case), Absolute(1.0))
    plain = len(walks)
    asks = Counted()
    curvature.solve(vectors(case), asks)
    assert len(walks) == 2 * plain + 1
    curvature.decayed({"network.0.weight": 0.1}).solve(vectors(case), asks)
    curvature.solve(vectors(case), Relative(0.5))
    assert asks.seen[0] == asks.seen[1] == curvature.mean_eigenvalue
    expected = float(case.ggn().trace()) / len(case.flat())
    assert curvature.mean_eigenvalue == pytest.approx(expected, rel=0.5)
    assert MatrixFree().collect(case.evidence()).mean_eigenvalue == pytest.approx(curvature.mean_eigenvalue, rel=1e-9)


def test_a_relative_damping_is_that_part_of_the_mean_eigenvalue():
    case = classifier()
    curvature = MatrixFree(tolerance=1e-12).collect(case.evidence(batch_size=100))
    v, damping = vectors(case), Absolute(0.5 * curvature.mean_eigenvalue)
    close(flat(case, curvature.solve(v, Relative(0.5))), flat(case, curvature.solve(v, damping)))


def test_a_relative_damping_needs_a_positive_mean():
    case = classifier(lambda z, y: -F.cross_entropy(z, y))
    curvature = MatrixFree("hessian", "minres").collect(case.evidence(batch_size=100))
    with pytest.raises(CurvatureError, match="absolute damping"):
        curvature.solve(vectors(case), Relative(0.1))


def test_weight_decay_makes_a_new_curvature_and_adds_up():
    case = classifier()
    plain = MatrixFree(tolerance=1e-12).collect(case.evidence(batch_size=100))
    v = vectors(case)
    before = flat(case, plain.solve(v, Absolute(0.1)))
    decay = {name: 0.2 for name in v}
    twice = plain.decayed(decay).decayed(decay)
    close(flat(case, twice.solve(v, Absolute(0.1))), flat(case, plain.solve(v, Absolute(0.5))))
    close(flat(case, plain.solve(v, Absolute(0.1))), before)


def test_what_has_not_converged_is_said():
    case = classifier()
    curvature = MatrixFree(max_iterations=2).collect(case.evidence(batch_size=100))
    with pytest.warns(UserWarning, match=r"cg did not converge: after 2 iterations the relative residual is \d"):
        curvature.solve(vectors(case), Absolute(1e-4))
    assert curvature.last_solution is not None and not curvature.last_solution.converged


def test_a_float32_model_converges_at_the_default_tolerance():
    case = regression()
    case.module.float()
    for sample in case.samples:
        sample |= {name: value.float() for name, value in sample.items()}
    v = {name: block.to(dtype=torch.float32) for name, block in vectors(case).items()}
    for solver in SOLVERS[:2]:
        curvature = MatrixFree(solver=solver).collect(case.evidence(batch_size=100))
        solved = curvature.solve(v, Relative(0.1))
        assert all(block.dtype == torch.float32 for block in solved.values())
        assert curvature.last_solution.converged


def test_no_vectors():
    case = classifier()
    curvature = MatrixFree().collect(case.evidence())
    v = {name: block.select(torch.arange(0)) for name, block in vectors(case).items()}
    assert all(block.num_samples == 0 for block in curvature.solve(v, Absolute(0.1)).values())


def test_what_is_refused():
    case = classifier()
    curvature = MatrixFree().collect(case.evidence())
    v = vectors(case)
    with pytest.raises(CurvatureError, match="never stored"):
        curvature.state()
    with pytest.raises(CurvatureError, match="never stored"):
        type(curvature).load({}, {})
    with pytest.raises(CurvatureError, match=r"vectors of network.0.bias too"):
        curvature.solve({name: block for name, block in v.items() if name != "network.0.bias"}, Absolute(0.1))
    with pytest.raises(CurvatureError, match="holds nothing for 'other'"):
        curvature.matvec({**v, "other": v["network.0.bias"]})
    with pytest.raises(CurvatureError, match="holds nothing for 'other'"):
        curvature.matvec(v, rows=["other"])
    for wrong in ({"matrix": "fisher"}, {"solver": "newton"}):
        with pytest.raises(CurvatureError, match="unknown"):
            MatrixFree(**wrong)


def test_settings_make_the_same_statistics_again():
    settings = MatrixFree("hessian", "minres", tolerance=1e-3, max_iterations=7).settings()
    assert MatrixFree(**settings).settings() == settings
