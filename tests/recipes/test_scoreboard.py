"""The scoreboard judges every method by the measures that it names, and says so where a method has no finite scores."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from lightning_influence import InfluenceModule
from lightning_influence.metrics import mislabel_detection
from recipes.benchmarks import contestants as room
from recipes.benchmarks import scoreboard
from recipes.benchmarks.contestants import Contestant, contestants, size_of
from recipes.benchmarks.peers.asked import Peer, Trained
from recipes.case_deletion import set_up_of
from recipes.deletions.fitting import Explained, fitted
from recipes.truths.retraining import Samples

TINY = [
    "data.source._target_=tests.recipes.few_texts.FewTexts", "+data.source={train: 60, test: 40}", "data.min_count=1",
    "recipe.epochs=2", "points=3", "few_points=2", "word_points=0", "sizes=[3,9]", "model.embedding_dim=4",
    "model.channels=[4]",
]  # fmt: skip

PEERS = ("kronfluence", "Captum", "TRAK", "dattri")


@dataclass
class MadeUp:
    """Peers whose place on the board is known; they remember the labels that they have seen."""

    seen: list[Tensor] = field(default_factory=list)

    def by_label(self, trained: Trained, queries: Samples, folder: Path) -> Tensor:
        """Who has the query's label; it keeps 20,000 bytes, and weights that do not count."""
        (folder / "kept").write_bytes(bytes(20_000))
        (folder / "checkpoint-0.pt").write_bytes(bytes(70_000))
        self.seen.append(trained.train.labels)
        return (queries.labels.unsqueeze(1) == trained.train.labels).float() + torch.arange(60) / 100

    def against(self, trained: Trained, queries: Samples, folder: Path) -> Tensor:
        return -self.by_label(trained, queries, folder)

    def tracin_we(self, trained: Trained, queries: Samples, folder: Path) -> Tensor:
        """TracIn-WE by plain loops, at the checkpoints and towards the class that everybody is asked about."""
        model, total = trained.copy(), torch.zeros(())
        for weights in trained.checkpoints:
            model.load_state_dict(dict(weights))
            total = total + _word_gradients(model, queries) @ _word_gradients(model, trained.train).t()
        return total

    def flips(self, trained: Trained, folder: Path) -> Tensor:
        """Which labels are not those that the scores were asked about."""
        return (trained.train.labels != self.seen[0]).float()

    def peers(self) -> list[Peer]:
        def nothing(trained: Trained, queries: Samples, folder: Path) -> Tensor:
            return torch.full((len(queries), len(trained.train)), torch.nan)

        def constant(trained: Trained, queries: Samples, folder: Path) -> Tensor:
            return torch.ones(len(queries), len(trained.train))

        def failing(trained: Trained, queries: Samples, folder: Path) -> Tensor:
            raise ZeroDivisionError

        return [
            Peer("by label", self.by_label, self.flips),
            Peer("against", self.against, lambda trained, folder: torch.full((60,), torch.nan)),
            Peer("plain", self.tracin_we, None),
            Peer("nan", nothing, None),
            Peer("constant", constant, None),
            Peer("failing", failing, None),
        ]


def _word_gradients(model: nn.Module, samples: Samples) -> Tensor:
    """Gradients (N, P) of single texts' losses by the word embeddings, padding's left out."""
    table = model.get_parameter("embedding.weight")
    rows = []
    for tokens, label in zip(samples.inputs, samples.labels, strict=True):
        loss = F.cross_entropy(model(tokens.unsqueeze(0)), label.unsqueeze(0))
        rows.append(torch.autograd.grad(loss, table)[0][1:].flatten())
    return torch.stack(rows)


@pytest.fixture
def some(monkeypatch: pytest.MonkeyPatch) -> list[Contestant]:
    """Ours, a baseline, and made-up peers."""
    monkeypatch.setattr(room, "peers", MadeUp().peers)
    wanted = {"TracIn-WE", "influence function, EK-FAC", "projected to rank 16 (LoGra)", "random"}
    wanted |= {peer.name for peer in MadeUp().peers()}
    return [contestant for contestant in contestants() if contestant.name in wanted]


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_the_table(some: list[Contestant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoreboard, "contestants", lambda: some)
    out = tmp_path / "board.md"
    arguments = ["scoreboard.py", "--cache", str(tmp_path / "truths"), "--subsets", "6", "--out", str(out), *TINY]
    monkeypatch.setattr(sys, "argv", arguments)
    scoreboard.main()
    lines = {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in _cells(out.read_text())}
    assert list(lines)[3:-1] == [contestant.name for contestant in some]
    for name in ("TracIn-WE", "influence function, EK-FAC", "projected to rank 16 (LoGra)"):
        lds, proponents, opponents, _, seconds, megabytes = lines[name]
        assert all("[" in cell for cell in (lds, proponents, opponents)), name
        assert float(seconds) > 0 and float(megabytes) > 0, name
    assert lines["plain"][:3] == lines["TracIn-WE"][:3]
    lds = float(lines["by label"][0].split()[0])
    assert lds > 0.5 and float(lines["against"][0].split()[0]) == pytest.approx(-lds, abs=1e-3)
    assert lines["by label"][3] == "1.000 [1.000, 1.000]" and lines["by label"][5] == "0.02"
    assert lines["against"][3] == "not finite"
    assert lines["nan"][:3] == ["not finite", "", ""] and lines["failing"][:3] == ["ZeroDivisionError", "", ""]
    assert lines["constant"][0].startswith("nan") and lines["constant"][1:3] == ["", ""]
    assert lines["random"][3] == "" and lines["random"][5] == "0.00"
    assert lines["out-of-fold logistic regression on tf-idf"][3] != ""


@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")  # it stops early here
def test_all_are_asked_about_the_same_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fits: list[Explained] = []

    def recorded(*arguments: object) -> Explained:
        fits.append(fitted(*arguments))  # type: ignore[arg-type]
        return fits[-1]

    monkeypatch.setattr(room, "fitted", recorded)
    with initialize_config_dir(str(scoreboard.CONFIGS), version_base="1.3"):
        set_up = set_up_of(compose("case_deletion", TINY))
    of_each = [contestant for contestant in contestants() if contestant.name.partition(",")[0] not in PEERS]
    for number, contestant in enumerate(of_each):
        contestant.scores(set_up, 0, tmp_path / str(number))
    first, *others = [fit.module.state_dict() for fit in fits]
    assert len(others) == len(of_each) - 1 >= 10
    assert all(torch.equal(other[name], weight) for other in others for name, weight in first.items())


@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")  # it stops early here
def test_a_damping_is_chosen_on_texts_that_nobody_asks_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    batches: list[Tensor] = []
    choose = InfluenceModule.choose_damping

    def recorded(module: InfluenceModule, loader: list[dict[str, Tensor]]) -> object:
        batches.append(loader[0]["tokens"])
        return choose(module, loader)

    monkeypatch.setattr(InfluenceModule, "choose_damping", recorded)
    with initialize_config_dir(str(scoreboard.CONFIGS), version_base="1.3"):
        set_up = set_up_of(compose("case_deletion", TINY))
    named = {contestant.name: contestant for contestant in contestants()}
    chosen, default = named["influence function, EK-FAC, chosen damping"], named["influence function, EK-FAC"]
    found = chosen.scores(set_up, 0, tmp_path / "chosen").values
    others = [i for i in range(len(set_up.texts.test)) if i not in set_up.positions.tolist()]
    assert torch.equal(batches[0], set_up.texts.batch(others)["tokens"]) and len(others) == 37
    (manifest,) = (tmp_path / "chosen").rglob("manifest.json")
    assert "damping" in json.loads(manifest.read_text())["facts"]
    assert not torch.allclose(found, default.scores(set_up, 0, tmp_path / "default").values)
    assert chosen.self_influence is not None
    own = chosen.self_influence(set_up, 0, tmp_path / "own").values
    assert own.shape == (60,) and bool((own > 0).all())


def test_a_peers_warnings_are_passed_on_and_its_bars_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(trained: Trained, queries: Samples, folder: Path) -> Tensor:
        sys.stderr.write("batch 1 of 9\nUserWarning: nothing fits\n")
        raise ZeroDivisionError

    monkeypatch.setattr(room, "peers", lambda: [Peer("noisy", noisy, None)])
    with initialize_config_dir(str(scoreboard.CONFIGS), version_base="1.3"):
        set_up = set_up_of(compose("case_deletion", TINY))
    with pytest.raises(ZeroDivisionError):
        contestants()[-1].scores(set_up, 0, tmp_path)
    told = capsys.readouterr().err
    assert "noisy: UserWarning: nothing fits" in told and "batch 1 of 9" not in told


def test_without_questions_for_deletions_nothing_begins(some: list[Contestant], tmp_path: Path) -> None:
    with initialize_config_dir(str(scoreboard.CONFIGS), version_base="1.3"):
        config = compose("case_deletion", [*TINY, "few_points=0"])
    with pytest.raises(ValueError, match="few_points"):
        scoreboard.rows(config, argparse.Namespace(cache=tmp_path, subsets=4))
    assert not list(tmp_path.iterdir())


def test_all_methods_have_names_of_their_own() -> None:
    names = [contestant.name for contestant in contestants()]
    assert len(names) == len(set(names)) >= 15
    assert {"random", "TracIn-WE", "gradient cosine"} <= set(names)
    assert any(name.startswith("kronfluence") for name in names) and any(name.startswith("TRAK") for name in names)


def test_auc_of_suspicion() -> None:
    suspicion, wrong = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, False, False, True])
    found = mislabel_detection(suspicion, wrong)
    assert found.auroc == 0.5
    assert scoreboard.auc_of(suspicion, wrong) == f"0.500 [{found.auroc_low:.3f}, {found.auroc_high:.3f}]"
    assert scoreboard.auc_of(suspicion * torch.nan, wrong) == "not finite"


def test_bytes_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(bytes(3))
    (tmp_path / "below" / "b").write_bytes(bytes(4))
    (tmp_path / "below" / "weights.safetensors").write_bytes(bytes(100))
    assert size_of(tmp_path) == 7


def _cells(table: str) -> list[list[str]]:
    return [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("|")]
