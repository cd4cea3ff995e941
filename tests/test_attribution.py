"""Top-k against a full sort, however scores are cut into blocks; attributions joined, cut, saved and refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence import Attribution, QueryError, Ranking, StoreError
from lightning_influence.attribution import TopK, attribute, score_matrix
from lightning_influence.estimators import Attributor, Queries, ScoreBlock, Stage
from tests.stores import Texts, all_names, classifier, group, replay_store


@st.composite
def blocks(draw: st.DrawFn):
    """Scores with many ties, cut into blocks of samples and of queries, in any order."""
    q, n = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    values = draw(st.lists(st.integers(-3, 3), min_size=q * n, max_size=q * n))
    scores = torch.tensor(values, dtype=draw(st.sampled_from([torch.float32, torch.float64]))).view(q, n)
    cuts = sorted(draw(st.sets(st.integers(1, max(1, n - 1)), max_size=5)))
    bounds = [0, *(c for c in cuts if c < n), n]
    spans = draw(st.permutations(list(pairwise(bounds))))
    middle = draw(st.integers(0, q))
    rows = [slice(a, b) for a, b in ((0, middle), (middle, q)) if a < b]
    return scores, [(r, torch.arange(*span)) for span in spans for r in rows], draw(st.integers(1, n))


@settings(max_examples=200, deadline=None)
@given(blocks(), st.booleans())
def test_top_k_is_a_sort_with_ties_by_position(drawn, largest):
    scores, parts, k = drawn
    top = TopK(len(scores), k, largest=largest)
    for rows, ids in parts:
        top.update(rows, ids, scores[rows][:, ids])
    found = top.ranking()
    best, order = torch.sort(scores, dim=1, descending=largest, stable=True)
    assert torch.equal(found.scores, best[:, :k])
    assert torch.equal(found.sample_ids, order[:, :k])
    assert found.scores.dtype == scores.dtype


@settings(deadline=None)
@given(blocks(), st.randoms())
def test_samples_of_a_block_may_come_in_any_order(drawn, random):
    scores, _, k = drawn
    ids = list(range(scores.shape[1]))
    random.shuffle(ids)
    top = TopK(len(scores), k)
    top.update(slice(0, len(scores)), torch.tensor(ids), scores[:, ids])
    assert torch.equal(top.ranking().sample_ids, scores.sort(dim=1, descending=True, stable=True).indices[:, :k])


def test_k_out_of_range():
    with pytest.raises(QueryError, match="positive"):
        TopK(2, 0)
    top = TopK(2, 4)
    top.update(slice(0, 2), torch.arange(3), torch.ones(2, 3))
    with pytest.raises(QueryError, match="exceeds") as refused:
        top.ranking()
    assert refused.value.expected == "k <= 3" and refused.value.found == "k = 4"


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7, 19])
def test_scores_that_are_no_numbers(tmp_path, wrong, place):
    class Broken(Attributor):
        def score_blocks(self, stage: Stage, queries: Queries) -> Iterator[ScoreBlock]:
            scores = torch.randn(2, 20)
            scores[1, place] = wrong
            yield ScoreBlock(slice(0, 2), torch.arange(20), scores)

    module = classifier()
    stage = Stage(
        replay_store(
            tmp_path / "s", module, Texts(20), [module.state_dict()], lambda c: [group(all_names(module), 1.0)]
        )
    )
    queries = Queries([None], [2], lambda at, names: {})
    with pytest.raises(QueryError, match="NaN or infinite") as refused:
        attribute(stage, Broken(), queries, 3)
    assert "first at 1" in str(refused.value)
    with pytest.raises(QueryError, match="NaN or infinite"):
        score_matrix(stage, Broken(), queries)


def ranking(q: int, k: int, seed: int = 0) -> Ranking:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (q, k), generator=generator)
    return Ranking(ids, torch.randn(q, k, generator=generator))


def test_joined_orders_by_query_and_takes_each_once():
    whole = Attribution(torch.arange(6), ranking(6, 3), ranking(6, 3, 1))
    parts = [whole[torch.tensor([4, 0])], whole[torch.tensor([3, 5, 1])], whole[torch.tensor([2, 0])]]
    joined = Attribution.joined(parts)
    assert torch.equal(joined.query_ids, whole.query_ids)
    for side in ("proponents", "opponents"):
        assert torch.equal(getattr(joined, side).sample_ids, getattr(whole, side).sample_ids)
        assert torch.equal(getattr(joined, side).scores, getattr(whole, side).scores)


def test_slices_of_an_attribution():
    whole = Attribution(torch.arange(4), ranking(4, 2), ranking(4, 2, 1))
    assert len(whole) == 4 and repr(whole) == "Attribution(4 queries, k=2)"
    assert whole[1:3].query_ids.tolist() == [1, 2]
    for index in (2, -2):
        assert len(whole[index]) == 1 and whole[index].query_ids.tolist() == [2]
        assert torch.equal(whole[index].opponents.scores, whole.opponents.scores[2:3])
    assert [int(one.query_ids) for one in whole] == [0, 1, 2, 3]
    assert [int(whole[-1].query_ids), int(whole[3].query_ids)] == [3, 3]
    with pytest.raises(IndexError):
        whole[4]
    assert torch.equal(whole.proponents[2].sample_ids, whole.proponents.sample_ids[2])


def test_an_attribution_is_empty_until_it_is_scored():
    answer = Attribution(torch.arange(3))
    assert repr(answer) == "Attribution(3 queries, not scored yet)"
    for read in (lambda: answer.proponents, lambda: answer.opponents, lambda: answer[0], lambda: list(answer)):
        with pytest.raises(QueryError, match="not been scored yet"):
            read()
    answer.fill(ranking(3, 2), ranking(3, 2, 1))
    assert answer.proponents.scores.shape == (3, 2)


def test_saved_and_loaded(tmp_path):
    whole = Attribution(torch.arange(4), ranking(4, 2), ranking(4, 2, 1))
    path = tmp_path / "answers.safetensors"
    whole.save(path)
    whole.save(path)
    found = Attribution.load(path)
    assert torch.equal(found.query_ids, whole.query_ids)
    assert torch.equal(found.opponents.scores, whole.opponents.scores)
    assert torch.equal(found.proponents.sample_ids, whole.proponents.sample_ids)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StoreError, match="holds no attribution"):
        Attribution.load(tmp_path / "nothing")
    path.write_bytes(b"\x80\x04 not a tensor")
    with pytest.raises(StoreError, match="holds no attribution"):
        Attribution.load(path)
