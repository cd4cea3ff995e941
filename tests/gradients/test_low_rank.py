"""LowRankGradients: exact at full rank, the best approximation below it, and one answer by every way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence import QueryError
from lightning_influence.gradients import Dense, Factored, LowRankGradients, cat, low_rank, pack

SIZES = st.integers(1, 4)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(q=SIZES, n=st.integers(0, 4), t=SIZES, o=SIZES, i=SIZES, rank=SIZES, groups=st.integers(1, 3))
def test_against_factors(q, n, t, o, i, rank, groups):
    """All forms of a query against factors: written out, the factors alone, and what they choose themselves."""
    train = Factored(normal(n, t, groups * i), normal(n, t, groups * o, seed=1), (groups * o, i), groups)
    query = LowRankGradients(normal(q, rank, groups * o, seed=2), normal(q, rank, i, seed=3))
    expected = query.dense().flatten(1) @ train.dense().flatten(1).T
    close(train.inner(query), expected)
    close(query._against_formed(train), expected)
    close(train.inner(Dense(query.dense())), expected)
    close(query.inner(train), expected.T)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
def test_in_pieces(monkeypatch, chunk):
    for module in ("blocks", "low_rank", "factored"):
        monkeypatch.setattr(f"lightning_influence.gradients.{module}.CHUNK_ELEMENTS", chunk, raising=False)
    train = Factored(normal(9, 2, 40), normal(9, 2, 30, seed=1))
    for rank in (1, 25):  # cheap, and dearer than writing out
        query = LowRankGradients(normal(6, rank, 30, seed=2), normal(6, rank, 40, seed=3))
        close(train.inner(query), query.dense().flatten(1) @ train.dense().flatten(1).T)
    for q in (1, 6):
        dense = Dense(normal(q, 30, 40, seed=4))
        close(train.inner(dense), dense.values.flatten(1) @ train.dense().flatten(1).T)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 2, 3)])
def test_of_full_rank_is_exact(shape):
    block = Dense(normal(4, *shape))
    whole = LowRankGradients.of(block, 100)
    assert whole.rank == min(shape[0], block.values[0, 0].numel()) and whole.shape == shape
    close(whole.dense(), block.values)
    norms = [
        float((LowRankGradients.of(block, rank).dense() - block.values).norm()) for rank in range(1, whole.rank + 1)
    ]
    assert norms == sorted(norms, reverse=True) and norms[-1] < 1e-12
    singular = torch.linalg.svdvals(block.values.flatten(2))
    assert norms[0] == pytest.approx(float(singular[:, 1:].norm()), rel=1e-10)


def test_large_matrices_are_decomposed_at_random_but_alike(monkeypatch):
    monkeypatch.setattr(low_rank, "_EXACT", 8)
    scales = 0.5 ** torch.arange(80, dtype=torch.float64)
    left, right = torch.linalg.qr(normal(90, 80)).Q, torch.linalg.qr(normal(80, 80, seed=1)).Q
    block = Dense(((left * scales) @ right)[None])
    state = torch.get_rng_state()
    found = LowRankGradients.of(block, 6)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(found.left, LowRankGradients.of(block, 6).left)
    assert float((found.dense() - block.values).norm()) < 1.01 * float(scales[6:].norm())


def test_as_a_block():
    query = LowRankGradients.of(Dense(normal(5, 4, 6)), 2)
    close(query.select(torch.tensor([3, 0, 3])).dense(), query.dense()[[3, 0, 3]])
    close(query.scaled(torch.arange(5)).dense(), query.dense() * torch.arange(5).view(5, 1, 1))
    other = LowRankGradients.of(Dense(normal(2, 4, 6, seed=1)), 3)
    joined = cat([{"w": query}, {"w": other}])["w"]
    assert isinstance(joined, LowRankGradients) and joined.rank == 3
    close(joined.dense(), torch.cat([query.dense(), other.dense()]))
    half = query.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.nbytes() * 4 == query.nbytes() and half.dense().dtype == torch.float32
    assert query.all_finite() and not query.scaled(torch.full((5,), float("nan"))).all_finite()
    close(LowRankGradients.from_tensors(query.tensors()).dense(), query.dense())
    close(query.norm(), query.dense().flatten(1).norm(dim=1))
    assert LowRankGradients.of(Dense(normal(0, 4, 6)), 2).inner(query).shape == (5, 0)


def test_what_is_refused():
    query = LowRankGradients(normal(2, 1, 4), normal(2, 1, 6))
    with pytest.raises(TypeError, match="not stored"):
        pack({"w": query})
    with pytest.raises(QueryError, match="different shapes"):
        Factored(normal(3, 1, 5), normal(3, 1, 4)).inner(query)
    for factors in ((normal(2, 4), normal(2, 6)), (normal(2, 1, 4), normal(2, 2, 6))):
        with pytest.raises(ValueError, match="factors must be"):
            LowRankGradients(*factors)
    with pytest.raises(ValueError, match="do not make"):
        LowRankGradients(query.left, query.right, (4, 7))
