"""The whole path as somebody walks it: add a callback to a run, train, ask; with all that a Trainer does by default."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_influence import (
    ArtifactStore,
    Attribution,
    GradientSnapshot,
    InfluenceModule,
    StoreError,
    TracIn,
    TracInLast,
    TracInWE,
)
from tests.callbacks.fits import WARNINGS, state_hash
from tests.integration.project import VOCABULARY, Library, Reader, collate, samples
from tests.reference import tracin
from tests.stores import quiet

pytestmark = [pytest.mark.filterwarnings(each) for each in WARNINGS]

EMBEDDING, HEAD = "words.weight", ["head.weight", "head.bias"]
SAMPLES, STEPS = 20, 4


def train(root: Path, *callbacks: GradientSnapshot, module: Any = None, **options: Any) -> tuple[Any, Trainer]:
    """Two epochs with a logger, checkpoints, validation and its sanity check; (module, trainer)."""
    seed_everything(3, verbose=False)
    module = Reader().double() if module is None else module
    trainer = Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 2, "default_root_dir": root, "logger": CSVLogger(root), "log_every_n_steps": 1, **options},
    )
    trainer.fit(module, datamodule=Library())
    return module, trainer


def loss_of_one(module: Any, batch: Any) -> Tensor:
    module.eval()
    return F.cross_entropy(module(batch["tokens"]), batch["label"])


def expected(module: Any, checkpoints: Any) -> Tensor:
    """Scores of the held-out sentences by explicit loops; checkpoints are (weights, rates by name)."""
    train_samples, queries = samples(SAMPLES), samples(5, SAMPLES)
    one = copy.deepcopy(module)
    return tracin(one, loss_of_one, checkpoints, *([collate([s]) for s in some] for some in (train_samples, queries)))


def rated(store: ArtifactStore, names: Any, *sums: float) -> Any:
    """Checkpoints of a store with the sums of rates that the test works out by hand."""
    return [(store.weights(c), dict.fromkeys(names, s)) for c, s in zip(store.checkpoints(), sums, strict=True)]


QUERIES = collate(samples(5, SAMPLES))
BY_EPOCH = (0.5 * STEPS, 0.25 * STEPS)  # the rate is halved after every epoch


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
def test_with_everything_that_a_trainer_does_by_default(tmp_path, monkeypatch):
    """Its own logger, progress bar, summary and checkpoints; the store lies in the folder of the logs."""
    monkeypatch.chdir(tmp_path)
    seed_everything(3, verbose=False)
    snapshot = GradientSnapshot()
    module = Reader()
    trainer = Trainer(max_epochs=2, callbacks=[snapshot], accelerator="cpu")
    trainer.fit(module, datamodule=Library())
    root = Path(trainer.log_dir) / "influence"
    assert snapshot.artifacts.root == root.resolve() or snapshot.artifacts.root == root

    influence = InfluenceModule(module, root, TracInWE(), k=3)
    answers = Trainer(accelerator="cpu").predict(influence, datamodule=Library())
    assert [len(answer) for answer in answers] == [2, 2, 1]
    assert influence.attribution.proponents.sample_ids.shape == (5, 3)

    store = ArtifactStore.open(root)
    assert store.verify() == [] and store.manifest.dataset_length == SAMPLES
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    last = store.weights(store.checkpoints()[-1])
    assert all(torch.equal(last[name], value) for name, value in saved["state_dict"].items())


def test_scores_and_words_of_the_whole_path(tmp_path):
    module, _ = train(tmp_path, GradientSnapshot(tmp_path / "store", dtype="float64"))
    store = ArtifactStore.open(tmp_path / "store")
    influence = InfluenceModule(module, store, TracInWE(), k=SAMPLES)
    truth = expected(module, rated(store, [EMBEDDING], *BY_EPOCH))
    quiet().predict(influence, datamodule=Library())
    found = influence.attribution.proponents
    torch.testing.assert_close(found.scores, truth.sort(1, descending=True).values, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(truth.gather(1, found.sample_ids), found.scores, rtol=1e-10, atol=1e-15)
    words = influence.words(QUERIES, found.sample_ids, decode=VOCABULARY.__getitem__)
    texts = samples(SAMPLES)
    for q, row in enumerate(words):
        mine = {VOCABULARY[t] for t in QUERIES["tokens"][q].tolist() if t}
        for z, score, contributions in zip(found.sample_ids[q].tolist(), found.scores[q].tolist(), row, strict=True):
            assert {c.word for c in contributions} == mine & {VOCABULARY[t] for t in texts[z][0]}
            assert sum(c.score for c in contributions) == pytest.approx(score, rel=1e-10, abs=1e-15)


def test_several_callbacks_on_one_trainer(tmp_path):
    """Word embeddings in flight and the last layer by replay: neither disturbs the other, nor the training."""
    _, plain = train(tmp_path / "plain")
    words = GradientSnapshot(tmp_path / "words", mode="in_flight", dtype="float64")
    last = GradientSnapshot(tmp_path / "last", "last_layer", dtype="float64")
    with pytest.warns(UserWarning, match="train mode"):  # batch normalisation, in flight
        module, watched = train(tmp_path / "watched", words, last)
    assert state_hash(plain) == state_hash(watched)
    logs = [(Path(t.log_dir) / "metrics.csv").read_text() for t in (plain, watched)]
    assert logs[0] == logs[1] and "influence" not in logs[0]
    assert ArtifactStore.open(tmp_path / "words").manifest.selected == (EMBEDDING,)

    scores = InfluenceModule(Reader, tmp_path / "last", TracInLast()).scores(QUERIES)
    truth = expected(module, rated(ArtifactStore.open(tmp_path / "last"), HEAD, *BY_EPOCH))
    torch.testing.assert_close(scores, truth, rtol=1e-10, atol=1e-15)
    influence = InfluenceModule(Reader, tmp_path / "words", TracInWE(), k=2)
    found = influence.query(QUERIES).proponents
    sums = [[sum(c.score for c in pair) for pair in row] for row in influence.words(QUERIES, found.sample_ids)]
    torch.testing.assert_close(torch.tensor(sums, dtype=torch.float64), found.scores, rtol=1e-10, atol=1e-15)


def test_the_overhead_is_logged_only_if_asked(tmp_path):
    _, trainer = train(tmp_path, GradientSnapshot(tmp_path / "store", log=True))
    head = (Path(trainer.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"influence/overhead_seconds", "influence/overhead_ratio", "train_loss_step", "val_loss"} <= set(head)
    assert ArtifactStore.open(tmp_path / "store").manifest.facts["overhead"]["ratio"] > 0


def test_a_fit_that_ends_within_an_epoch(tmp_path):
    module, _ = train(tmp_path, GradientSnapshot(tmp_path / "store", dtype="float64"), max_steps=6, max_epochs=-1)
    store = ArtifactStore.open(tmp_path / "store")
    assert [c.step for c in store.checkpoints()] == [4, 6]
    sums = (0.5 * 4, 0.25 * 2)
    assert [c.learning_rate(EMBEDDING) for c in store.checkpoints()] == pytest.approx(sums)
    truth = expected(module, rated(store, [EMBEDDING], *sums))
    torch.testing.assert_close(
        InfluenceModule(Reader, store, TracInWE()).scores(QUERIES), truth, rtol=1e-10, atol=1e-15
    )


def test_a_second_fit_goes_on_in_the_same_store(tmp_path):
    snapshot = GradientSnapshot(tmp_path / "store", dtype="float64")
    module, trainer = train(tmp_path, snapshot, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=Library())
    store = ArtifactStore.open(tmp_path / "store")
    assert [c.step for c in store.checkpoints()] == [4, 8] and store.verify() == []
    sums = [c.learning_rate(EMBEDDING) for c in store.checkpoints()]
    truth = expected(module, rated(store, [EMBEDDING], *sums))
    torch.testing.assert_close(
        InfluenceModule(module, store, TracInWE()).scores(QUERIES), truth, rtol=1e-10, atol=1e-15
    )


def test_a_fit_by_another_trainer_needs_a_folder_of_its_own(tmp_path):
    snapshot = GradientSnapshot()
    module, first = train(tmp_path, snapshot)
    _, second = train(tmp_path, snapshot)
    roots = [Path(t.log_dir) / "influence" for t in (first, second)]
    assert roots[0] != roots[1] and snapshot.artifacts.root == roots[1]
    assert all(ArtifactStore.open(root).verify() == [] for root in roots)
    fixed = GradientSnapshot(tmp_path / "store")
    train(tmp_path, fixed)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(StoreError, match="not empty") as refused:
        train(tmp_path, fixed, module=module)
    assert "HINT" in str(refused.value)
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())
    assert ArtifactStore.open(tmp_path / "store").verify() == []


QUERY = """
import sys
from lightning.pytorch import Trainer
from lightning_influence import InfluenceModule, TracIn
from tests.integration.project import Library, Reader

influence = InfluenceModule(Reader, sys.argv[1], TracIn(), k=4, save_to=sys.argv[2])
Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).predict(influence, datamodule=Library())
"""


def test_asked_in_another_process(tmp_path):
    """With nothing but the class and the store."""
    module, _ = train(tmp_path, GradientSnapshot(tmp_path / "store", "all", dtype="float64"))
    answers = tmp_path / "answers.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", QUERY, tmp_path / "store", answers],
        check=True,
        env=environment,
        cwd=tmp_path,
        timeout=240,
    )
    store = ArtifactStore.open(tmp_path / "store")
    names = [name for name, _ in module.named_parameters()]
    truth = expected(module, rated(store, names, *BY_EPOCH))
    found = Attribution.load(answers)
    assert torch.equal(found.proponents.sample_ids, truth.sort(dim=1, descending=True, stable=True).indices[:, :4])
    torch.testing.assert_close(found.opponents.scores, truth.sort(1).values[:, :4], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("damage", ["flip", "cut", "garbage", "gone"])
@pytest.mark.parametrize("kind", ["gradients", "weights"])
def test_a_damaged_store_is_refused_by_name(tmp_path, damage, kind):
    module, _ = train(tmp_path, GradientSnapshot(tmp_path / "store", dtype="float64"), max_epochs=1)
    influence = InfluenceModule(module, tmp_path / "store", TracInWE(), k=2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    path = tmp_path / "store" / influence.store.artifacts(kind)[0].path
    content = path.read_bytes()
    match damage:
        case "flip":
            path.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "garbage":
            path.write_bytes(b"\x80\x04." + bytes(len(content) - 3))
        case "gone":
            path.unlink()
    for ask in (
        lambda: influence.query(QUERIES),
        lambda: influence.scores(QUERIES),
        lambda: quiet().predict(InfluenceModule(module, tmp_path / "store", TracIn(), k=2), datamodule=Library()),
    ):
        with pytest.raises(StoreError, match=path.name) as refused:
            ask()
        assert "HINT" in str(refused.value)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert any(path.name in problem for problem in ArtifactStore.open(tmp_path / "store").verify())
