"""Words as people read them: subwords of every family merged, shared pieces shared out, nothing lost from the sum."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence import InfluenceModule, TracInWE
from lightning_influence.estimators.tokens import token_look_ups, token_sequences
from lightning_influence.queries.words import merge_subwords, readable, spelled
from tests.stores import EMBEDDING, VOCABULARY, Classifier, Texts, all_names, batch_of, classifier, group, replay_store

W = "words.weight"
WORDPIECE = ["[CLS]", "un", "##believ", "##able", "film", "##s", "!", "[SEP]", "[PAD]"]
SENTENCEPIECE = ["<s>", "\u2581un", "believ", "able", "\u2581film", "s", "!", "</s>"]
BYTES = ["<s>", "Un", "believ", "able", "\u0120film", "s", "!", "\u0120(", "really", ")", "</s>"]


def words_of(pieces: list[str]) -> list[str]:
    def decode(token: int) -> str:
        return pieces[token]

    return [spelled(group, decode) for group in merge_subwords(range(len(pieces)), decode)]


def test_every_family_of_subwords():
    assert words_of(WORDPIECE) == ["[CLS]", "unbelievable", "films", "!", "[SEP]", "[PAD]"]
    assert words_of(SENTENCEPIECE) == ["<s>", "unbelievable", "films", "!", "</s>"]
    assert words_of(BYTES) == ["<s>", "Unbelievable", "films", "!", "(really", ")", "</s>"]
    assert words_of(["plain", "words", "only"]) == ["plain", "words", "only"]
    assert words_of(["##ing", "word"]) == ["ing", "word"]
    assert words_of(["\u2581", "\u2581x"]) == ["\u2581", "x"]
    assert words_of([]) == []


def test_contributions_of_pieces_add_up_to_their_word():
    pairs = {(W, 1, 1): 1.0, (W, 2, 2): -3.0, (W, 4, 4): 0.5, (W, 3, 9): 0.25}
    found = readable(pairs, {W: range(9)}, [*WORDPIECE, "other"].__getitem__)
    assert [(c.word, c.tokens, c.sample_tokens, c.sample_word, c.score) for c in found] == [
        ("unbelievable", (1, 2, 3), (1, 2, 9), "unbelievother", -1.75),
        ("films", (4, 5), (4,), "films", 0.5),
    ]


def test_a_piece_of_two_words_is_shared_out():
    pieces = ["play", "##ing", "go"]
    found = readable({(W, 1, 1): 3.0}, {W: [0, 1, 2, 1, 0, 1]}, pieces.__getitem__)
    assert {c.word: c.score for c in found} == {"playing": 1.5, "going": 1.5}


def test_without_decode_tokens_stay_as_they_are():
    (found,) = readable({(W, 4, 7): 1.0}, {W: [4]}, None)
    assert (found.tokens, found.sample_tokens, found.word, found.sample_word) == ((4,), (7,), None, None)


def test_a_word_that_the_tokens_do_not_name_is_kept():
    found = readable({(W, 1, 1): 2.0, (W, 8, 8): -1.0}, {W: [1, 2]}, WORDPIECE.__getitem__)
    assert {c.word: c.score for c in found} == {"unbeliev": 2.0, "[PAD]": -1.0}


@given(
    st.lists(st.integers(0, 8), max_size=12),
    st.dictionaries(
        st.tuples(st.sampled_from([W, "v"]), st.integers(0, 8), st.integers(0, 8)), st.floats(-5, 5), max_size=10
    ),
    st.sampled_from([WORDPIECE, [*SENTENCEPIECE, "x"], BYTES]),
)
def test_the_sum_is_the_score(tokens, pairs, pieces):
    found = readable(pairs, {W: tokens, "v": tokens[::-1]}, pieces.__getitem__)
    assert sum(c.score for c in found) == pytest.approx(sum(pairs.values()), abs=1e-9)
    assert [abs(c.score) for c in found] == sorted((abs(c.score) for c in found), reverse=True)
    assert all(c.sample_tokens for c in found)


class Pairs(Classifier):
    """Two texts a sample, through one embedding."""

    def training_step(self, batch, batch_idx):
        both = torch.cat([self.features(batch["premise"]), self.features(batch["hypothesis"])], 1)
        return F.cross_entropy(both[:, :3] + both[:, 3:6], batch["label"])


def pairs_batch(dataset: Texts, positions=None):
    positions = range(len(dataset)) if positions is None else positions
    return {
        "premise": batch_of(dataset, positions)["tokens"],
        "hypothesis": batch_of(dataset, [(i + 1) % len(dataset) for i in positions])["tokens"],
        "label": torch.tensor([dataset.labels[i] for i in positions]),
    }


def test_pairs_of_texts_decoded_to_the_last_word(tmp_path):
    train, module = Texts(8), classifier(kind=Pairs)
    store = replay_store(
        tmp_path / "s",
        module,
        train,
        [module.state_dict()],
        lambda c: [group(all_names(module), 1.0)],
        parameters="word_embeddings",
        batch=pairs_batch,
    )
    influence = InfluenceModule(module, store, TracInWE())
    asked = pairs_batch(Texts(3, seed=2))
    scores, found = influence.scores(asked), influence.query(asked, k=8).proponents
    words = influence.words(asked, found.sample_ids, decode=lambda t: f"##{t}" if t % 3 == 0 else f"w{t}")
    for q, row in enumerate(words):
        texts = asked["premise"][q].tolist() + asked["hypothesis"][q].tolist()
        for k, contributions in enumerate(row):
            assert sum(c.score for c in contributions) == pytest.approx(float(found.scores[q, k]), rel=1e-10, abs=1e-16)
            assert all(set(c.tokens) <= set(texts) - {0} for c in contributions)
    assert torch.equal(scores.sort(1, descending=True).values, found.scores)
    second = [set(h.tolist()) - set(p.tolist()) for p, h in zip(asked["premise"], asked["hypothesis"], strict=True)]
    assert all({t for cs in row for c in cs for t in c.tokens} & own for row, own in zip(words, second, strict=True))


def test_token_sequences_leave_padding_out_and_count_a_repeated_look_up_once():
    module = classifier()
    batch = batch_of(Texts(4))
    with token_look_ups(module) as seen:
        module(batch)
        module(batch)
        module.embedding(torch.tensor([1, 2]))
    assert token_sequences(seen, 4) == [text.tolist() for text in Texts(4).texts]
    assert not module.embedding._forward_pre_hooks
    assert EMBEDDING == "embedding.weight"
    assert token_sequences([], 2) == [[], []]


class TwoVocabularies(Classifier):
    """Source and target words with tables of their own, in which one id is two words."""

    def __init__(self) -> None:
        super().__init__()
        self.source = torch.nn.Embedding(VOCABULARY, 4, padding_idx=0)

    def training_step(self, batch, batch_idx):
        mixed = self.embedding(batch["tokens"]).sum(1) * self.source(batch["source"]).sum(1)
        return F.cross_entropy(self.head(torch.tanh(self.hidden(mixed))), batch["label"])


def translated(dataset: Texts, positions=None):
    """The source says the target's words in the other order, one of them again."""
    batch = batch_of(dataset, positions)
    source = batch["tokens"].flip(1)
    return {**batch, "source": torch.cat([source, source[:, -1:]], 1)}


def test_two_vocabularies_stay_apart(tmp_path):
    train, module = Texts(8), classifier(kind=TwoVocabularies)
    names = [EMBEDDING, "source.weight"]
    store = replay_store(
        tmp_path / "s",
        module,
        train,
        [module.state_dict()],
        lambda c: [group(all_names(module), 1.0)],
        parameters="word_embeddings",
        batch=translated,
    )
    assert set(store.manifest.selected) == set(names)
    asked, ids = translated(train, [0, 3]), [[0, 1, 5], [3, 0, 2]]
    together = InfluenceModule(module, store, TracInWE()).words(asked, ids)
    for name in names:
        alone = InfluenceModule(module, store, TracInWE(name)).words(asked, ids)
        for mine, theirs in zip(chain(*alone), chain(*together), strict=True):
            assert mine == [c for c in theirs if c.parameter == name]
            assert len({c.tokens for c in mine}) == len(mine)
    assert {c.parameter for c in together[0][0]} == set(names)

    def decode(token: int) -> str:
        return f"##{token}" if token % 2 == 0 else f"w{token}"

    read = InfluenceModule(module, store, TracInWE()).words(asked, ids, decode)
    for q, row in enumerate(read):
        for c in chain(*row):
            text = [t for t in asked["source" if c.parameter == "source.weight" else "tokens"][q].tolist() if t]
            assert c.tokens in merge_subwords(text, decode)
    own = InfluenceModule(module, store, TracInWE()).words(asked, ids, {"source.weight": decode})
    found = {(c.parameter, c.word is None) for c in chain(*chain(*own))}
    assert found == {("source.weight", False), (EMBEDDING, True)}
