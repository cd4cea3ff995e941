"""Blocks agree with their dense form in every operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.errors import QueryError, StoreError
from lightning_influence.gradients import Dense, Factored, GradientBlock, Rows, cat, inner, pack, unpack
from lightning_influence.gradients import blocks as blocks_room

EXACT = {"rtol": 1e-10, "atol": 1e-12}
KINDS = ("dense", "factored", "grouped", "rows")
few = st.integers(1, 5)


def block(kind: str, samples: int, seed: int, *, height: int = 4, width: int = 3, length: int = 2) -> GradientBlock:
    """A random block of a parameter (height, width) in float64."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    if kind == "dense":
        return Dense(normal(samples, height, width))
    if kind == "factored":
        return Factored(normal(samples, length, width), normal(samples, length, height))
    if kind == "grouped":
        groups = 2 if height % 2 == 0 else height
        return Factored(normal(samples, length, groups * width), normal(samples, length, height), groups=groups)
    tokens = torch.randint(0, height, (samples, length), generator=source)
    return Rows.from_tokens(tokens, normal(samples, length, width), num_words=height)


def flat(part: GradientBlock) -> Tensor:
    return part.dense().flatten(1)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    train=few,
    query=few,
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    lengths=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 10**6),
)
def test_inner_is_the_product_of_the_dense_forms(
    kinds: tuple[str, str], train: int, query: int, height: int, width: int, lengths: tuple[int, int], seed: int
) -> None:
    a = block(kinds[0], train, seed, height=height, width=width, length=lengths[0])
    b = block(kinds[1], query, seed + 1, height=height, width=width, length=lengths[1])
    torch.testing.assert_close(a.inner(b), flat(b) @ flat(a).T, **EXACT)
    torch.testing.assert_close(b.inner(a), a.inner(b).T, **EXACT)
    c = block(kinds[1], train, seed + 2, height=height, width=width, length=lengths[1])
    torch.testing.assert_close(a.pairwise(c), (flat(a) * flat(c)).sum(1), **EXACT)
    torch.testing.assert_close(a.norm(), flat(a).norm(dim=1), **EXACT)
    torch.testing.assert_close(a.sum(), a.dense().sum(0), **EXACT)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    samples=few,
    more=few,
    lengths=st.tuples(few, few),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_operations_commute_with_dense(
    kinds: tuple[str, str], samples: int, more: int, lengths: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    a = block(kinds[0], samples, seed, length=lengths[0])
    b = block(kinds[1], samples, seed + 1, length=lengths[1])
    index = torch.tensor(data.draw(st.lists(st.integers(0, samples - 1), max_size=7)), dtype=torch.int64)
    weights = torch.randn(samples, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    factor = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(a.select(index).dense(), a.dense()[index], **EXACT)
    torch.testing.assert_close(a.scaled(weights).dense(), a.dense() * weights[:, None, None], **EXACT)
    torch.testing.assert_close(a.plus(b).dense(), a.dense() + b.dense(), **EXACT)
    torch.testing.assert_close(a.multiplied(factor).dense(), a.dense() * factor, **EXACT)
    c = block(kinds[1], more, seed + 2, length=lengths[1])
    joined = cat([{"w": a}, {"w": c}, {"w": a}])["w"]
    torch.testing.assert_close(joined.dense(), torch.cat([a.dense(), c.dense(), a.dense()]), **EXACT)
    assert joined.num_samples == 2 * samples + more


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), samples=few, seed=st.integers(0, 10**6))
def test_pack_and_unpack_give_the_same_blocks(kind: str, samples: int, seed: int) -> None:
    found = {"encoder.weight": block(kind, samples, seed), "b": Dense(torch.randn(samples, 2))}
    back = unpack(pack(found))
    assert list(back) == list(found) and len(back) == 2
    for name, part in found.items():
        assert type(back[name]) is type(part)
        assert back[name].shape == part.shape and back[name].dtype == part.dtype
        torch.testing.assert_close(back[name].dense(), part.dense(), rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(samples=few, length=st.integers(1, 9), k=st.integers(0, 5), seed=st.integers(0, 10**6))
def test_top_words_and_without_words(samples: int, length: int, k: int, seed: int) -> None:
    rows = block("rows", samples, seed, height=6, length=length)
    assert isinstance(rows, Rows)
    top = rows.top_words(k)
    for n in range(samples):
        mine, kept = rows.values[rows.owners == n].norm(dim=1), top.values[top.owners == n].norm(dim=1)
        torch.testing.assert_close(kept.sort().values, mine.sort(descending=True).values[:k].flip(0), **EXACT)
    gone = rows.without_words([0, 3])
    expected = rows.dense()
    expected[:, [0, 3]] = 0
    torch.testing.assert_close(gone.dense(), expected, **EXACT)
    for part in (top, gone):
        assert_sorted(part)


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 30),
    queries=st.integers(1, 30),
    words=st.integers(1, 40),
    length=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    batch=st.sampled_from([1, 64, 1 << 19]),
    rare=st.sampled_from([0, 5, 8192]),
)
def test_inverted_indices_meet_exactly_however_the_work_is_cut(
    samples: int, queries: int, words: int, length: int, seed: int, batch: int, rare: int
) -> None:
    from lightning_influence.gradients import postings

    train = block("rows", samples, seed, height=words, length=length)
    query = block("rows", queries, seed + 1, height=words, length=length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postings, "BATCH_ELEMENTS", batch)
        patch.setattr(postings, "RARE", rare)
        patch.setattr(postings, "PRODUCT_CELLS", 16)
        scores = train.inner(query)
    torch.testing.assert_close(scores, flat(query) @ flat(train).T, **EXACT)
    assert isinstance(train, Rows) and isinstance(query, Rows)


def assert_sorted(rows: Rows) -> None:
    keys = rows.words * max(1, rows.num_samples) + rows.owners
    assert bool((keys.diff() > 0).all())


def test_rows_keep_their_order_through_every_operation() -> None:
    rows = block("rows", 5, 0, height=7, length=6)
    assert isinstance(rows, Rows)
    assert_sorted(rows)
    assert_sorted(rows.select(torch.tensor([4, 0, 0, 2])))
    joined = cat([{"w": rows}, {"w": rows.select(torch.tensor([3, 1]))}])["w"]
    assert isinstance(joined, Rows)
    assert_sorted(joined)


def test_repeated_words_are_merged_and_padding_is_left_out() -> None:
    tokens = torch.tensor([[2, 2, 0], [0, 0, 0]])
    grads = torch.arange(6.0).view(2, 3, 1)
    rows = Rows.from_tokens(tokens, grads, num_words=3, padding_idx=0)
    assert rows.words.tolist() == [2] and rows.owners.tolist() == [0] and rows.values.tolist() == [[1.0]]
    assert rows.num_samples == 2
    assert rows.inner(rows).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_equal_norms_keep_the_lower_word() -> None:
    rows = Rows.from_tokens(torch.tensor([[3, 1, 2]]), torch.ones(1, 3, 2), num_words=4)
    assert rows.top_words(2).words.tolist() == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_accumulates_in_single(kind: str) -> None:
    a = block(kind, 3, 0, length=5).to(dtype=torch.bfloat16)
    wide = a.to(dtype=torch.float64)
    assert a.dtype == torch.bfloat16
    for found, expected in (
        (a.inner(a), wide.inner(wide)),
        (a.norm(), wide.norm()),
        (a.sum(), wide.sum()),
        (a.pairwise(a), wide.pairwise(wide)),
        (a.dense(), wide.dense()),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert a.scaled(torch.full((3,), 0.1)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(kind: str, bad: float) -> None:
    part = block(kind, 3, 0)
    assert part.all_finite() and part.nbytes() > 0
    assert not part.scaled(torch.tensor([1.0, bad, 1.0])).all_finite()


def test_factored_chunks_and_compacts(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = block("factored", 7, 0, length=2), block("factored", 5, 1, length=3)
    expected = flat(b) @ flat(a).T
    monkeypatch.setattr(blocks_room, "CHUNK_ELEMENTS", 16)
    torch.testing.assert_close(a.inner(b), expected, **EXACT)
    assert isinstance(a, Factored)
    assert isinstance(a.compact(), Dense)
    assert isinstance(block("factored", 2, 0, height=20, width=20, length=2).compact(), Factored)  # type: ignore[attr-defined]


def test_inner_over_parameters() -> None:
    train = {"a": block("rows", 4, 0), "b": block("dense", 4, 1), "c": block("dense", 4, 2)}
    query = {"a": block("rows", 2, 3), "b": block("factored", 2, 4)}
    expected = sum(flat(query[name]) @ flat(train[name]).T for name in query)
    torch.testing.assert_close(inner(train, query), expected, **EXACT)
    with pytest.raises(QueryError, match="'d'"):
        inner(train, {"d": block("dense", 2, 0)})
    with pytest.raises(QueryError, match="no parameter"):
        inner(train, {})


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: block("dense", 2, 0).inner(block("dense", 2, 0, height=5)),
        lambda: block("rows", 2, 0).inner(block("rows", 2, 0, height=5)),
        lambda: block("factored", 2, 0).plus(block("factored", 3, 0)),
        lambda: block("rows", 2, 0).pairwise(block("rows", 3, 0)),
        lambda: cat([]),
        lambda: cat([{"a": block("dense", 2, 0)}, {"b": block("dense", 2, 0)}]),
        lambda: cat([{"a": block("dense", 2, 0)}, {"a": block("dense", 2, 0, height=5)}]),
    ],
)
def test_blocks_that_do_not_fit_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(QueryError):
        wrong()


def test_unpack_reads_only_what_is_used() -> None:
    asked: list[str] = []

    class Lazy(dict[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            asked.append(key)
            return super().__getitem__(key)

    stored = Lazy(pack({"a": block("rows", 2, 0), "b": block("factored", 2, 0)}) | {"loss": torch.zeros(2)})
    found = unpack(stored)
    assert set(found) == {"a", "b"} and not asked
    assert found["b"].num_samples == 2
    assert {key.split("|")[1] for key in asked} == {"b"}


def test_unknown_and_torn_blocks_are_refused() -> None:
    with pytest.raises(StoreError, match="unknown form"):
        unpack({"sketch|a|values": torch.zeros(1)})
    torn = pack({"a": block("rows", 2, 0)})
    del torn["rows|a|owners"]
    with pytest.raises(StoreError, match="lack"):
        unpack(torn)["a"]


def test_empty_sides_give_empty_scores() -> None:
    for kind in KINDS:
        none = block(kind, 3, 0).select(torch.zeros(0, dtype=torch.int64))
        assert none.num_samples == 0
        assert none.inner(block(kind, 2, 1)).shape == (2, 0)
        assert block(kind, 2, 1).inner(none).shape == (0, 2)
