"""The forms of a link against explicit matrices, and pulled-back gradients against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence.curvature import Absolute
from lightning_influence.curvature.block_diagonal import BlockDiagonal
from lightning_influence.curvature.diagonal import DiagonalBlock
from lightning_influence.curvature.kronecker import KroneckerBlock
from lightning_influence.curvature.rotation import Rotation
from lightning_influence.gradients import Dense, Rows
from lightning_influence.stages import Answer, Proximity, SmallProximity, Source, Trained, pulled_back

LAMBDA = 0.1
SHAPES = {"w": (2, 3), "b": (2,), "d": (4,)}
SIZES = [6, 2, 4]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curvature() -> BlockDiagonal:
    """A Kronecker block of a weight and its bias, and a diagonal one."""
    basis = [torch.linalg.qr(draw(1, n, n, seed=n)).Q for n in (4, 2)]
    rotation = Rotation((2, 3), True, 1, False).with_bases(*basis)
    kronecker = KroneckerBlock(["w", "b"], rotation, draw(1, 2, 4, seed=5).square())
    return BlockDiagonal([kronecker, DiagonalBlock("d", draw(4, seed=6).square())])


def vectors(flat: Tensor, names: Any = tuple(SHAPES)) -> dict[str, Dense]:
    parts = dict(zip(SHAPES, flat.split(SIZES, 1), strict=True))
    return {name: Dense(parts[name].reshape(-1, *SHAPES[name])) for name in names}


def flat_of(blocks: Any, names: Any = tuple(SHAPES)) -> Tensor:
    return torch.cat([blocks[name].dense().flatten(1) for name in names], 1)


def matrix(of: BlockDiagonal) -> Tensor:
    eye = torch.eye(12, dtype=torch.float64)
    return flat_of(of.matvec(vectors(eye)))


HELD: dict[str, Any] = {
    "one number": {"w": 0.3, "b": 0.3},
    "weight and bias otherwise": {"w": 0.3, "b": 0.7},
    "of the weight alone": {"w": 0.3},
    "entry by entry": {"w": draw(2, 3, seed=7).square() + 0.1, "b": draw(2, seed=8).square() + 0.1},
    "of both kinds": {"w": draw(2, 3, seed=7).square() + 0.1, "d": 0.4},
}


def diagonal(held: Any) -> Tensor:
    parts = [torch.as_tensor(held.get(name, 0.0), dtype=torch.float64).expand(shape) for name, shape in SHAPES.items()]
    return torch.cat([part.reshape(-1) for part in parts])


@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_a_proximity_adds_to_the_diagonal(held):
    h, v = curvature(), draw(3, 12, seed=9)
    answer = Proximity().answer(Trained(h, Absolute(LAMBDA), held, tuple(held)), vectors(v))
    p = diagonal(held)
    expected = torch.linalg.solve(matrix(h) + torch.diag(LAMBDA + p), v.T).T
    torch.testing.assert_close(flat_of(answer.moved), expected, rtol=1e-7, atol=1e-9)
    assert set(answer.kept) == set(held)
    for name, block in vectors(expected * p, tuple(held)).items():
        torch.testing.assert_close(answer.kept[name].dense(), block.dense(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", [Proximity(), SmallProximity(), Source()], ids=repr)
def test_a_part_of_a_block_is_solved_as_a_part(form):
    """The bias was trained, its weight was not: H is that of what was."""
    h, v, names = curvature(), draw(3, 12, seed=9), ("b", "d")
    held = {"b": 0.5, "d": 0.2}
    answer = form.answer(Trained(h, Absolute(LAMBDA), held, ("b",)), vectors(v, names))
    part = matrix(h)[6:, 6:]
    p = diagonal(held)[6:]
    if isinstance(form, Source):
        values, basis = torch.linalg.eigh(part / (p[:, None] * p).sqrt())
        expected = v[:, 6:] / p.sqrt() @ basis @ torch.diag(-torch.expm1(-values) / values) @ basis.T / p.sqrt()
    else:
        shift = LAMBDA + (p if isinstance(form, Proximity) else torch.zeros_like(p))
        expected = torch.linalg.solve(part + torch.diag(shift), v[:, 6:].T).T
    torch.testing.assert_close(flat_of(answer.moved, names), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("each", [False, True], ids=["numbers", "entry by entry"])
def test_source_is_the_exponential_in_the_metric_of_the_rates(each):
    h, v = curvature(), draw(3, 12, seed=9)
    held: dict[str, Any] = {"w": 0.3, "b": 0.6, "d": 0.2}
    if each:
        held = {name: draw(*shape, seed=11).square() + 0.1 for name, shape in SHAPES.items()}
    answer = Source().answer(Trained(h, Absolute(LAMBDA), held, ("w", "b")), vectors(v))
    p = diagonal(held)
    values, basis = torch.linalg.eigh(matrix(h) / (p[:, None] * p).sqrt())
    flow = basis @ torch.diag((-values).exp()) @ basis.T
    kept = v / p.sqrt() @ flow * p.sqrt()
    moved = v / p.sqrt() @ basis @ torch.diag(-torch.expm1(-values) / values) @ basis.T / p.sqrt()
    torch.testing.assert_close(flat_of(answer.kept, ("w", "b")), kept[:, :8], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(flat_of(answer.moved), moved, rtol=1e-7, atol=1e-9)


def test_gradient_descent_with_a_start_is_what_source_pulls_back():
    """−dm/dθ₀ of K small steps θ ← θ − η P⁻¹ H θ, by products of matrices."""
    h, v, steps = curvature(), draw(2, 12, seed=9), 20_000
    held = {name: draw(*shape, seed=11).square() + 0.1 for name, shape in SHAPES.items()}
    answer = Source().answer(Trained(h, Absolute(0.0), held, tuple(SHAPES)), vectors(v))
    p = diagonal(held)
    one = torch.eye(12, dtype=torch.float64) - torch.diag(1 / p) @ matrix(h) / steps
    torch.testing.assert_close(flat_of(answer.kept), v @ torch.linalg.matrix_power(one, steps), rtol=1e-3, atol=1e-4)


def test_frozen_ones_lose_what_the_new_ones_answer_and_copies_add_up():
    v = {name: Dense(draw(2, *shape, seed=n)) for n, (name, shape) in enumerate(SHAPES.items())}
    twin = Rows.from_dense(draw(2, 2, 3, seed=4))
    answer = Answer({"d": v["d"]}, {"copy": twin})
    through = {"w": Dense(draw(2, 2, 3, seed=3))}
    shared = {"w": "W", "copy": "W", "b": "B", "other": "O"}
    found = pulled_back(v, answer, shared, ("w", "b"), through)
    assert set(found) == {"W", "B"}  # what was neither frozen nor answered for has no part
    expected = v["w"].dense() - through["w"].dense() + twin.dense()
    torch.testing.assert_close(found["W"].dense(), expected)
    assert found["B"] is v["b"]
    without = pulled_back(v, Answer({}, {}), shared, ("w", "b"), {})
    assert without["W"] is v["w"]
