"""Explanations as a picture: texts with every word shaded by what it contributes (needs matplotlib)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning_influence.metrics.drawing import pyplot
from lightning_influence.report.explanation import Description, Evidence, Explanation, pieces, signed, strength

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROPONENT, OPPONENT, INK, FAINT = "#1b7837", "#b2182b", "#1a1a1a", "#767676"

_WIDTH, _MARGIN, _ID, _TEXT, _RIGHT, _LINE = 11.6, 0.25, 1.2, 2.0, 11.3, 0.28  # inches
_SIZE, _SMALL, _DPI = 11, 9, 130
_LONGEST_PIECE, _LONGEST_NOTE = 40, 60  # characters: an address without spaces is broken, a note is cut


def picture(explanation: Explanation, *, lines: int = 2) -> tuple[Figure, Axes]:
    """One query with its evidence; green words lowered the query's measurement, red ones raised it.

    Args:
        lines: lines of text shown of each sample; what is longer is cut.

    Returns:
        (fig, ax) of matplotlib.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    figure = pyplot().figure(figsize=(_WIDTH, 1.0), dpi=_DPI)  # the height follows when the lines are set
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    sheet = _Sheet(axes, max(1, lines))
    sheet.write(_MARGIN, 0.4, "query", weight="bold")
    y = sheet.text(0.4, explanation.query, explanation.weights())
    for title, side, colour in (
        ("proponents: training on these made it so", explanation.proponents, PROPONENT),
        ("opponents: training on these worked against it", explanation.opponents, OPPONENT),
    ):
        sheet.write(_MARGIN, y + 0.15, title, color=colour, weight="bold")
        y += 0.47
        for evidence in side:
            y = sheet.evidence(y, evidence, colour)
        if not side:
            sheet.write(_TEXT, y, "none", color=FAINT)
            y += _LINE + 0.12
    figure.set_size_inches(_WIDTH, y)
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(y, 0)
    return figure, axes


class _Sheet:
    """Sets text word by word, since matplotlib has no paragraphs with coloured words."""

    def __init__(self, axes: Axes, lines: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties

        self._axes, self._lines = axes, lines
        self._font: Any = FontProperties(size=_SIZE)  # type: ignore[no-untyped-call,unused-ignore]
        self._renderer: Any = FigureCanvasAgg(Figure(dpi=_DPI)).get_renderer()  # whatever canvas the picture is on
        self._fonts = list(_fonts(self._font))
        self._space = self._extent("||")

    def evidence(self, y: float, evidence: Evidence, colour: str) -> float:
        """Score, id and text of a sample; returns where the next entry begins."""
        self.write(_MARGIN, y, signed(evidence.score), color=colour, weight="bold")
        self.write(_ID, y, f"#{evidence.sample_id}", color=FAINT, fontsize=_SMALL)
        return self.text(y, evidence.sample, evidence.weights())

    def text(self, y: float, description: Description, weights: Mapping[str, float]) -> float:
        """A text with its words shaded, cut where the lines end, and its note; returns where the next entry begins."""
        note = textwrap.shorten(description.note, _LONGEST_NOTE, placeholder="…")
        note = f"   {note}" if note else ""
        spare, x, line = self._width("…" + note), _TEXT, 0
        for piece, weight in _broken(description.text, weights):
            last = line == self._lines - 1
            if x + self._width(piece.rstrip()) > _RIGHT - (spare if last else 0):
                if last:
                    self.write(x, y + line * _LINE, "…")
                    x += self._width("…")
                    break
                x, line, piece = _TEXT, line + 1, piece.lstrip()
            self.write(x, y + line * _LINE, piece, bbox=_shade(strength(weight, weights)))
            x += self._width(piece)
        if note and x + self._width(note) > _RIGHT:
            x, line, note = _TEXT, line + 1, note.lstrip()
        self.write(x, y + line * _LINE, note, color=FAINT)
        return y + (line + 1) * _LINE + 0.12

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        """Put text at a place; characters that no font has are drawn as boxes."""
        style = {"fontsize": _SIZE, "color": INK, "va": "center", "parse_math": False, **style}
        if text.strip():
            self._axes.text(x, y, self._drawable(text), **style)

    def _width(self, text: str) -> float:
        """Inches that the text takes up, its spaces included (hence the bars)."""
        return (self._extent(f"|{self._drawable(text)}|") - self._space) / _DPI

    def _extent(self, text: str) -> float:
        width, _, _ = self._renderer.get_text_width_height_descent(text, self._font, False)
        return float(width)

    def _drawable(self, text: str) -> str:
        return "".join(c if any(font.get_char_index(ord(c)) for font in self._fonts) else "□" for c in text)


def _broken(text: str, weights: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """The pieces of a text in one line, those too long for one broken."""
    for piece, weight in pieces(" ".join(text.split()), weights):
        for start in range(0, len(piece), _LONGEST_PIECE):
            yield piece[start : start + _LONGEST_PIECE], weight


def _shade(part: float) -> dict[str, Any] | None:
    if not part:
        return None
    colour = PROPONENT if part > 0 else OPPONENT
    return {"facecolor": colour, "alpha": 0.12 + 0.6 * abs(part), "edgecolor": "none", "pad": 1.0}


def _fonts(properties: Any) -> Iterator[Any]:
    """The installed fonts that matplotlib falls back on, in order."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findfont, get_font

    for family in properties.get_family():
        for name in rcParams.get(f"font.{family}", [family]):
            with suppress(ValueError):
                yield get_font(findfont(FontProperties(family=name), fallback_to_default=False))
