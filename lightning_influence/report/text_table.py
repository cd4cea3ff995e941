"""Explanations as plain text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_influence.report.explanation import Description, Evidence, Explanation, signed

_LEAST_TEXT = 20  # characters


def text_table(explanations: Sequence[Explanation], *, width: int = 100, words: int = 4) -> str:
    """Each query with its proponents and opponents, a line or two each, and the words that carry the score.

    Args:
        width: characters a line.
        words: words named for each sample, those of the largest contributions; with the name of their embedding weight
            where several take part.
    """
    lines: list[str] = []
    for explanation in explanations:
        lines += [_line("? ", explanation.query, width), ""]
        for title, side in (("proponents", explanation.proponents), ("opponents", explanation.opponents)):
            lines.append(f"  {title}" if side else f"  {title}: none")
            for evidence in side:
                lead = f"  {signed(evidence.score):>9}  #{evidence.sample_id:<6} "
                lines.append(_line(lead, evidence.sample, width))
                if evidence.words:
                    lines.append(" " * len(lead) + _words(evidence, words))
        lines.append("-" * width)
    return "\n".join(lines)


def _words(evidence: Evidence, most: int) -> str:
    shown, several = [], len({c.parameter for c in evidence.words}) > 1
    for c in evidence.words[:most]:
        own = c.word or str(c.tokens[0])
        both = own if c.sample_word in (None, own) else f"{own}~{c.sample_word}"
        shown.append(f"{both}{f' ({c.parameter})' if several else ''} {signed(c.score)}")
    return "words: " + ", ".join(shown)


def _line(lead: str, said: Description, width: int) -> str:
    note = f"  [{said.note}]" if said.note else ""
    return lead + _cut(" ".join(said.text.split()), max(_LEAST_TEXT, width - len(lead) - len(note))) + note


def _cut(text: str, room: int) -> str:
    """The text, or as much of it as fits with a sign that there was more; at a space, if there is one near the end.

    >>> _cut("a named tuple with fields", 12), _cut("antidisestablishmentarianism", 12)
    ('a named…', 'antidisesta…')
    """
    if len(text) <= room:
        return text
    head = text[:room]
    space = head.rfind(" ")
    return (head[:space] if space > room // 2 else head[:-1]) + "…"
