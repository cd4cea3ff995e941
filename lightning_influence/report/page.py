"""Explanations as one HTML page that needs nothing else: every word shaded by what it contributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment

from lightning_influence.report.explanation import Explanation, pieces, signed, strength

_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
 section { border-top: 2px solid #ddd; padding: 1rem 0 }
 .query { font-size: 1.15em } .note, .id { color: #767676; font-size: .85em }
 h3 { margin: .8rem 0 .2rem; font-size: 1em } .proponents { color: #1b7837 } .opponents { color: #b2182b }
 ol { padding-left: 1.2rem } .score { font-variant-numeric: tabular-nums; font-weight: 600 }
 mark { border-radius: 3px; padding: 0 .1em; color: inherit }
</style>
<h1>{{ title }}</h1>
<p>Green words lowered the query's measurement when the model was trained on the sample, red words raised it.
 Hover over a word for its part of the score.</p>
{% macro text(description, weights) -%}
 {%- for piece, weight, style in shaded(description.text, weights) -%}
  {%- if style %}<mark style="background: {{ style }}" title="{{ signed(weight) }}">{{ piece }}</mark>
  {%- else %}{{ piece }}{% endif -%}
 {%- endfor %}{% if description.note %} <span class="note">{{ description.note }}</span>{% endif %}
{%- endmacro %}
{% for explanation in explanations %}
<section>
 <p class="query">{{ text(explanation.query, explanation.weights()) }}</p>
 {% for name, side in (("proponents", explanation.proponents), ("opponents", explanation.opponents)) %}
 <h3 class="{{ name }}">{{ name }}</h3>
 <ol>{% for evidence in side %}
  <li><span class="score">{{ signed(evidence.score) }}</span> <span class="id">#{{ evidence.sample_id }}</span>
   {{ text(evidence.sample, evidence.weights()) }}</li>{% else %}

  <li class="note">none</li>{% endfor %}

 </ol>{% endfor %}


</section>{% endfor %}
</html>
"""


_TITLE = "Which training samples made the model say this"


def page(explanations: Sequence[Explanation], *, title: str = _TITLE) -> str:
    """The page as HTML text; every text in it is escaped.

    >>> from lightning_influence.report import Description
    >>> "&lt;b&gt;" in page([Explanation(Description("<b>"), (), ())])
    True
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(shaded=_shaded, signed=signed)
    return environment.from_string(_TEMPLATE).render(explanations=explanations, title=title)


def save_page(explanations: Sequence[Explanation], path: str | Path, *, title: str = _TITLE) -> Path:
    """Write the page, in a folder that is made if it is not there; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(explanations, title=title), encoding="utf-8")
    return path


def _shaded(text: str, weights: Mapping[str, float]) -> list[tuple[str, float, str]]:
    """(piece, contribution, CSS colour or nothing)."""
    found = []
    for piece, weight in pieces(text, weights):
        part = strength(weight, weights)
        colour = "27, 120, 55" if part > 0 else "178, 24, 43"
        found.append((piece, weight, f"rgba({colour}, {0.1 + 0.6 * abs(part):.2f})" if part else ""))
    return found
