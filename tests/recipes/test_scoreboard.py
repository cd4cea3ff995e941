"""The scoreboard judges every method by the measures that it names, and says so where a method has no finite scores."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_influence.metrics import mislabel_detection
from recipes.benchmarks import contestants as room
from recipes.benchmarks import scoreboard
from recipes.benchmarks.contestants import Contestant, contestants, size_of
from recipes.benchmarks.peers.asked import Peer, Trained
from recipes.truths.retraining import Samples

TINY = [
    "data.source._target_=recipes.data.fewer_texts.FewerTexts", "+data.source.train_size=60",
    "+data.source.source={_target_: recipes.data.Docstrings}", "recipe.epochs=2", "points=3", "few_points=2",
    "sizes=[3,9]", "model.embedding_dim=4", "model.channels=[4]",
]  # fmt: skip


def by_label(trained: Trained, queries: Samples, folder: Path) -> Tensor:
    """A peer that knows which training texts have the query's label, and keeps ten bytes."""
    (folder / "kept").write_bytes(bytes(10))
    assert len(trained.checkpoints) == 2 and trained.learning_rates == [0.1, 0.1]
    final = trained.model.state_dict()
    assert all(torch.equal(value, final[name]) for name, value in trained.checkpoints[-1].items())
    return (queries.labels.unsqueeze(1) == trained.train.labels).float() + torch.arange(60) / 100


def nothing(trained: Trained, queries: Samples, folder: Path) -> Tensor:
    return torch.full((len(queries), len(trained.train)), torch.nan)


@pytest.fixture
def some(monkeypatch: pytest.MonkeyPatch) -> list[Contestant]:
    """Ours, a baseline, and two made-up peers."""

    def self_influence(trained: Trained, folder: Path) -> Tensor:
        return torch.arange(60.0)

    monkeypatch.setattr(room, "peers", lambda: [Peer("by label", by_label, self_influence), Peer("nan", nothing, None)])
    wanted = ("TracIn-WE", "influence function, EK-FAC", "projected to rank 16 (LoGra)", "random", "by label", "nan")
    return [contestant for contestant in contestants() if contestant.name in wanted]


def test_the_table(some: list[Contestant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoreboard, "contestants", lambda: some)
    out = tmp_path / "board.md"
    arguments = ["scoreboard.py", "--cache", str(tmp_path / "truths"), "--subsets", "4", "--out", str(out), *TINY]
    monkeypatch.setattr(sys, "argv", arguments)
    scoreboard.main()
    lines = {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in _cells(out.read_text())}
    assert list(lines)[3:-1] == [contestant.name for contestant in some]
    for name in ("TracIn-WE", "influence function, EK-FAC", "projected to rank 16 (LoGra)"):
        lds, deleted, auc, seconds, megabytes = lines[name]
        assert "[" in lds and "[" in deleted and 0 <= float(auc) <= 1 and float(seconds) > 0, name
        assert float(megabytes) > 0, name
    assert lines["nan"][:3] == ["scores not finite", "", ""]
    assert lines["random"][2] == "" and lines["random"][4] == "0.00"
    assert lines["by label"][4] == "0.00" and "[" in lines["by label"][0]
    assert 0 <= float(lines["out-of-fold logistic regression on tf-idf"][2]) <= 1


def test_all_methods_have_names_of_their_own() -> None:
    names = [contestant.name for contestant in contestants()]
    assert len(names) == len(set(names)) >= 15
    assert {"random", "TracIn-WE", "gradient cosine"} <= set(names)
    assert any(name.startswith("kronfluence") for name in names) and any(name.startswith("TRAK") for name in names)


def test_auc_of_suspicion() -> None:
    suspicion, wrong = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, False, False, True])
    assert float(scoreboard.auc_of(suspicion, wrong)) == mislabel_detection(suspicion, wrong).auroc == 0.5


def test_bytes_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(bytes(3))
    (tmp_path / "below" / "b").write_bytes(bytes(4))
    assert size_of(tmp_path) == 7


def _cells(table: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
