"""TracIn-WE word by word against explicit loops in float64: every option, every summand, synonyms one to one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence import InfluenceModule, QueryError, TracIn, TracInLast, TracInWE
from lightning_influence.estimators.word_matching import Neighbours, SynonymRows, matches_of_pairs
from lightning_influence.gradients import Rows
from tests import reference
from tests.stores import (
    EMBEDDING,
    Texts,
    all_names,
    batch_of,
    classifier,
    group,
    in_flight_store,
    loss_of_one,
    replay_store,
    singles,
    tokens_of,
    trajectory,
)

TRAIN, ASKED = Texts(), Texts(5, seed=1)
RATES = (0.3, 0.1, 0.05)
OPTIONS = {
    "plain": {},
    "exclude_tokens": {"exclude": [2, 3, 5, 7, 11]},
    "top_words": {"top_words": 2},
    "both": {"exclude": [2, 3, 5, 7, 11], "top_words": 3},
    "synonyms": {"synonyms": 0.3},
    "all": {"exclude": [2, 3], "top_words": 4, "synonyms": 0.2},
}


def estimator(options: dict, **more: object) -> TracInWE:
    renamed = {{"exclude": "exclude_tokens"}.get(name, name): value for name, value in options.items()}
    return TracInWE(unmatched="zeros", **renamed, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory):
    module = classifier()
    states = trajectory(module, 3)
    root = tmp_path_factory.mktemp("we") / "store"
    return module, states, replay_store(root, module, TRAIN, states, lambda c: [group(all_names(module), RATES[c])])


def truth_of(fit, options: dict) -> list[list[dict[tuple[int, int], float]]]:
    checkpoints = list(zip(fit[1], RATES, strict=True))
    sets = (singles(TRAIN), singles(ASKED))
    return reference.tracin_we(fit[0], loss_of_one, checkpoints, *sets, tokens_of, EMBEDDING, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scores_and_words_equal_the_explicit_loops(fit, options):
    truth = truth_of(fit, options)
    influence = InfluenceModule(fit[0], fit[2], estimator(options))
    scores = influence.scores(batch_of(ASKED))
    sums = torch.tensor([[sum(pairs.values()) for pairs in row] for row in truth], dtype=torch.float64)
    torch.testing.assert_close(scores, sums, rtol=1e-10, atol=1e-15)
    everything = torch.arange(len(TRAIN)).expand(len(ASKED), -1)
    for q, row in enumerate(influence.words(batch_of(ASKED), everything)):
        for z, found in enumerate(row):
            pairs = {(c.tokens[0], c.sample_tokens[0]): c.score for c in found}
            assert pairs.keys() == truth[q][z].keys()
            assert pairs == pytest.approx(truth[q][z], rel=1e-10)
            assert sum(pairs.values()) == pytest.approx(float(scores[q, z]), rel=1e-10, abs=1e-16)


def test_synonyms_really_met(fit):
    truth = truth_of(fit, OPTIONS["synonyms"])
    assert sum(w != v for row in truth for pairs in row for w, v in pairs) > 20


def test_all_words_is_tracin_of_the_embedding(fit):
    batch = batch_of(ASKED)
    a, b = (InfluenceModule(fit[0], fit[2], e).scores(batch) for e in (TracInWE(), TracIn(EMBEDDING)))
    assert torch.equal(a, b)


def test_words_in_flight_sum_over_the_times_a_sample_was_seen(tmp_path):
    module = classifier()
    states, groups = trajectory(module, 3), [group(all_names(module), 0.1)]
    records = [(1, 0, states[1], [0.1], 2.0), (1, 4, states[1], [0.1], 2.0), (2, 0, states[2], [0.2], 4.0)]
    store = in_flight_store(tmp_path / "s", module, TRAIN, [(0, states[0], groups)], records)
    for options in ({}, {"synonyms": 0.3}):
        influence = InfluenceModule(module, store, estimator(options))
        scores = influence.scores(batch_of(ASKED))
        words = influence.words(batch_of(ASKED), [[0, 4, 0, 9]] * len(ASKED))
        for q, row in enumerate(words):
            for z, found in zip((0, 4, 0, 9), row, strict=True):
                assert sum(c.score for c in found) == pytest.approx(float(scores[q, z]), rel=1e-10, abs=1e-18)
            assert row[0] == row[2] and row[3] == []
        with pytest.raises(QueryError, match="does not hold these samples"):
            influence.words(batch_of(ASKED), [[99]] * len(ASKED))


@pytest.mark.parametrize("most", [1 << 30, 8 * len(ASKED) * len(TRAIN)])
def test_samples_that_were_never_trained_on_are_not_ranked(tmp_path, monkeypatch, most):
    monkeypatch.setattr("lightning_influence.estimators.estimator._MOST_BYTES", most)
    module = classifier()
    states, groups = trajectory(module, 3), [group(all_names(module), 0.1)]
    records = [(1, 7, states[1], [0.1], 2.0), (1, 4, states[1], [0.1], 2.0), (2, 7, states[2], [0.2], 4.0)]
    records += [(2, 11, states[2], [0.2], 4.0)]
    saved = [(0, states[0], groups), (1, states[1], groups)]
    store = in_flight_store(tmp_path / "s", module, TRAIN, saved, records)
    influence = InfluenceModule(module, store, estimator({}))
    scores, own = influence.scores(batch_of(ASKED)), influence.self_influence()
    assert scores.shape == (len(ASKED), len(TRAIN)) and own.shape == (len(TRAIN),)
    seen = torch.isin(torch.arange(len(TRAIN)), torch.tensor([4, 7, 11]))
    assert (scores[:, ~seen] == 0).all() and (own[~seen] == 0).all()
    assert (scores[:, seen] != 0).any(0).all() and (own[seen] > 0).all()
    found = influence.query(batch_of(ASKED), k=3)
    for side, largest in ((found.proponents, True), (found.opponents, False)):
        order = scores[:, seen].sort(dim=1, descending=largest, stable=True)
        assert torch.equal(side.scores, order.values)
        assert torch.equal(side.sample_ids, torch.tensor([4, 7, 11])[order.indices])
    with pytest.raises(QueryError, match="were trained on") as refused:
        influence.query(batch_of(ASKED), k=4)
    assert refused.value.expected == "k <= 3"


# Queries without a shared word, and what is refused


def test_a_query_that_shares_no_word(fit):
    alone = {"tokens": torch.tensor([[23, 23]]), "label": torch.tensor([0])}
    everywhere = list(range(1, 24))
    with pytest.raises(QueryError, match="score 0 against every") as refused:
        InfluenceModule(fit[0], fit[2], TracInWE(exclude_tokens=everywhere)).query(alone, k=2)
    assert refused.value.expected and refused.value.found and "unmatched='zeros'" in str(refused.value)
    with pytest.raises(QueryError, match="score 0 against every"):
        InfluenceModule(fit[0], fit[2], TracInWE(exclude_tokens=everywhere)).scores(alone)
    zeros = InfluenceModule(fit[0], fit[2], TracInWE(exclude_tokens=everywhere, unmatched="zeros"))
    assert (zeros.scores(alone) == 0).all()
    found = zeros.query(alone, k=3)
    assert found.proponents.sample_ids.tolist() == [[0, 1, 2]] == found.opponents.sample_ids.tolist()
    assert zeros.words(alone, [[0, 1]]) == [[[], []]]


@pytest.mark.parametrize(
    "options",
    [
        {"top_words": 0},
        {"top_words": "3"},
        {"top_words": 2.0},
        {"synonyms": 0.0},
        {"synonyms": 1.5},
        {"synonyms": "0.8"},
        {"unmatched": "ignore"},
        {"exclude_tokens": ["the"]},
        {"exclude_tokens": "the"},
        {"exclude_tokens": 3},
        {"exclude_tokens": [0.5]},
        {"exclude_tokens": torch.tensor([0.5])},
    ],
    ids=str,
)
def test_options_out_of_range(options):
    with pytest.raises(QueryError) as refused:
        TracInWE(**options)
    assert "HINT" in str(refused.value) and refused.value.expected


def test_excluded_tokens_as_a_tensor(fit):
    batch, words = batch_of(ASKED), [5, 2, 2, 11]
    asked = [
        InfluenceModule(fit[0], fit[2], TracInWE(exclude_tokens=w)) for w in (words, torch.tensor(words), {2, 5, 11})
    ]
    first, *others = [influence.scores(batch) for influence in asked]
    assert all(torch.equal(first, other) for other in others)


def test_words_of_what_has_none(fit):
    batch = batch_of(ASKED)
    with pytest.raises(QueryError, match="have no words"):
        InfluenceModule(fit[0], fit[2], TracInLast()).words(batch, [[0]] * len(ASKED))
    with pytest.raises(QueryError, match="no word-wise"):
        InfluenceModule(fit[0], fit[2], TracInWE("head.weight")).scores(batch)
    influence = InfluenceModule(fit[0], fit[2], TracInWE())
    for ids in ([[0, 99]] * len(ASKED), [[-1]] * len(ASKED)):
        with pytest.raises(QueryError, match="does not hold these samples"):
            influence.words(batch, ids)
    for wrong in ([[0]], torch.zeros(len(ASKED)), torch.zeros(len(ASKED), 1)):
        with pytest.raises(QueryError, match="must name some samples"):
            influence.words(batch, wrong)


# Synonym matching against the greedy loop


def rows_of(texts: list[dict[int, list[float]]], num_words: int) -> Rows:
    entries = [(w, n, row) for n, text in enumerate(texts) for w, row in text.items()]
    words, owners = torch.tensor([e[0] for e in entries]).long(), torch.tensor([e[1] for e in entries]).long()
    values = torch.tensor([e[2] for e in entries], dtype=torch.float64).reshape(-1, 2)
    return Rows.from_pairs(words, owners, values, num_samples=len(texts), num_words=num_words)


@st.composite
def collections(draw: st.DrawFn) -> tuple[list, list, torch.Tensor, float]:
    """Texts over eight words whose embeddings lie on a coarse grid, so that equal cosines are common."""
    grid = st.integers(-2, 2)
    embedding = torch.tensor(draw(st.lists(st.tuples(grid, grid), min_size=8, max_size=8)), dtype=torch.float64)
    row = st.lists(st.floats(-2, 2), min_size=2, max_size=2)
    texts = st.lists(st.dictionaries(st.integers(0, 7), row, max_size=6), min_size=1, max_size=4)
    return draw(texts), draw(texts), embedding, draw(st.sampled_from([0.05, 0.5, 0.9, 1.0]))


@settings(max_examples=150, deadline=None)
@given(collections())
def test_one_to_one_matching_is_the_greedy_choice(drawn):
    asked, known, embedding, threshold = drawn
    neighbours = Neighbours(embedding, threshold)
    query, train = SynonymRows.of(rows_of(asked, 8), neighbours), rows_of(known, 8)
    scores = train.inner(query)
    pairs = [(q, n) for q in range(len(asked)) for n in range(len(known))]
    aligned = [torch.tensor([p[side] for p in pairs]) for side in (0, 1)]
    meetings: list[set[tuple[int, int]]] = [set() for _ in pairs]
    for matches in matches_of_pairs(query.select(aligned[0]), train.select(aligned[1])):
        for at, w, v in zip(matches.queries, matches.query_words, matches.sample_words, strict=True):
            meetings[int(at)].add((int(w), int(v)))
    for at, (q, n) in enumerate(pairs):
        exact = set(asked[q]) & set(known[n])
        greedy = explicit(asked[q], known[n], neighbours)
        assert meetings[at] == {(w, w) for w in exact} | set(greedy)
        truth = sum(a * b for w, v in meetings[at] for a, b in zip(asked[q][w], known[n][v], strict=True))
        assert float(scores[q, n]) == pytest.approx(truth, rel=1e-9, abs=1e-12)


def explicit(mine: dict, theirs: dict, neighbours: Neighbours) -> list[tuple[int, int]]:
    """The greedy loop; cosines as the library computes them, since on a grid their ties decide."""

    def candidates() -> Iterator[tuple[float, int, int]]:
        for w in set(mine) - set(theirs):
            _, near, cosine = neighbours.of(torch.tensor([w]))
            yield from ((-c, w, v) for v, c in zip(near.tolist(), cosine.tolist(), strict=True) if v in theirs)

    pairs: list[tuple[int, int]] = []
    for _, w, v in sorted(candidates()):
        if v not in mine and all(w != a and v != b for a, b in pairs):
            pairs.append((w, v))
    return pairs


def test_matching_does_not_depend_on_how_queries_are_cut(fit, monkeypatch):
    influence = InfluenceModule(fit[0], fit[2], estimator(OPTIONS["all"]))
    whole = influence.scores(batch_of(ASKED))
    monkeypatch.setattr("lightning_influence.estimators.word_matching._CANDIDATES", 7)
    assert torch.equal(influence.scores(batch_of(ASKED)), whole)
