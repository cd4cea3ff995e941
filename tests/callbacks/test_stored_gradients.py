"""What lies in the store is the gradient of one sample's own loss, whatever the batches, the loss and the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence import ArtifactStore, GradientSnapshot
from lightning_influence.artifacts import StepRange
from lightning_influence.callbacks import opening
from lightning_influence.callbacks.replay_recorder import shard_size
from lightning_influence.replay import shard_positions
from tests.callbacks.fits import (
    BOTH,
    WARNINGS,
    Classifier,
    LanguageModel,
    Texts,
    WeightsBefore,
    dense,
    fit,
    loader,
    seeded,
    singles,
    stored,
    truth,
)

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]
NAMES = ["words.weight", "head.weight", "head.bias"]
CLOSE = {"rtol": 1e-10, "atol": 1e-13}
KINDS: dict[str, Any] = {
    **{loss: lambda loss=loss: Classifier(loss=loss) for loss in ("mean", "sum", "weights", "bce", "mse", "own")},
    "tokens": LanguageModel,
}


class OwnLoss(Classifier):
    """training_step couples its samples; per_sample_loss says what is meant."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["tokens"])
        return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)))

    def per_sample_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["tokens"]), batch["label"], reduction="none")


class Manual(Classifier):
    """Manual optimization, a loss dictionary, a second optimizer that trains something else."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second):
            optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2:
            second.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD([*self.words.parameters(), *self.head.parameters()], lr=0.3),
            torch.optim.SGD(self.hidden.parameters(), lr=0.1),
        ]


def names_of(module: Classifier) -> list[str]:
    return ["words.weight", "next.weight", "next.bias"] if isinstance(module, LanguageModel) else NAMES


def check_replay(module: Classifier, store: ArtifactStore, loss: Any = None) -> None:
    names = names_of(module)
    for index, checkpoint in enumerate(store.checkpoints()):
        expected = truth(module, store.weights(checkpoint), singles(Texts()), names, loss)
        for name in names:
            torch.testing.assert_close(stored(store, name, index), expected[name], **CLOSE)


def check_in_flight(module: Classifier, store: ArtifactStore, before: WeightsBefore, stride: int = 1) -> int:
    """Every record against the truth at the weights that its step started from; returns the number of records."""
    names, count = names_of(module), 0
    for shard in store.shards(StepRange(0, 1 << 40)):
        rows = {name: dense(shard, name) for name in names}
        for row, (position, step) in enumerate(
            zip(shard.sample_ids.tolist(), shard.records["step"].tolist(), strict=True)
        ):
            expected = truth(module, before.at[step - stride], singles(Texts(), [position]), names)
            for name in names:
                torch.testing.assert_close(rows[name][row], expected[name][0], **CLOSE)
            count += 1
    return count


def snapshot(root: Path, module: Classifier, mode: Any = "replay", **options: Any) -> GradientSnapshot:
    return GradientSnapshot(root / "store", names_of(module), mode=mode, **{"dtype": "float64", **options})


@pytest.mark.parametrize("kind", KINDS)
def test_replay_is_the_gradient_of_one_sample(tmp_path: Path, kind: str) -> None:
    module = seeded(KINDS[kind])
    callback = snapshot(tmp_path, module)
    fit(tmp_path, module, callback, precision="64-true")
    assert callback.artifacts.manifest.settings["reduction"] == ("sum" if kind == "sum" else "mean")
    check_replay(module, callback.artifacts)


@pytest.mark.parametrize("kind", KINDS)
def test_in_flight_is_the_gradient_of_one_sample_at_the_weights_of_its_step(tmp_path: Path, kind: str) -> None:
    module, before = seeded(KINDS[kind]), WeightsBefore()
    callback = snapshot(tmp_path, module, "in_flight")
    fit(tmp_path, module, callback, before, precision="64-true", max_epochs=1)
    assert check_in_flight(module, callback.artifacts, before) == 13


@pytest.mark.parametrize("batch_size", [1, 4, 8])
@pytest.mark.parametrize("kind", ["sum", "tokens"])
def test_batch_sizes(tmp_path: Path, batch_size: int, kind: str) -> None:
    for mode in ("replay", "in_flight"):
        module, before = seeded(KINDS[kind]), WeightsBefore()
        callback = snapshot(tmp_path / mode, module, mode)
        data = loader(batch_size=batch_size)
        fit(tmp_path, module, callback, before, data=data, precision="64-true", max_epochs=1)
        if mode == "replay":
            check_replay(module, callback.artifacts)
        else:
            assert check_in_flight(module, callback.artifacts, before) == 13


@pytest.mark.parametrize("kind", ["mean", "sum", "tokens"])
def test_shares_of_a_step_add_up_under_accumulation(tmp_path: Path, kind: str) -> None:
    """In flight, the sum of rate / batch_size * gradient over a step is the step that SGD took."""
    module, before = seeded(KINDS[kind]), WeightsBefore()
    callback = snapshot(tmp_path, module, "in_flight")
    run = fit(tmp_path, module, callback, before, precision="64-true", accumulate_grad_batches=3, max_epochs=2)
    assert check_in_flight(module, callback.artifacts, before) == 26
    weights = [before.at[step] for step in sorted(before.at)] + [dict(run.lightning_module.state_dict())]
    name = names_of(module)[-1]
    (first, second) = callback.artifacts.shards(StepRange(0, 1 << 40))
    for shard in (first, second):
        share = shard.records["rates"][:, 0] / shard.records["batch_size"]
        for step in shard.records["step"].unique().tolist():
            mine = shard.records["step"] == step
            moved = (dense(shard, name)[mine] * share[mine][:, None]).sum(0)
            torch.testing.assert_close(moved, weights[step - 1][name] - weights[step][name], rtol=1e-9, atol=1e-12)


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    module = seeded(OwnLoss)
    callback = snapshot(tmp_path, module)
    fit(tmp_path, module, callback, precision="64-true", max_epochs=1)
    check_replay(module, callback.artifacts, lambda m, batch: m.per_sample_loss(batch).sum())
    assert set(callback.artifacts.dynamics(callback.artifacts.checkpoints()[0])) == {"loss", "margin", "probability"}


def test_manual_optimization(tmp_path: Path) -> None:
    for mode in ("replay", "in_flight"):
        module, before = seeded(Manual), WeightsBefore()
        callback = snapshot(tmp_path / mode, module, mode)
        fit(tmp_path, module, callback, before, precision="64-true", max_epochs=1)
        if mode == "replay":
            check_replay(module, callback.artifacts)
        else:
            (shard,) = callback.artifacts.shards(StepRange(0, 1 << 40))
            assert shard.records["step"].unique().tolist() == [1, 3, 4, 6]  # the second optimizer's steps count too
            assert (shard.records["rates"][:, 0] == 0.3).all()
            steps = sorted(before.at)
            for row, (position, step) in enumerate(
                zip(shard.sample_ids.tolist(), shard.records["step"].tolist(), strict=True)
            ):
                at = before.at[max(s for s in steps if s < step)]
                expected = truth(module, at, singles(Texts(), [position]), NAMES)
                torch.testing.assert_close(dense(shard, "head.weight")[row], expected["head.weight"][0], **CLOSE)


def test_shards_do_not_depend_on_batch_size_or_shard_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[tuple[int, int], Tensor] = {}
    for batch_size, batches in ((1, 3), (4, 1), (5, 100)):
        monkeypatch.setattr(opening, "shard_size", lambda *_, size=batch_size * batches: size)
        module = seeded(Classifier)
        callback = snapshot(tmp_path / f"{batch_size}", module)
        callback.dataloader = loader(batch_size=batch_size, shuffle=False)
        fit(tmp_path, module, callback, precision="64-true", max_epochs=1)
        store = callback.artifacts
        spans = [shard.span for shard in store.shards(store.checkpoints()[0])]
        assert len(spans) == -(-13 // (batch_size * batches))
        found[batch_size, batches] = torch.cat([stored(store, name).flatten(1) for name in NAMES], 1)
    first, *others = found.values()
    for other in others:
        torch.testing.assert_close(other, first, **CLOSE)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_the_shards_without_gap_or_overlap(world: int) -> None:
    for length, size in ((13, 4), (1, 8), (40, 8), (41, 8)):
        spans = [shard_positions(length, size, rank, world) for rank in range(world)]
        assert sorted(i for rank in spans for span in rank for i in span) == list(range(length))
        assert {span for rank in spans for span in rank} == set(shard_positions(length, size))


def test_shard_size_is_whole_batches_of_about_64_mib() -> None:
    assert shard_size(1 << 20, 8) == 64
    assert shard_size(1 << 30, 8) == 8
    assert shard_size(4, 10) == 16380


def test_top_words_and_small_dtypes(tmp_path: Path) -> None:
    module = seeded(Classifier)
    full = GradientSnapshot(tmp_path / "full", BOTH, dtype="float32")
    small = GradientSnapshot(tmp_path / "small", BOTH, dtype="bfloat16", top_words=2)
    fit(tmp_path, module, full, small, max_epochs=1)
    exact, kept = stored(full.artifacts, "words.weight"), stored(small.artifacts, "words.weight")
    norms = exact.norm(dim=2)  # (N, V)
    for row in range(13):
        words = kept[row].norm(dim=1).nonzero().flatten()
        largest = norms[row].topk(2).values
        assert len(words) == int((largest > 0).sum())
        torch.testing.assert_close(norms[row, words].sort(descending=True).values, largest[: len(words)])
        torch.testing.assert_close(kept[row, words], exact[row, words], rtol=1e-2, atol=1e-3)


def test_training_dynamics(tmp_path: Path) -> None:
    module = seeded(Classifier)
    callback = GradientSnapshot(tmp_path / "store", "last_layer")
    fit(tmp_path, module, callback, max_epochs=1)
    store = callback.artifacts
    record = store.dynamics(store.checkpoints()[0])
    module.load_state_dict(store.weights(store.checkpoints()[0]))
    for position, batch in enumerate(singles(Texts())):
        logits, y = module(batch["tokens"]).detach()[0], int(batch["label"])
        others = torch.cat([logits[:y], logits[y + 1 :]])
        assert float(record["loss"][position]) == pytest.approx(float(module.loss(batch).detach()), rel=1e-5)
        assert float(record["margin"][position]) == pytest.approx(float(logits[y] - others.max()), rel=1e-4, abs=1e-6)
        assert float(record["probability"][position]) == pytest.approx(float(logits.softmax(0)[y]), rel=1e-5)
