"""Damping: what λ each block gets, and which curvatures cannot be inverted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature import (
    EKFAC,
    KFAC,
    Absolute,
    BlockDiagonal,
    Damping,
    Dense,
    Diagonal,
    Relative,
    as_damping,
)
from lightning_influence.curvature.block_diagonal import shifted
from lightning_influence.curvature.dense import DenseBlock
from lightning_influence.curvature.diagonal import DiagonalBlock
from lightning_influence.curvature.kronecker import KroneckerBlock, RowsBlock
from lightning_influence.curvature.rotation import Rotation
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Dense as DenseGradients
from tests.curvature.settings import (
    classified,
    draws,
    evidence,
    eye,
    flat,
    matrix_of,
    model,
    same,
    shapes_of,
    vectors,
)


def test_a_number_is_absolute_and_nothing_is_a_tenth_of_the_mean():
    assert as_damping(0.3) == Absolute(0.3) and as_damping(2) == Absolute(2.0)
    assert as_damping(None) == Relative(0.1)
    assert as_damping(Relative(0.5)) == Relative(0.5)
    assert Relative(0.5).of(4.0) == 2.0
    assert Absolute(0.5).of(4.0) == 0.5


@pytest.mark.parametrize("make", [Absolute, Relative, as_damping])
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_a_negative_damping_is_refused(make, value):
    with pytest.raises(CurvatureError, match="damping cannot be negative") as caught:
        make(value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("value", ["small", True, [0.1]])
def test_other_things_are_no_damping(value):
    with pytest.raises(CurvatureError, match="no damping"):
        as_damping(value)


@pytest.mark.parametrize("damping", [Absolute(0.25), Relative(0.03), Absolute(0.0)])
def test_the_record_gives_the_rule_back(damping):
    assert Damping.from_record(damping.record()) == damping


# Each layer by its own scale


def lopsided() -> nn.Module:
    """The second layer's inputs are a thousand times smaller than the first's."""
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        network[0].weight *= 1e-3
    return network


@pytest.mark.parametrize("statistics", [KFAC(), EKFAC(), Diagonal()], ids=lambda s: s.name)
def test_a_relative_damping_goes_by_the_mean_of_each_layer(statistics):
    module = model(lopsided)
    curvature = statistics.collect(evidence(module, classified(draws(12, 3)), labels="exact"))
    shapes = shapes_of(module, curvature.parameters)
    v = vectors(shapes)
    found = curvature.solve(v, Relative(0.1))
    means = []
    for name, shape in shapes.items():
        matrix = matrix_of(curvature, {name: shape})
        means.append(float(matrix.diagonal().mean()))
        damped = matrix + 0.1 * means[-1] * eye(len(matrix))
        truth = torch.linalg.solve(damped, v[name].dense().flatten(1).T).T
        torch.testing.assert_close(found[name].dense().flatten(1), truth, rtol=1e-9, atol=0)
    assert max(means) > 1e3 * min(means)
    absolute = curvature.solve(v, Absolute(0.1 * means[0]))  # of the first layer for all: far off in the second
    first, second = shapes
    same(absolute[first].dense(), found[first].dense(), 1e-8)
    assert float((absolute[second].dense() - found[second].dense()).norm()) > 0.5 * float(found[second].dense().norm())


def test_the_mean_is_taken_anew_and_not_of_the_first_call():
    module = model(lopsided)
    curvature = EKFAC().collect(evidence(module, classified(draws(12, 3)), labels="exact"))
    v = vectors(shapes_of(module, curvature.parameters))
    first = curvature.solve(v, Relative(0.1))
    curvature.solve(v, Relative(1.0))
    again = curvature.solve(v, Relative(0.1))
    assert all(torch.equal(first[name].dense(), again[name].dense()) for name in first)


# Singular


def kronecker(eigenvalues: torch.Tensor) -> KroneckerBlock:
    o, i = eigenvalues.shape
    bases = (torch.eye(i, dtype=eigenvalues.dtype)[None], torch.eye(o, dtype=eigenvalues.dtype)[None])
    return KroneckerBlock(["layer.weight"], Rotation((o, i), False, 1, False, *bases), eigenvalues[None])


def blocks_of(values: torch.Tensor) -> list[Any]:
    """A block of every form with these eigenvalues (2, 3), for a parameter of shape (2, 3)."""
    name, shape = "layer.weight", (2, 3)
    basis = torch.eye(3, dtype=values.dtype)
    return [
        kronecker(values),
        RowsBlock([name], basis, values),
        DiagonalBlock(name, values),
        DenseBlock({name: shape}, torch.diag(values.flatten())),
    ]


KINDS = range(4)
V = {"layer.weight": DenseGradients(draws(2, 2, 3))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smallest", [0.0, 1e-20])
def test_without_damping_a_singular_curvature_is_refused_by_name(kind, smallest):
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, smallest]], dtype=torch.float64)
    singular = BlockDiagonal([blocks_of(values)[kind]])
    for damping in (Absolute(0.0), Relative(0.0)):
        with pytest.raises(CurvatureError, match=r"curvature of layer\.weight cannot be inverted") as caught:
            singular.solve(V, damping)
        assert "beside a largest of 5" in str(caught.value) and "positive damping" in caught.value.hint
    assert torch.isfinite(singular.solve(V, Absolute(1e-3))["layer.weight"].dense()).all()
    regular = BlockDiagonal([blocks_of(values.clamp_min(0.1))[kind]])
    truth = V["layer.weight"].dense() / values.clamp_min(0.1)
    same(regular.solve(V, Absolute(0.0))["layer.weight"].dense(), truth)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [Relative(0.1), Absolute(0.0)])
def test_a_layer_without_any_gradient_is_named(kind, damping):
    silent = BlockDiagonal([blocks_of(torch.zeros(2, 3, dtype=torch.float64))[kind]])
    with pytest.raises(CurvatureError, match=r"layer\.weight cannot be inverted") as caught:
        silent.solve(V, damping)
    assert "the layer got no gradient" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_eigenvalues_that_are_no_numbers_are_named(kind):
    values = torch.ones(2, 3, dtype=torch.float64)
    values[1, 1] = torch.nan
    with pytest.raises(CurvatureError, match=r"layer\.weight"):
        BlockDiagonal([blocks_of(values)[kind]]).solve(V, Absolute(0.1))


def test_a_hessian_on_whose_negative_eigenvalue_the_damping_falls():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, -0.5]], dtype=torch.float64)
    indefinite = BlockDiagonal([DenseBlock({"layer.weight": (2, 3)}, torch.diag(values.flatten()))])
    same(indefinite.solve(V, Absolute(0.1))["layer.weight"].dense(), V["layer.weight"].dense() / (values + 0.1))
    with pytest.raises(CurvatureError, match="cannot be inverted"):
        indefinite.solve(V, Absolute(0.5))


def test_a_share_of_a_negative_mean_is_no_damping():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, -30.0]], dtype=torch.float64)
    indefinite = BlockDiagonal([DenseBlock({"layer.weight": (2, 3)}, torch.diag(values.flatten()))])
    with pytest.raises(CurvatureError, match="relative to the mean eigenvalue"):
        indefinite.solve(V, Relative(0.1))


def test_a_damping_far_below_the_largest_eigenvalue_is_still_a_damping():
    """In single precision, 0.1 · mean(Λ) of a large layer lies below its rounding of the largest eigenvalue."""
    values = torch.zeros(1000, 2000)
    values[0, 0] = 1.0
    layer = kronecker(values)
    assert 0.1 * layer.mean_eigenvalue < torch.finfo(torch.float32).eps
    v = {"layer.weight": DenseGradients(torch.ones(1, 1000, 2000))}
    found = BlockDiagonal([layer]).solve(v, Relative(0.1))["layer.weight"].dense()
    assert float(found[0, 0, 0]) == pytest.approx(1.0, rel=1e-5)
    assert float(found[0, 5, 5]) == pytest.approx(1 / 5e-8, rel=1e-5)
    with pytest.raises(CurvatureError):
        shifted(torch.tensor([1.0, -1e-9]), 5e-8, ["w"])  # rounding that a shift so small does not hide


# In an estimate


class Partial(nn.Module):
    """A layer whose output the loss sees only multiplied by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.silent, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) + 0 * self.silent(x)


@pytest.mark.parametrize("statistics", [KFAC(), EKFAC()], ids=lambda s: s.name)
def test_a_silent_layer_of_a_model_is_named(statistics):
    module = model(Partial)
    curvature = statistics.collect(evidence(module, classified(draws(8, 3)), labels="exact"))
    v = vectors(shapes_of(module, curvature.parameters))
    with pytest.raises(CurvatureError, match=r"network\.silent\.weight, network\.silent\.bias cannot be inverted"):
        curvature.solve(v, Relative())
    spoken = {name: block for name, block in v.items() if "head" in name}
    curvature.solve(spoken, Relative())


def test_units_do_not_depend_on_how_many_samples_there_are():
    """Λ is a mean over samples: a sum would make an absolute damping N times too small."""
    module = model(lopsided)
    once = classified(draws(6, 3))
    twice = TensorDataset(*(torch.cat([tensor, tensor]) for tensor in once.tensors))
    v = vectors(shapes_of(module, [name for name, _ in module.named_parameters()]))
    for statistics in (Dense("fisher"), Dense("ggn"), Diagonal(), KFAC(), EKFAC()):
        few, many = (statistics.collect(evidence(module, data, labels="exact")) for data in (once, twice))
        same(flat(few.solve(v, Absolute(0.1)), v), flat(many.solve(v, Absolute(0.1)), v), 1e-9)
