"""Projections are linear, the same whatever the form, chunks and machine, and keep inner products on average."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence import FactorProjection, RandomProjection
from lightning_influence.errors import StoreError, UnsupportedError
from lightning_influence.gradients import Dense, Factored, GradientBlock, Projection, Rows, blocks
from lightning_influence.gradients.counted_signs import key_of, orthonormal, signs

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
PROJECTIONS = [
    RandomProjection(16),
    RandomProjection(100, seed=3),
    RandomProjection(5000),
    FactorProjection(1),
    FactorProjection(5, seed=2),
    FactorProjection(9),
    FactorProjection(64),
]
KEEPS: dict[str, Callable[[int], Projection]] = {
    "random": lambda seed: RandomProjection(24, seed),
    "factor": lambda seed: FactorProjection(4, seed),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows() -> Rows:
    words = torch.randint(0, 23, (6, 8), generator=torch.Generator().manual_seed(1))
    words[2] = 5  # one word eight times
    return Rows.from_tokens(words, draw(6, 8, 7), num_words=23, padding_idx=0)


FORMS: dict[str, Callable[[], GradientBlock]] = {
    "weight": lambda: Dense(draw(6, 12, 10)),
    "bias": lambda: Dense(draw(6, 12)),
    "scalar": lambda: Dense(draw(6)),
    "convolution": lambda: Dense(draw(6, 8, 3, 2, 2)),
    "factors": lambda: Factored(draw(6, 5, 10), draw(6, 5, 12, seed=1)),
    "one position": lambda: Factored(draw(6, 1, 10), draw(6, 1, 12, seed=1)),
    "factors of a convolution": lambda: Factored(draw(6, 5, 12), draw(6, 5, 8, seed=1), (8, 3, 2, 2)),
    "groups": lambda: Factored(draw(6, 5, 12), draw(6, 5, 9, seed=1), (9, 2, 2), groups=3),
    "rows": rows,
    "no rows": lambda: rows().without_words(range(23)),
}


def matrix(projection: Projection, name: str, shape: tuple[int, ...]) -> Tensor:
    """P written out, (k, P): its columns are the projected unit vectors."""
    size = math.prod(shape)
    unit = Dense(torch.eye(size, dtype=torch.float64).view(size, *shape))
    return projection.apply({name: unit})[name].dense().flatten(1).T


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_one_linear_map_for_every_form(projection: Projection, form: str) -> None:
    block = FORMS[form]()
    p = matrix(projection, "w", block.shape)
    found = projection.apply({"w": block})["w"]
    assert isinstance(found, Dense)
    assert found.shape == projection.shape(block.shape) and found.dtype == torch.float64
    torch.testing.assert_close(found.dense().flatten(1), block.dense().reshape(6, -1) @ p.T, **CLOSE)
    back = projection.lift({"w": found}, {"w": block.shape})["w"]
    assert back.shape == block.shape
    torch.testing.assert_close(back.dense().reshape(6, -1), found.dense().flatten(1) @ p, **CLOSE)


def test_the_matrices_are_what_they_are_said_to_be() -> None:
    p = matrix(RandomProjection(16), "w", (12, 10))
    assert p.shape == (16, 120) and p.abs().unique().tolist() == [0.25]
    assert abs(float(p.sign().mean())) < 0.1
    factors = FactorProjection(4)
    p = matrix(factors, "w", (12, 10)).view(4, 4, 12, 10)
    for sides in ((0, 2), (1, 3)):  # up to the other side's factor
        side = p.movedim(sides, (0, 1)).flatten(2)[..., 0]
        gram = side @ side.T
        torch.testing.assert_close(gram / gram[0, 0], torch.eye(4, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(p.square().sum(), torch.tensor(120.0, dtype=torch.float64))
    basis = orthonormal(7, 50, 8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["weight", "bias", "factors", "groups", "rows"])
def test_large_enough_is_exact(form: str) -> None:
    """LoGra of full rank, and as many random numbers as weights, keep every inner product."""
    block = FORMS[form]()
    for projection in (FactorProjection(23), RandomProjection(200)):
        found = projection.apply({"w": block})["w"]
        torch.testing.assert_close(found.inner(found), block.inner(block), **CLOSE)
    one_side = FactorProjection(10).apply({"w": Factored(draw(6, 5, 10), draw(6, 5, 12, seed=1))})["w"]
    assert one_side.shape == (10, 10)  # the inputs are kept, the outputs are not


@pytest.mark.parametrize("kind", KEEPS)
@pytest.mark.parametrize("form", ["weight", "factors", "groups", "rows", "bias"])
def test_inner_products_are_kept_on_average(form: str, kind: str) -> None:
    block = FORMS[form]()
    query, wanted = block.select(torch.tensor([0, 3])), block.inner(block.select(torch.tensor([0, 3])))
    found = []
    for seed in range(300):
        projection = KEEPS[kind](seed)
        both = projection.apply({"w": query})["w"], projection.apply({"w": block})["w"]
        found.append(both[1].inner(both[0]))
    samples = torch.stack(found)
    error = (samples.mean(0) - wanted).abs() / (samples.std(0) / 300**0.5).clamp_min(1e-9)
    assert float(error.max()) < 4.5  # in standard errors
    if math.prod(block.shape) > 24:
        assert float(samples.std(0).max()) > 0
    if kind == "random" and math.prod(block.shape) > 24:
        scale = query.norm()[:, None] * block.norm() / 24**0.5
        assert float((samples.std(0) / scale).max()) < 1.7  # sqrt(2) for equal gradients


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_chunks_and_batches_change_nothing(projection: Projection, monkeypatch: pytest.MonkeyPatch) -> None:
    for form, make in FORMS.items():
        block = make()
        whole = projection.apply({"w": block})["w"]
        lifted = projection.lift({"w": whole}, {"w": block.shape})["w"].dense()
        parts = [projection.apply({"w": block.select(torch.tensor([i]))})["w"].dense() for i in range(6)]
        torch.testing.assert_close(torch.cat(parts), whole.dense(), msg=form, **CLOSE)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "CHUNK_ELEMENTS", 90)
            small = projection.apply({"w": block})["w"]
            torch.testing.assert_close(small.dense(), whole.dense(), msg=form, **CLOSE)
            again = projection.lift({"w": whole}, {"w": block.shape})["w"].dense()
            torch.testing.assert_close(again, lifted, msg=form, **CLOSE)


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_shapes(n: int, t: int, width: int, height: int, rank: int, seed: int) -> None:
    block = Factored(draw(n, t, width, seed=seed), draw(n, t, height, seed=seed + 1))
    for projection in (FactorProjection(rank, seed), RandomProjection(rank, seed)):
        found, wanted = (projection.apply({"w": b})["w"] for b in (block, Dense(block.dense())))
        assert found.shape == projection.shape(block.shape)
        torch.testing.assert_close(found.dense(), wanted.dense(), **CLOSE)


def test_the_same_on_every_machine() -> None:
    """Stores outlive processes and versions: these digits must not change."""
    found = signs(key_of(5, "layer.weight"), torch.tensor([0, 1, 10**9]), 200, torch.float32)
    assert set(found.unique().tolist()) == {-1.0, 1.0}
    digest = hashlib.sha256(((found + 1) / 2).to(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest[:16] == "826866328dfae74a"
    basis = orthonormal(key_of(5, "layer.weight", "rows"), 6, 2)
    torch.testing.assert_close(
        basis,
        torch.tensor(
            [
                [0.178318531301, 0.2318914706662],
                [-0.3165890233116, 0.1331021001784],
                [0.1395422220344, -0.8677221037276],
                [0.2942033294067, 0.2771029407908],
                [-0.846870513477, -0.1201900350186],
                [-0.2115575438317, 0.2904080631632],
            ],
            dtype=torch.float64,
        ),
        rtol=1e-11,
        atol=1e-12,
    )


def test_seeds_and_names_draw_anew() -> None:
    block = FORMS["weight"]()
    for make in (lambda seed: RandomProjection(8, seed), lambda seed: FactorProjection(3, seed)):
        first = make(0).apply({"a": block, "b": block})
        assert not torch.allclose(first["a"].dense(), first["b"].dense())
        assert not torch.allclose(first["a"].dense(), make(1).apply({"a": block})["a"].dense())
        assert torch.equal(first["a"].dense(), make(0).apply({"a": block})["a"].dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_projected_in_float32(dtype: torch.dtype) -> None:
    for form in ("weight", "factors", "rows"):
        block = FORMS[form]().to(dtype=dtype)
        for projection in (RandomProjection(8), FactorProjection(3)):
            found, wanted = (projection.apply({"w": b})["w"] for b in (block, block.to(dtype=torch.float64)))
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.dense().double(), wanted.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_on_a_gpu() -> None:
    for form, make in FORMS.items():
        for projection in PROJECTIONS:
            here = projection.apply({"w": make()})["w"]
            there = projection.apply({"w": make().to(device="cuda")})["w"]
            assert there.device.type == "cuda"
            torch.testing.assert_close(there.dense().cpu(), here.dense(), msg=form, **CLOSE)


def test_records() -> None:
    for projection in PROJECTIONS:
        assert Projection.from_record(projection.record()) == projection
    assert RandomProjection(8) != FactorProjection(8) and RandomProjection(8) != RandomProjection(8, seed=1)
    for record in (
        {"kind": "unheard of", "size": 3},
        {"kind": "random", "rank": 3},
        {"kind": "random", "size": -1},
        {},
    ):
        with pytest.raises(StoreError, match="unknown way"):
            Projection.from_record(record)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomProjection(0),
        lambda: RandomProjection(1.5),
        lambda: RandomProjection(True),
        lambda: FactorProjection(-1),
        lambda: FactorProjection("16"),
        lambda: FactorProjection(4, seed=None),
    ],
)
def test_settings_that_make_no_sense(make: Any) -> None:
    with pytest.raises(UnsupportedError, match="whole number"):
        make()
