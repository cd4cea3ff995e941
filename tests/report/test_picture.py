"""Pictures: every word where it belongs, in its shade, and nothing that a text contains breaks them."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from lightning_influence import UnsupportedError
from lightning_influence.report import Description, Explanation, picture
from lightning_influence.report.picture import FAINT, OPPONENT, PROPONENT
from tests.report.made_up import LONG, evidence, explanation, word


@pytest.fixture(autouse=True)
def canvas() -> Iterator[None]:
    before = plt.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


def drawn(figure: Any) -> int:
    """Bytes of the picture; a warning while it is drawn is an error."""
    file = io.BytesIO()
    figure.savefig(file)
    return len(file.getvalue())


def shades(axes: Any) -> dict[str, tuple[str, float]]:
    """Shaded word -> (colour, how strongly)."""
    boxed = [(t.get_text(), t.get_bbox_patch()) for t in axes.texts]
    return {text: (to_hex(box.get_facecolor()), box.get_facecolor()[3]) for text, box in boxed if box is not None}


def test_words_are_shaded_by_what_they_contribute():
    figure, axes = picture(explanation())
    found = shades(axes)
    assert found["NAMED"][0] == PROPONENT and found["A"][0] == OPPONENT
    assert found["tuple"][0] == OPPONENT  # as it is in the last text
    assert found["NAMED"][1] == pytest.approx(0.72) and found["tuple"][1] == pytest.approx(0.12 + 0.6 / 3)
    assert not {"subclass", " ", "$"} & set(found)
    said = [t.get_text() for t in axes.texts]
    for text in ("query", "+1.25", "#12", "#4711", "+3.4e-05", "-1.00", "   predicted: collections"):
        assert text in said
    assert drawn(figure) > 5000


def test_long_texts_are_cut_and_keep_their_note():
    one = Explanation(Description("why"), (evidence(12, 1.0, LONG, note="collections"),), ())
    heights = []
    for lines in (1, 2, 20):
        figure, axes = picture(one, lines=lines)
        said = [t for t in axes.texts if t.get_position()[0] >= 2.0]
        cut = [t for t in said if t.get_text() == "…"]
        (note,) = [t for t in said if t.get_text().strip() == "collections"]
        assert note.get_color() == FAINT
        assert bool(cut) == (lines < 20)
        assert len({t.get_position()[1] for t in said if t.get_text() not in ("why", "none")}) <= lines
        heights.append(figure.get_size_inches()[1])
        drawn(figure)
        renderer, right = figure.canvas.get_renderer(), figure.bbox.width
        assert all(t.get_window_extent(renderer).x1 <= right for t in axes.texts)
        if lines == 20:
            shown = "".join(t.get_text() for t in said)
            assert "".join(LONG.split()) in "".join(shown.split())
    assert heights == sorted(heights) and len(set(heights)) == 3


@pytest.mark.parametrize(
    "text", ["$", "$5 and $10", r"$\frac{1}{2}$ \alpha_", "中文 🎉 שלום", "tab\tand\nline", "", " ", "​"]
)
def test_no_text_breaks_a_picture(text):
    one = Explanation(Description(text, text), (evidence(0, 1.0, text, word(text, 1.0), note=text),), ())
    figure, axes = picture(one)
    assert drawn(figure) > 1000
    said = "".join(t.get_text() for t in axes.texts)
    assert "".join(c if ord(c) < 128 else "" for c in "".join(text.split())) in "".join(said.split())


def test_no_evidence_and_scores_that_are_no_words():
    figure, axes = picture(Explanation(Description("why"), (), ()))
    assert [t.get_text() for t in axes.texts].count("none") == 2 and drawn(figure)
    zero = Explanation(Description("why"), (evidence(0, 0.0, "why", word("why", 0.0)),), ())
    assert shades(picture(zero)[1]) == {}


def test_on_a_canvas_that_is_no_screen(tmp_path):
    plt.switch_backend("svg")
    figure, _ = picture(explanation())
    figure.savefig(tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text(encoding="utf-8")


def test_without_matplotlib(monkeypatch):
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "matplotlib")
    with pytest.raises(UnsupportedError, match="need matplotlib") as refused:
        picture(explanation())
    assert "lightning-influence[plot]" in str(refused.value)
