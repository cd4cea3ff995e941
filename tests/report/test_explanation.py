"""Explanations from a store, and as text and as a page."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from lightning_influence import InfluenceModule, QueryError, TracIn, TracInWE
from lightning_influence.report import Description, Explanation, explain, page, save_page, text_table
from lightning_influence.report.explanation import pieces, strength
from tests.report.made_up import LONG, evidence, explanation, word
from tests.stores import Texts, batch_of, classifier, group, replay_store, trajectory

TRAIN, ASKED = Texts(), Texts(3, seed=1)


@pytest.fixture(scope="module")
def influence(tmp_path_factory: pytest.TempPathFactory) -> InfluenceModule:
    module = classifier()
    store = replay_store(
        tmp_path_factory.mktemp("report") / "store",
        module,
        TRAIN,
        trajectory(module, 2),
        lambda c: [group([name for name, _ in module.named_parameters()], 0.3)],
        parameters="word_embeddings",
    )
    return InfluenceModule(module, store, TracInWE())


def decode(token: int) -> str:
    return f"word{token}"


def text_of(dataset: Texts, position: int) -> str:
    return " ".join(decode(token) for token in dataset.texts[position].tolist())


def test_explanations_of_a_query(influence):
    batch, texts = batch_of(ASKED), [text_of(ASKED, q) for q in range(3)]
    found = explain(
        influence,
        batch,
        queries=texts,
        describe=lambda i: Description(text_of(TRAIN, i), f"class {TRAIN.labels[i]}"),
        decode=decode,
        k=2,
    )
    answer = influence.query(batch, k=2)
    for q, one in enumerate(found):
        assert one.query == Description(texts[q])
        for shown, ranking in ((one.proponents, answer.proponents), (one.opponents, answer.opponents)):
            assert [e.sample_id for e in shown] == ranking.sample_ids[q].tolist()
            assert [e.score for e in shown] == pytest.approx(ranking.scores[q].tolist(), rel=1e-10)
            for e in shown:
                assert e.sample == Description(text_of(TRAIN, e.sample_id), f"class {TRAIN.labels[e.sample_id]}")
                assert sum(c.score for c in e.words) == pytest.approx(e.score, rel=1e-10)
                assert set(e.weights()) == set(text_of(TRAIN, e.sample_id).split()) & set(texts[q].split())
        total = sum(e.score for e in (*one.proponents, *one.opponents))
        assert sum(one.weights().values()) == pytest.approx(total, rel=1e-10)


def test_without_words(influence):
    plain = InfluenceModule(influence.user, influence.store, TracIn())
    for module in (influence, plain):
        (found, *_) = explain(module, batch_of(ASKED), queries=["a", "b", "c"], describe=str, k=1)
        assert found.proponents[0].words == () and found.proponents[0].sample.text.isdigit()
        assert found.weights() == {}


def test_a_text_for_each_query(influence):
    with pytest.raises(QueryError, match="needs its text") as refused:
        explain(influence, batch_of(ASKED), queries=["only one"], describe=str, k=1)
    assert "3 texts" in str(refused.value)


def test_pieces_put_together_are_the_text():
    weights = {"tuple": 1.0, "don't": -1.0, ".": 0.25, "über": 0.5}
    text = "Don’t — don't use TUPLE-like\tÜber_x, über.\n"
    found = list(pieces(text, weights))
    assert "".join(piece for piece, _ in found) == text
    assert [(p, w) for p, w in found if w] == [("don't", -1.0), ("TUPLE", 1.0), ("über", 0.5), (".", 0.25)]
    assert list(pieces("", weights)) == []


def test_strength_is_a_share_of_the_largest():
    weights = {"a": -2.0, "b": 1.0, "c": 0.01}
    assert [strength(w, weights) for w in weights.values()] == [-1.0, 0.5, 0.0]
    assert strength(1.0, {}) == strength(0.0, {"a": 0.0}) == 0.0


def test_text_table():
    lines = text_table([explanation()], width=90, words=1).splitlines()
    assert lines[0].startswith("? Create a named tuple; a café costs $3") and lines[0].endswith(
        "[predicted: collections]"
    )
    assert lines[2:5] == [
        "  proponents",
        "      +1.25  #12     Return a new subclass of tuple named typename, which…  [collections]",
        "                     words: tuple +0.750",
    ]
    assert lines[5:8] == [
        "     +0.500  #4711   The NAMED fields & more.",
        "                     words: named +0.250",
        "   +3.4e-05  #3      no shared word",
    ]
    assert lines[-1] == "-" * 90
    assert "tuple~fields +0.250" in text_table([explanation()])
    for row in lines[:8]:
        assert len(row) <= 90
    two = evidence(1, 1.0, "text", word("tuple", 0.75), word("tuple", 0.25, parameter="source.weight"))
    assert "words: tuple (words.weight) +0.750, tuple (source.weight) +0.250" in text_table(
        [Explanation(Description("q"), (two,), ())]
    )
    assert two.weights() == {"tuple": 1.0}
    one_word = Explanation(Description("字" * 300), (), ())
    assert text_table([one_word], width=50).splitlines() == [
        "? " + "字" * 47 + "…",
        "",
        "  proponents: none",
        "  opponents: none",
        "-" * 50,
    ]
    assert text_table([]) == ""


class Page(HTMLParser):
    """Text, marked words with their shades, and tags of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.marked: dict[str, dict[str, str | None]] = {}
        self.tags: list[str] = []
        self._mark: dict[str, str | None] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "mark":
            self._mark = dict(attrs)

    def handle_data(self, data: str) -> None:
        self.words += data.split()
        if self._mark is not None:
            self.marked[data], self._mark = self._mark, None


def test_page():
    found = Page(page([explanation()], title="Why & <how>"))
    assert not {"b", "script", "how"} & set(found.tags) and "<b>text</b>" in " ".join(found.words)
    assert "Why & <how>" in " ".join(found.words)
    assert LONG.split()[-1] in found.words, "a page shows the whole text"
    assert found.marked["NAMED"] == {"style": "background: rgba(27, 120, 55, 0.70)", "title": "+0.250"}
    assert found.marked["A"] == {"style": "background: rgba(178, 24, 43, 0.70)", "title": "-0.750"}
    assert {"#12", "#4711", "#99", "+1.25", "-1.00", "+3.4e-05"} <= set(found.words)


def test_texts_cannot_break_out_of_the_page():
    evil = "</section><script>alert(1)</script>\"'{{ 7 * 7 }}"
    one = Explanation(
        Description(evil, evil), (evidence(1, 1.0, evil, word("script", 1.0), word("alert", -1.0), note=evil),), ()
    )
    found = Page(page([one], title=evil))
    assert "script" not in found.tags and found.tags.count("section") == 1
    assert " ".join(found.words).count("{{ 7 * 7 }}") == 6  # twice the title, twice each text with its note
    assert set(found.marked) == {"script", "alert"}


def test_page_without_evidence_and_without_explanations():
    assert Page(page([Explanation(Description("alone"), (), ())])).words.count("none") == 2
    assert "html" in Page(page([])).tags


def test_save_page(tmp_path):
    path = save_page([explanation()], tmp_path / "new" / "page.html", title="Über")
    assert path.read_text(encoding="utf-8") == page([explanation()], title="Über") and "中文" in path.read_text("utf-8")
