"""What the callback refuses: by our own errors, before the first step if it can be known, harming nothing."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lightning_influence import ArtifactStore, GradientSnapshot, InfluenceModule, TracInWE
from lightning_influence.artifacts import StepRange, tensor_files
from lightning_influence.artifacts.store import ArtifactStore as Store
from lightning_influence.errors import CaptureError, InfluenceError, LossError, StoreError, UnsupportedError
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
    padded,
    seeded,
    singles,
    stored,
    trainer,
    truth,
)

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]
MODES = ["replay", "in_flight"]


class Steps(Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.count += 1


def refused(root: Path, kind: type[InfluenceError], match: str, module: LightningModule, **options: Any) -> None:
    """The fit stops with our error before the first step, and the module is as it was."""
    steps, mode = Steps(), options.pop("mode", "replay")
    snapshot = GradientSnapshot(root / "store", mode=mode, **{"parameters": BOTH, **options.pop("settings", {})})
    with pytest.raises(kind, match=match) as raised:
        fit(root, module, snapshot, steps, **options)
    assert steps.count == 0 and "HINT" in str(raised.value)
    assert "log" not in vars(module) and not any(part._forward_hooks for part in module.modules())


class Diverges(Classifier):
    """The loss of every batch is NaN after some steps."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if self.global_step >= 6 else 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_nan_gradients_are_named_and_stop_the_run(tmp_path: Path, mode: Any) -> None:
    snapshot = GradientSnapshot(tmp_path / "store", "last_layer", mode=mode)
    with pytest.raises(CaptureError, match=r"head\.(weight|bias).*NaN or infinite"):
        fit(tmp_path, seeded(Diverges), snapshot, max_epochs=3)
    store = ArtifactStore.open(tmp_path / "store")
    assert [c.step for c in store.checkpoints()] == ([4] if mode == "replay" else [0, 4])
    if mode == "replay":
        assert stored(store, "head.weight").isfinite().all()
    else:
        ids = torch.cat([shard.sample_ids for shard in store.shards(StepRange(0, 99))])
        assert len(ids) == 13 + 2 * 4  # the six steps before


def test_nan_from_the_start(tmp_path: Path) -> None:
    module = seeded(Classifier)
    with torch.no_grad():
        module.hidden.bias[0] = float("nan")
    refused(tmp_path, CaptureError, "NaN or infinite", module)


def test_a_gradient_that_the_storage_dtype_cannot_hold(tmp_path: Path) -> None:
    class Huge(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * 1e7

    refused(tmp_path, CaptureError, "overflows float16", seeded(Huge), settings={"dtype": "float16"})


class Unused(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_never_fires(tmp_path: Path, mode: Any) -> None:
    refused(tmp_path, CaptureError, "spare", seeded(Unused), mode=mode, settings={"parameters": "spare.*"})


def test_a_layer_that_stops_taking_part_in_flight(tmp_path: Path) -> None:
    class Sometimes(Classifier):
        def forward(self, tokens: Tensor) -> Tensor:
            if self.training and self.global_step >= 2:
                return self.head(torch.ones(len(tokens), 5))
            return super().forward(tokens)

    snapshot = GradientSnapshot(tmp_path / "store", "word_embeddings", mode="in_flight")
    with pytest.raises(CaptureError, match="no backward pass reached"):
        fit(tmp_path, seeded(Sometimes), snapshot)
    both = GradientSnapshot(tmp_path / "both", BOTH, mode="in_flight")
    with pytest.raises(CaptureError, match="took no part"):
        fit(tmp_path, seeded(Sometimes), both)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_sharding_strategies_are_refused_in_setup(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    monkeypatch.setattr(Trainer, "strategy", object.__new__(kind))
    with pytest.raises(UnsupportedError, match=f"(?s)not served.*{kind.__name__}"):
        GradientSnapshot(tmp_path / "store").setup(run, Classifier(), "fit")


@pytest.mark.parametrize("mode", MODES)
def test_several_loaders(tmp_path: Path, mode: Any) -> None:
    class Both(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch["a"]) + self.loss(batch["b"])

    data = CombinedLoader({"a": loader(), "b": loader()}, "max_size_cycle")
    refused(tmp_path, UnsupportedError, "one training", seeded(Both), mode=mode, data=data)


def test_one_of_several_loaders_may_be_chosen_for_replay(tmp_path: Path) -> None:
    class Both(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch["a"]) + self.loss(batch["b"])

        def per_sample_loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch["tokens"]), batch["label"], reduction="none")

    data = CombinedLoader({"a": loader(), "b": loader(batch_size=3)}, "max_size_cycle")
    snapshot = GradientSnapshot(tmp_path / "store", BOTH, dataloader=loader(shuffle=False))
    fit(tmp_path, seeded(Both), snapshot, data=data, max_epochs=1)
    assert stored(snapshot.artifacts, "head.weight").shape[0] == 13


class Stream(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        texts = Texts()
        for position in range(len(texts)):
            yield texts[position]


def stream() -> Any:
    return loader(Stream(), shuffle=False)


@pytest.mark.parametrize("mode", MODES)
def test_streams_without_ids(tmp_path: Path, mode: Any) -> None:
    refused(tmp_path, UnsupportedError, "(?s)position.*sample_id", seeded(Classifier), mode=mode, data=stream())


@pytest.mark.parametrize("how", ["key", "function"])
def test_a_stream_with_ids_works_in_flight(tmp_path: Path, how: str) -> None:
    sample_id: Any = "position" if how == "key" else (lambda batch: batch["position"].tolist())
    module = seeded(Classifier)
    snapshot = GradientSnapshot(tmp_path / "store", BOTH, mode="in_flight", sample_id=sample_id)
    fit(tmp_path, module, snapshot, data=stream())
    influence = InfluenceModule(module, tmp_path / "store", TracInWE(), k=2)
    answer = influence.query(padded([Texts()[i] for i in range(3)]))
    assert answer.proponents.sample_ids.shape == (3, 2)

    listed = GradientSnapshot(tmp_path / "listed", BOTH, mode="in_flight")
    fit(tmp_path, seeded(Classifier), listed, data=loader(shuffle=False))
    same = InfluenceModule(module, tmp_path / "listed", TracInWE(), k=2).query(padded([Texts()[i] for i in range(3)]))
    assert torch.equal(same.proponents.sample_ids, answer.proponents.sample_ids)
    torch.testing.assert_close(same.proponents.scores, answer.proponents.scores)


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_stops_the_run_and_harms_nothing(
    tmp_path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 5:
                monkeypatch.setattr(tensor_files, "write_all", _no_space)

    snapshot = GradientSnapshot(tmp_path / "store", BOTH, mode=mode)
    module = seeded(Classifier)
    with pytest.raises(StoreError, match="no space left"):
        fit(tmp_path, module, snapshot, Full(), max_epochs=3)
    monkeypatch.undo()
    store = ArtifactStore.open(tmp_path / "store")
    assert [p for p in store.verify() if "no journal" not in p] == []
    assert [c.step for c in store.checkpoints()] == ([4] if mode == "replay" else [0, 4])
    assert module.training and "log" not in vars(module)  # left isolation at once


def _no_space(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_too_little_disk_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "free_bytes", lambda self: 10)
    refused(tmp_path, StoreError, "too little space", seeded(Classifier))


def test_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("years of work")
    refused(tmp_path, StoreError, "not empty", seeded(Classifier))
    assert (tmp_path / "store" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("mode", MODES)
def test_a_collate_function_that_drops_samples(tmp_path: Path, mode: Any) -> None:
    data = loader(collate_fn=_drops)
    refused(tmp_path, InfluenceError, "sample", seeded(Classifier), mode=mode, data=data)


def _drops(samples: list[dict[str, Any]]) -> Any:
    return padded(samples[1:] or samples)


def test_a_training_set_that_changes_during_the_fit(tmp_path: Path) -> None:
    class Grows(Classifier):
        def train_dataloader(self) -> Any:
            return loader(Texts(13 + self.current_epoch))

    module, snapshot = seeded(Grows), GradientSnapshot(tmp_path / "store", BOTH)
    run = trainer(tmp_path, snapshot, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(StoreError, match="has changed"):
        run.fit(module)
    assert len(ArtifactStore.open(tmp_path / "store").checkpoints()) == 1


def test_steps_that_are_skipped_leave_no_record(tmp_path: Path) -> None:
    """training_step returns None, on_train_batch_start returns -1: no error, hooks gone, and the run can be resumed."""

    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if self.trainer.current_epoch == 0 and batch_idx in (1, 3) else self.loss(batch)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.trainer.current_epoch == 1 and batch_idx == 2 else None

    module, snapshot = seeded(Skips), GradientSnapshot(tmp_path / "store", BOTH, mode="in_flight")
    Closure.warning_cache.clear()  # Lightning says it once in a process
    with pytest.warns(UserWarning, match="training_step` returned `None"):
        run = fit(tmp_path, module, snapshot, data=loader(shuffle=False))
    ids = torch.cat([shard.sample_ids for shard in snapshot.artifacts.shards(StepRange(0, 99))])
    assert ids.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, *range(8)]
    assert not any(part._forward_hooks for part in module.modules())
    run.fit_loop.max_epochs = 3
    run.fit(module, loader(shuffle=False))
    ids = torch.cat([shard.sample_ids for shard in snapshot.artifacts.shards(StepRange(0, 99))])
    assert len(ids) == 16 + 13


@pytest.mark.parametrize("mode", MODES)
def test_a_trial_run_leaves_the_folder_to_the_real_one(
    tmp_path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    snapshot = GradientSnapshot(tmp_path / "store", BOTH, mode=mode)
    fit(tmp_path, seeded(Classifier), snapshot, fast_dev_run=2)
    assert not (tmp_path / "store").exists() and snapshot.artifacts.verify() == []
    fit(tmp_path, seeded(Classifier), GradientSnapshot(tmp_path / "store", BOTH, mode=mode), max_epochs=1)


def test_arguments_are_checked() -> None:
    for wrong in (
        {"mode": "online"},
        {"dtype": "int8"},
        {"top_words": 0},
        {"every_n_epochs": 0},
        {"every_n_steps": -1},
    ):
        with pytest.raises(UnsupportedError, match=next(iter(wrong))):
            GradientSnapshot(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"every_n_epochs": "2"},
        {"every_n_steps": 2.0},
        {"top_words": True},
        {"store": 3},
        {"parameters": 3},
        {"parameters": []},
        {"mode": ["replay"]},
        {"dtype": torch.float32},
        {"mode": "in_flight", "per_sample_loss": lambda module, batch: batch},
        {"mode": "replay", "sample_id": "position"},
    ],
)
def test_wrong_types_and_arguments_without_effect(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=list(wrong)[-1]) as raised:
        GradientSnapshot(**wrong)
    assert "HINT" in str(raised.value)


class Bad(Classifier):
    """Its loss of the batch with sample 9 is not there, or not finite, once the first epoch's checkpoint is made."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.training or 9 not in batch["position"].tolist() or self.global_step < 8:
            return loss
        return self.bad(loss)

    def bad(self, loss: Tensor) -> Any:
        return None


class Infinite(Bad):
    def bad(self, loss: Tensor) -> Any:
        return loss * float("nan")


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (Bad, LossError, "(?s)no loss.*samples 8 to 11 of the training set.*None"),
        (Infinite, CaptureError, "NaN or infinite, in samples 8 to 11 of the training set"),
    ],
)
def test_findings_of_a_replay_name_the_samples(tmp_path: Path, make: Any, kind: Any, match: str) -> None:
    module = seeded(make)
    with pytest.raises(kind, match=match):
        fit(tmp_path, module, GradientSnapshot(tmp_path / "store", BOTH))
    store = ArtifactStore.open(tmp_path / "store")
    assert [c.step for c in store.checkpoints()] == [4] and stored(store, "head.weight").shape[0] == 13
    assert module.training and "log" not in vars(module)


@pytest.mark.parametrize(
    ("settings", "options", "nothing"),
    [
        ({"every_n_epochs": 5}, {}, True),
        ({"every_n_steps": 500}, {}, True),
        ({"every_n_steps": 8}, {}, False),
        ({}, {"max_steps": 2}, False),  # an epoch that is cut short ends too
        ({"every_n_epochs": 5}, {"max_epochs": -1, "max_steps": 17}, False),
        ({"every_n_epochs": 5}, {"max_epochs": -1, "max_steps": 16}, True),
        ({"every_n_epochs": 5}, {"fast_dev_run": 1}, False),
    ],
)
def test_a_run_too_short_for_a_checkpoint_is_told(
    tmp_path: Path, settings: Any, options: Any, nothing: bool, recwarn: pytest.WarningsRecorder
) -> None:
    snapshot = GradientSnapshot(tmp_path / "store", "last_layer", **settings)
    fit(tmp_path, seeded(Classifier), snapshot, **options)
    assert any("will store nothing" in str(w.message) and "HINT" in str(w.message) for w in recwarn) is nothing
    if "fast_dev_run" not in options:
        assert (snapshot.artifacts.checkpoints() == ()) is nothing


def test_a_tied_use_that_is_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Tied(Classifier):
        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.words(tokens).sum(1)), self.words.weight)[:, :3]

    with caplog.at_level("INFO"):
        fit(tmp_path, seeded(Tied), GradientSnapshot(tmp_path / "store"), max_epochs=1)
    assert "words.weight (look-ups only; the tied use in linear is left out)" in caplog.text


class Mixup(Classifier):
    def loss(self, batch: Any) -> Tensor:
        if not self.training:
            return super().loss(batch)
        order, share = torch.randperm(len(batch["label"])), 0.7
        z = self(batch["tokens"])
        mixed = share * z + (1 - share) * z[order]
        return share * F.cross_entropy(mixed, batch["label"]) + (1 - share) * F.cross_entropy(
            mixed, batch["label"][order]
        )


class Centred(Classifier):
    def forward(self, tokens: Tensor) -> Tensor:
        z = super().forward(tokens)
        return z - z.mean(0) if self.training else z


class Noisy(Classifier):
    """Random, and each sample for itself."""

    def forward(self, tokens: Tensor) -> Tensor:
        z = super().forward(tokens)
        return F.dropout(z * (1 + torch.randn_like(z)), 0.5, self.training) if self.training else z


@pytest.mark.parametrize(("make", "mixes"), [(Mixup, True), (Centred, True), (Noisy, False), (Classifier, False)])
def test_mixing_in_train_mode_alone_is_told(
    tmp_path: Path, make: Any, mixes: bool, recwarn: pytest.WarningsRecorder
) -> None:
    fit(tmp_path, seeded(make), GradientSnapshot(tmp_path / "store", BOTH, mode="in_flight"), max_epochs=1)
    assert any("mixes the samples of a batch" in str(w.message) for w in recwarn) is mixes


def test_weights_of_batches_that_the_check_did_not_see(tmp_path: Path) -> None:
    """In flight, where the checked batch has equal weights by chance, rows are those of single samples all the same."""

    class Short(Texts):
        def __init__(self) -> None:
            super().__init__(61)
            self.tokens = [torch.randint(1, 12, (2 if i % 4 == 1 else 4,)) for i in range(61)]
            self.labels = [0 if i % 4 != 1 else 1 for i in range(61)]

    for module, name in (
        (seeded(LanguageModel), "next.weight"),
        (seeded(lambda: Classifier(loss="weights")), "head.weight"),
    ):
        texts, weights = Short(), WeightsBefore()
        assert all(len(texts.tokens[i]) == 4 for i in range(0, 61, 4))  # what a check of 16 spread samples sees
        snapshot = GradientSnapshot(tmp_path / name, name, mode="in_flight")
        fit(tmp_path, module, snapshot, weights, data=loader(texts, shuffle=False, batch_size=16), max_epochs=1)
        row = torch.cat([dense(shard, name) for shard in snapshot.artifacts.shards(StepRange(0, 99))])
        for i in (0, 1, 2, 60):
            expected = truth(module, weights.at[i // 16], singles(texts, [i]), [name])[name]
            torch.testing.assert_close(row[i : i + 1].double(), expected, rtol=1e-3, atol=1e-5)
