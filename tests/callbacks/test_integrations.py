"""What the callback meets elsewhere: compiled and checkpointed layers, two networks, several snapshots, the CLI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_influence import GradientSnapshot
from lightning_influence.artifacts import StepRange
from tests.callbacks.fits import (
    BOTH,
    WARNINGS,
    WORDS,
    Classifier,
    Texts,
    WeightsBefore,
    dense,
    fit,
    loader,
    padded,
    seeded,
    singles,
    state_hash,
    stored,
    truth,
)
from tests.callbacks.test_bit_identity import Adversarial, points
from tests.reference import per_sample_gradients

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]
CLOSE = {"rtol": 1e-10, "atol": 1e-13}
MODES = ["replay", "in_flight"]
NAMES = ["words.weight", "hidden.weight", "head.weight"]


class Checkpointed(Classifier):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).unsqueeze(-1)
        mean = (self.words(tokens) * mask).sum(1) / mask.sum(1)
        inner = checkpoint(lambda x: torch.tanh(self.hidden(x)), mean, use_reentrant=self.reentrant)
        return self.head(inner)


class Tied(Classifier):
    """The words' weight is the output layer too, through a plain function."""

    def forward(self, tokens: Tensor) -> Tensor:
        real = (tokens != 0).unsqueeze(-1)
        return F.linear(torch.tanh((self.words(tokens) * real).sum(1)), self.words.weight)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["tokens"]), batch["label"] % WORDS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant", "tied"])
def test_layers_that_run_in_unusual_ways(tmp_path: Path, kind: str, mode: Any) -> None:
    def make() -> Classifier:
        return Tied() if kind == "tied" else Checkpointed(kind == "reentrant")

    names = ["words.weight"] if kind == "tied" else NAMES
    plain = state_hash(fit(tmp_path, seeded(make), precision="64-true", max_epochs=1))
    module, before = seeded(make), WeightsBefore()
    snapshot = GradientSnapshot(tmp_path / "store", names, mode=mode, dtype="float64")
    run = fit(tmp_path, module, snapshot, before, precision="64-true", max_epochs=1)
    assert state_hash(run) == plain
    if mode == "replay":
        at = snapshot.artifacts.checkpoints()[0]
        expected = truth(module, snapshot.artifacts.weights(at), singles(Texts()), names)
        for name in names:
            torch.testing.assert_close(stored(snapshot.artifacts, name), expected[name], **CLOSE)
        return
    (shard,) = snapshot.artifacts.shards(StepRange(0, 99))
    for row, (position, step) in enumerate(zip(shard.sample_ids.tolist(), shard.records["step"].tolist(), strict=True)):
        expected = truth(module, before.at[step - 1], singles(Texts(), [position]), names)
        for name in names:
            torch.testing.assert_close(dense(shard, name)[row], expected[name][0], **CLOSE)


@pytest.mark.parametrize("toggle", [True, False])
@pytest.mark.parametrize("which", ["judge", "generator"])
def test_of_two_losses_in_flight_takes_the_one_that_trains_the_layer(tmp_path: Path, which: str, toggle: bool) -> None:
    """The generator's turn comes first and passes through the judge, which is trained by its own loss."""
    if not toggle and which == "judge":
        pytest.skip("without toggling, nothing tells the judge's loss from the generator's that comes first")
    module, before = seeded(lambda: Adversarial(toggle, generator_first=True)), WeightsBefore()
    name = f"{which}.0.weight"
    snapshot = GradientSnapshot(tmp_path / "store", name, mode="in_flight", dtype="float64")
    data = points()
    data = torch.utils.data.DataLoader(data.dataset.double(), batch_size=18)  # type: ignore[attr-defined]
    fit(tmp_path, module, snapshot, before, data=data, precision="64-true", max_epochs=1)
    (shard,) = snapshot.artifacts.shards(StepRange(0, 99))
    module.load_state_dict(before.at[0])
    if which == "judge":  # the generator has taken its step before the judge's turn
        optimizer = torch.optim.Adam(module.generator.parameters(), lr=0.02)
        module.zero_grad()
        module.turn("generator", data.dataset).backward()  # type: ignore[arg-type]
        nn.utils.clip_grad_norm_(module.generator.parameters(), 0.5)
        optimizer.step()
    samples = [data.dataset[i : i + 1] for i in shard.sample_ids.tolist()]  # type: ignore[index]
    expected = per_sample_gradients(module, lambda m, x: m.turn(which, x), samples, [name])[name]
    torch.testing.assert_close(dense(shard, name), expected, **CLOSE)
    rate = {"generator": 0.02, "judge": 0.1}[which]
    group = ["generator", "judge"].index(which)
    assert (shard.records["rates"][:, group] == rate).all()


def test_several_snapshots_share_a_trainer(tmp_path: Path) -> None:
    replay = GradientSnapshot(tmp_path / "replay", BOTH)
    first = GradientSnapshot(tmp_path / "first", "last_layer", mode="in_flight")
    second = GradientSnapshot(tmp_path / "second", "word_embeddings", mode="in_flight", dtype="bfloat16")
    plain = state_hash(fit(tmp_path, seeded(Classifier)))
    assert state_hash(fit(tmp_path, seeded(Classifier), replay, first, second)) == plain
    for snapshot in (replay, first, second):
        assert snapshot.artifacts.verify() == [] and len(snapshot.artifacts.checkpoints()) >= 2


def test_state_keys_differ_with_the_settings() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"store": "a"},
        {"parameters": "last_layer"},
        {"mode": "in_flight"},
        {"every_n_epochs": 2},
        {"every_n_steps": 3},
        {"top_words": 4},
        {"dtype": "bfloat16"},
    ]
    assert len({GradientSnapshot(**each).state_key for each in settings}) == len(settings)
    assert GradientSnapshot("a").state_key == GradientSnapshot(Path("a")).state_key


def test_layers_that_appear_in_configure_model(tmp_path: Path) -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__()
            del self.head

        def configure_model(self) -> None:
            if not hasattr(self, "head"):
                self.head = nn.Linear(5, 3)

    snapshot = GradientSnapshot(tmp_path / "store", "head.*")
    fit(tmp_path, seeded(Late), snapshot, max_epochs=1)
    assert stored(snapshot.artifacts, "head.bias").shape == (13, 3)


def test_a_frozen_embedding_that_is_asked_for(tmp_path: Path) -> None:
    class Frozen(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.words.weight.requires_grad_(False)

    plain = state_hash(fit(tmp_path, seeded(Frozen)))
    for mode in MODES:
        snapshot = GradientSnapshot(tmp_path / mode, "word_embeddings", mode=mode)  # type: ignore[arg-type]
        assert state_hash(fit(tmp_path, seeded(Frozen), snapshot)) == plain
        assert len(snapshot.artifacts.artifacts("frozen")) == 1
    at = snapshot.artifacts.checkpoints()[-1]
    assert at.learning_rate("words.weight") == pytest.approx(4 * 0.3)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_layer_is_replayed_eagerly(tmp_path: Path) -> None:
    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.compile(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), backend="eager")

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.body(self.words(tokens).sum(1)))

    module, names = seeded(Compiled), ["words.weight", "body.*0.weight", "head.weight"]
    plain = state_hash(fit(tmp_path, seeded(Compiled), max_epochs=1))
    snapshot = GradientSnapshot(tmp_path / "store", names)
    assert state_hash(fit(tmp_path, module, snapshot, max_epochs=1)) == plain
    store = snapshot.artifacts
    weight = next(name for name in store.manifest.selected if name.startswith("body"))
    expected = truth(module, store.weights(store.checkpoints()[0]), [padded([Texts()[0]])], ["words.weight", weight])
    for name, value in expected.items():
        torch.testing.assert_close(stored(store, name)[:1].double(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of the parser's own, about how Lightning uses it
def test_lightning_cli_builds_it_from_flags_and_yaml(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "fit.yaml"
    config.write_text(
        "trainer:\n  callbacks:\n"
        "  - class_path: lightning_influence.GradientSnapshot\n"
        "    init_args:\n"
        f"      store: {tmp_path / 'store'}\n"
        "      parameters: [head.*, word_embeddings]\n"
        "      mode: in_flight\n"
        "      sample_id: position\n"
        "      top_words: 3\n"
    )
    quiet = ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]

    def parse(*flags: str) -> GradientSnapshot:
        cli = LightningCLI(Classifier, run=False, save_config_callback=None, args=[*quiet, *flags])
        return next(c for c in cli.trainer.callbacks if isinstance(c, GradientSnapshot))

    snapshot = parse(f"--config={config}")
    assert snapshot.parameters == ("head.*", "word_embeddings")
    assert (snapshot.mode, snapshot.sample_id, snapshot.top_words) == ("in_flight", "position", 3)
    flag = "--trainer.callbacks=lightning_influence.GradientSnapshot"
    flagged = parse(flag, "--trainer.callbacks.parameters=last_layer", "--trainer.callbacks.every_n_steps=5")
    assert (flagged.parameters, flagged.every_n_steps, flagged.store) == ("last_layer", 5, None)
    with pytest.raises(SystemExit):
        parse(flag, "--trainer.callbacks.mode=online")
    assert loader().batch_size == 4
