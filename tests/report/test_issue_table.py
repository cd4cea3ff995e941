"""The table of suspected labels: what it marks, what it writes, what it refuses."""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_influence import QueryError, StoreError
from lightning_influence.report import LabelIssues, label_issues

TEXTS = ("plain", 'with "quotes", commas', "two\nlines\r\nand more", "=1+1", "café 中文 \t\ud800", "")
LABELS = ("fine", "toxic", "fine, mostly", "fine", "toxic", "a\nb")
SCORES = torch.tensor([0.5, -2.0, 3.0, 1e-30, 3.0, 0.1])


def issues(**how: float) -> LabelIssues:
    return label_issues(SCORES, given_labels=LABELS, texts=TEXTS, **(how or {"share": 0.5}))


def test_labels_may_be_numpys(tmp_path: Path) -> None:
    found = label_issues(SCORES, share=0.5, given_labels=np.arange(6))
    assert found.given_label == tuple(range(6))
    first = json.loads(found.to_jsonl(tmp_path / "issues.jsonl").read_text().splitlines()[0])
    assert first["given_label"] == 0


def slowly_marked(scores: list[float], share: float) -> list[bool]:
    """One after the other: the highest that is left, the first of equal ones."""
    left, marked = dict(enumerate(scores)), [False] * len(scores)
    for _ in range(max(1, int(share * len(scores) + 0.5))):
        best = max(left.values())
        position = next(i for i in sorted(left) if left[i] == best)
        marked[position] = True
        del left[position]
    return marked


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.999, 1.0])
def test_a_share_marks_the_highest_scores(share: float) -> None:
    drawn = random.Random(0)
    scores = [float(drawn.randint(-5, 5)) for _ in range(41)]
    found = label_issues(torch.tensor(scores), share=share)
    assert found.is_label_issue.tolist() == slowly_marked(scores, share)
    assert found.label_score.tolist() == [-score for score in scores]
    assert sorted(found.rank.tolist()) == list(range(1, 42))
    by_rank = [scores[position] for position in found.rank.argsort().tolist()]
    assert by_rank == sorted(scores, reverse=True)
    assert set(found.suspected.tolist()) == {i for i, marked in enumerate(slowly_marked(scores, share)) if marked}


def test_a_low_score_is_bad_and_suspects_come_first() -> None:
    found = issues()
    assert found.label_score[found.is_label_issue].max() <= found.label_score[~found.is_label_issue].min()
    assert found.suspected.tolist() == [2, 4, 0]
    assert found.rank[found.suspected].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("threshold", "marked"), [(3.0, [2, 4]), (0.5, [2, 4, 0]), (4, []), (-2.0, [2, 4, 0, 5, 3, 1])]
)
def test_a_threshold_marks_what_reaches_it(threshold: float, marked: list[int]) -> None:
    assert issues(threshold=threshold).suspected.tolist() == marked


def test_the_samples_order_does_not_matter_where_scores_differ() -> None:
    scores, order = torch.randn(30), torch.randperm(30)
    found, shuffled = label_issues(scores, share=0.3), label_issues(scores[order], share=0.3)
    assert torch.equal(found.is_label_issue[order], shuffled.is_label_issue)
    assert torch.equal(found.rank[order], shuffled.rank)


def test_csv_comes_back_whole(tmp_path: Path) -> None:
    found = issues()
    path = found.to_csv(tmp_path / "new" / "issues.csv")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["sample_id", "is_label_issue", "label_score", "rank", "given_label", "text"]
    assert [int(row["sample_id"]) for row in rows] == list(range(6))
    assert [row["is_label_issue"] == "True" for row in rows] == found.is_label_issue.tolist()
    assert [float(row["label_score"]) for row in rows] == found.label_score.tolist()  # to the last bit
    assert [int(row["rank"]) for row in rows] == found.rank.tolist()
    assert [row["given_label"] for row in rows] == list(LABELS)
    assert [row["text"] for row in rows] == [text.replace("\ud800", "\\ud800") for text in TEXTS]


def test_jsonl_comes_back_whole(tmp_path: Path) -> None:
    found = issues()
    path = found.to_jsonl(tmp_path / "issues.jsonl")
    rows = [json.loads(line) for line in path.read_bytes().decode("utf-8").splitlines()]
    assert [row["is_label_issue"] for row in rows] == found.is_label_issue.tolist()
    assert [row["label_score"] for row in rows] == found.label_score.tolist()
    assert [row["given_label"] for row in rows] == list(LABELS)
    assert [row["text"] for row in rows] == list(TEXTS)


def test_what_was_not_told_has_no_column(tmp_path: Path) -> None:
    found = label_issues(SCORES, share=0.5, given_labels=torch.tensor([1, 0, 2, 1, 0, 1]))
    assert found.columns == ("sample_id", "is_label_issue", "label_score", "rank", "given_label")
    rows = [json.loads(line) for line in found.to_jsonl(tmp_path / "issues.jsonl").read_text().splitlines()]
    assert [row["given_label"] for row in rows] == [1, 0, 2, 1, 0, 1] and "text" not in rows[0]
    assert label_issues(SCORES, share=0.5).columns == ("sample_id", "is_label_issue", "label_score", "rank")


def test_nothing_is_left_of_a_table_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = issues().to_csv(tmp_path / "issues.csv")
    before = path.read_bytes()

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="no space left"):
        issues(threshold=100.0).to_csv(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["issues.csv"]


def test_people_read_the_worst_first() -> None:
    found = label_issues(SCORES, share=0.5, given_labels=LABELS, texts=[*TEXTS[:4], "word " * 40, ""])
    lines = str(found).splitlines()
    assert lines[0] == "3 of 6 labels are suspected"
    assert lines[1].split() == list(found.columns)
    assert lines[2].split()[:4] == ["2", "True", "-3", "1"] and "two lines and more" in lines[2]
    assert len(lines) == 7 and len(lines[3]) < 130 and lines[3].endswith("…")
    assert len(found.head(2).splitlines()) == 3 and len(found) == 6


@pytest.mark.parametrize(
    ("scores", "how", "said"),
    [
        (torch.tensor([1.0, torch.nan]), {"share": 0.5}, "NaN"),
        (torch.tensor([1.0, torch.inf]), {"share": 0.5}, "infinity"),
        (torch.zeros(0), {"share": 0.5}, "shape"),
        (torch.zeros(2, 2), {"share": 0.5}, "shape"),
        (SCORES, {}, "share=None"),
        (SCORES, {"share": 0.5, "threshold": 1.0}, "threshold=1.0"),
        (SCORES, {"share": 0.0}, "share=0.0"),
        (SCORES, {"share": 1.5}, "share=1.5"),
        (SCORES, {"share": torch.nan}, "share=nan"),
        (SCORES, {"threshold": torch.nan}, "threshold=nan"),
        (SCORES, {"share": 0.5, "texts": TEXTS[:5]}, "texts and scores"),
        (SCORES, {"share": 0.5, "texts": "abcdef"}, "texts and scores"),
        (SCORES, {"share": 0.5, "given_labels": [0] * 7}, "given_labels and scores"),
        (SCORES, {"share": 0.5, "given_labels": []}, "given_labels and scores"),
    ],
)
def test_what_cannot_be_is_refused(scores: torch.Tensor, how: dict[str, object], said: str) -> None:
    with pytest.raises(QueryError, match=said):
        label_issues(scores, **how)  # type: ignore[arg-type]
