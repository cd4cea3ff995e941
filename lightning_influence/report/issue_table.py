"""Suspected wrong labels as a table: a yes or no and a score for every sample, as data-cleaning tools exchange them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.artifacts.disk import replace_file, write_all
from lightning_influence.errors import QueryError

_SHOWN, _LONGEST = 5, 60  # lines of `str()`, and characters of a text in it


@dataclass(frozen=True)
class LabelIssues:
    """Which labels are suspected, one entry for every training sample, in dataset order.

    **A low `label_score` is bad**, as in cleanlab's Datalab, whose column names these are; there it lies between 0 and
    1, here it has the unit of the scores that it was made from.

    Args:
        is_label_issue: whether the label is suspected, (N,) bool.
        label_score: minus the score of suspicion, (N,) float64.
        rank: place in the order of suspicion, (N,) int64: 1 is the most suspicious.
        given_label: the label that the sample has, a number or a name; none where it was not told.
        text: of the sample; none where it was not told.
    """

    is_label_issue: Tensor
    label_score: Tensor
    rank: Tensor
    given_label: tuple[int | str, ...] = field(default=(), repr=False)
    text: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.rank)

    def __str__(self) -> str:
        return f"{int(self.is_label_issue.sum())} of {len(self)} labels are suspected\n{self.head()}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in the order in which they are written."""
        told = [name for name in ("given_label", "text") if getattr(self, name)]
        return ("sample_id", "is_label_issue", "label_score", "rank", *told)

    @property
    def suspected(self) -> Tensor:
        """Positions of the suspected samples, the most suspicious first."""
        return self._order[self.is_label_issue[self._order]]

    def head(self, count: int = _SHOWN) -> str:
        """The most suspicious samples, a line each, for people; texts are cut."""
        rows = [[_shown(row[name]) for name in self.columns] for row in self._rows(self._order[:count].tolist())]
        widths = [max(map(len, column)) for column in zip(self.columns, *rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        heads = "  ".join(name.ljust(width) for name, width in zip(self.columns, widths, strict=True))
        return "\n".join(line.rstrip() for line in (heads, *lines))

    def to_csv(self, path: str | Path) -> Path:
        """Write all samples in dataset order as CSV (UTF-8, `True` and `False`, a head line), and return its path.

        The file is there whole or not at all; its folder is made if it is not there.

        Raises:
            StoreError: it cannot be written.
        """
        written = io.StringIO(newline="")
        table = csv.DictWriter(written, self.columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self._rows(range(len(self))))
        return _replaced(path, written.getvalue())

    def to_jsonl(self, path: str | Path) -> Path:
        """Write all samples in dataset order, a JSON object a line, and return its path; otherwise as `to_csv`.

        Raises:
            StoreError: it cannot be written.
        """
        lines = (json.dumps(row, ensure_ascii=False) for row in self._rows(range(len(self))))
        return _replaced(path, "".join(f"{line}\n" for line in lines))

    @property
    def _order(self) -> Tensor:
        return self.rank.argsort()

    def _rows(self, positions: Sequence[int]) -> Iterator[dict[str, Any]]:
        for position in positions:
            row: dict[str, Any] = {
                "sample_id": position,
                "is_label_issue": bool(self.is_label_issue[position]),
                "label_score": float(self.label_score[position]),
                "rank": int(self.rank[position]),
            }
            if self.given_label:
                row["given_label"] = self.given_label[position]
            if self.text:
                row["text"] = self.text[position]
            yield row


def label_issues(
    scores: Tensor,
    *,
    share: float | None = None,
    threshold: float | None = None,
    given_labels: Tensor | Sequence[int | str] | None = None,
    texts: Sequence[str] | None = None,
) -> LabelIssues:
    """Suspect the labels of the highest scores.

    Args:
        scores: of suspicion, (N,), high for what looks wrong: `self_influence()` as it is; minus `group_scores` of
            held-out samples; minus a margin or a probability.
        share: suspect this part of the samples, above 0 and up to 1; rounded, at least one. Equal scores in the order
            of the samples.
        threshold: suspect the samples whose score is at least this.
        given_labels: the labels that were trained on, numbers or names.
        texts: of the samples, or whatever names them.

    Raises:
        QueryError: not one of share and threshold; a share out of range; scores of another shape, none, or not finite;
            another number of labels or texts.

    >>> print(label_issues(torch.tensor([0.5, 3.0, 1.0]), share=0.4, given_labels=["toxic", "fine", "fine"]).head(2))
    sample_id  is_label_issue  label_score  rank  given_label
    1          True            -3           1     fine
    2          False           -1           2     fine
    """
    scores = scores.detach().cpu()
    if scores.dim() != 1 or not len(scores) or scores.is_complex() or not bool(scores.isfinite().all()):
        finite = bool(scores.isfinite().all())
        raise QueryError(
            "these are no scores of suspicion",
            expected="one finite real number for every training sample, (N,)",
            found=f"shape {tuple(scores.shape)}{'' if finite else ', with NaN or infinity'}",
            hint="a sample that was never seen has no score: leave it out before",
        )
    labels = getattr(given_labels, "tolist", lambda: given_labels)()  # of torch or numpy
    for what, values in (("given_labels", labels), ("texts", texts)):
        if values is not None and (isinstance(values, str) or len(values) != len(scores)):
            raise QueryError(
                f"{what} and scores are not about the same samples",
                expected=f"{len(scores)} entries",
                found=type(values).__name__ if isinstance(values, str) else len(values),
                hint="both are in the order of the training set",
            )
    scores = scores.double()
    order = scores.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, len(order) + 1)
    count = _suspected(scores, share, threshold)
    return LabelIssues(
        rank <= count, 0 - scores, rank, tuple(() if labels is None else labels), tuple(() if texts is None else texts)
    )


def _suspected(scores: Tensor, share: float | None, threshold: float | None) -> int:
    """How many are suspected, those of the highest scores."""
    one = (share is None) != (threshold is None)
    asked = threshold if share is None else share
    if not one or not isinstance(asked, Real) or (share is not None and not 0 < share <= 1) or asked != asked:
        raise QueryError(
            "how many labels are suspected is not said",
            expected="either a share above 0 and up to 1, or a threshold of the scores",
            found=f"share={share!r}, threshold={threshold!r}",
            hint="label_issues(scores, share=0.1) suspects the first tenth",
        )
    if share is None:
        return int((scores >= float(asked)).sum())
    return max(1, int(share * len(scores) + 0.5))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (bool, Integral)):
        return str(value)
    line = " ".join(str(value).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def _replaced(path: str | Path, text: str) -> Path:
    path = Path(path)
    content = text.encode("utf-8", errors="backslashreplace")  # half a character, such as a lone surrogate
    replace_file(path, lambda file: write_all(file, memoryview(content)), 0)
    return path
