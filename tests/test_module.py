"""InfluenceModule: asked directly and through Trainer.predict, with every kind of batch, and leaving no trace."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence import InfluenceModule, QueryError, StoreError, TracIn, TracInWE
from lightning_influence.artifacts import ArtifactStore, Manifest
from lightning_influence.artifacts.tensor_files import TensorFile
from tests.stores import (
    EMBEDDING,
    Classifier,
    Texts,
    all_names,
    batch_of,
    classifier,
    collate,
    group,
    loader_of,
    quiet,
    replay_store,
    trajectory,
)

TRAIN, ASKED = Texts(), Texts(11, seed=1)

# Lightning on this machine: every message about how a loader could be faster is a warning.
pytestmark = pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")


def store_of(root: Path, module: Any, **options: Any) -> ArtifactStore:
    states = options.pop("states", None) or trajectory(module, 3)
    return replay_store(root, module, TRAIN, states, lambda c: [group(all_names(module), 0.3 / (c + 1))], **options)


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ArtifactStore]:
    module = classifier()
    return module, store_of(tmp_path_factory.mktemp("module") / "store", module)


@pytest.fixture(scope="module")
def truth(fit) -> Tensor:
    return InfluenceModule(fit[0], fit[1], TracIn()).scores(batch_of(ASKED))


# Invariances


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(11)), st.integers(1, 11))
def test_order_and_batches_of_queries_do_not_matter(fit, truth, order, size):
    influence = InfluenceModule(fit[0], fit[1], TracIn())
    found = torch.empty_like(truth)
    for start in range(0, 11, size):
        positions = order[start : start + size]
        found[torch.tensor(positions)] = influence.scores(batch_of(ASKED, positions))
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", [1, 3, 14, 100])
def test_shard_size_does_not_matter(tmp_path, fit, truth, size):
    influence = InfluenceModule(fit[0], store_of(tmp_path / "s", fit[0], shard_size=size), TracIn())
    torch.testing.assert_close(influence.scores(batch_of(ASKED)), truth, rtol=1e-10, atol=1e-14)
    whole = InfluenceModule(fit[0], fit[1], TracIn())
    torch.testing.assert_close(influence.self_influence(), whole.self_influence(), rtol=1e-10, atol=1e-14)
    found, expected = (i.query(batch_of(ASKED), k=4) for i in (influence, whole))
    assert torch.equal(found.proponents.sample_ids, expected.proponents.sample_ids)
    rows = [
        [{c.tokens: c.score for c in pair} for row in words for pair in row]
        for store in (influence.store, fit[1])
        for words in (InfluenceModule(fit[0], store, TracInWE()).words(batch_of(ASKED), found.proponents.sample_ids),)
    ]
    assert all(mine == pytest.approx(theirs, rel=1e-10, abs=1e-16) for mine, theirs in zip(*rows, strict=True))


@pytest.mark.parametrize("estimator", [TracIn(), TracInWE(synonyms=0.3)], ids=["TracIn", "synonyms"])
def test_asking_three_times_gives_the_same_bits(fit, estimator):
    influence = InfluenceModule(fit[0], fit[1], estimator)
    first, *others = [influence.scores(batch_of(ASKED)) for _ in range(3)]
    assert all(torch.equal(first, other) for other in others)


def test_queries_in_slices_of_bounded_memory(fit, truth, monkeypatch):
    monkeypatch.setattr("lightning_influence.estimators.estimator._MOST_BYTES", 4 * 5 * 3)
    influence = InfluenceModule(fit[0], fit[1], TracIn())
    torch.testing.assert_close(influence.scores(batch_of(ASKED)), truth, rtol=1e-10, atol=1e-14)
    found = influence.query(batch_of(ASKED), k=2).proponents.scores
    torch.testing.assert_close(found, truth.sort(1, descending=True).values[:, :2], rtol=1e-10, atol=1e-14)


def test_checkpoints_are_loaded_once_and_nothing_is_held(tmp_path, fit, monkeypatch):
    """However many query batches there are; and of a store of many shards only a few tensors live at a time."""
    store = store_of(tmp_path / "s", fit[0], shard_size=1)
    influence, loaded = InfluenceModule(fit[0], store, TracIn(), k=3), []
    weights = store.weights
    monkeypatch.setattr(store, "weights", lambda at: loaded.append(at.step) or weights(at))
    alive, peak = set(), []
    read = TensorFile.read

    def watched(file: TensorFile, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        found = read(file, names)
        if "gradients" in str(file.path):
            for tensor in found.values():
                key = id(tensor)
                alive.add(key)
                Fate(tensor, lambda key=key: alive.discard(key))
        peak.append(len(alive))
        return found

    monkeypatch.setattr(TensorFile, "read", watched)
    quiet().predict(influence, loader_of(ASKED, 2))
    assert loaded == [10, 20, 30]
    one_shard = 2 * len(all_names(fit[0])) + 6
    assert len(TRAIN) * 3 == 42 and max(peak) <= 3 * one_shard and not alive
    influence.self_influence()
    assert max(peak) <= 3 * one_shard and not alive


class Fate:
    """Calls back when a tensor is gone."""

    def __init__(self, tensor: Tensor, gone: Any) -> None:
        import weakref

        weakref.finalize(tensor, gone)


# No trace


class Stateful(Classifier):
    """Notes how it runs, and fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.fails = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert not self.training and not self.dropout.training
        if self.fails:
            raise RuntimeError("on purpose")
        self.log("loss", torch.tensor(1.0), prog_bar=True)
        return F.cross_entropy(self.norm(self(batch)), batch["label"])


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_left_as_it_was(tmp_path, fails):
    module = classifier(kind=Stateful)
    store = store_of(tmp_path / "s", module)
    module.train()
    module.dropout.eval()
    module.hidden.weight.requires_grad_(False)
    module.head.weight.grad = torch.ones_like(module.head.weight)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    random = torch.get_rng_state()
    influence = InfluenceModule(module, store, TracIn("head.*"), k=2)
    module.fails = fails
    asked = loader_of(ASKED)
    asked.generator = torch.Generator()  # else a loader draws its seed from the global one
    for ask in (
        lambda: influence.query(batch_of(ASKED)),
        lambda: influence.scores(batch_of(ASKED)),
        lambda: quiet().predict(influence, asked),
    ):
        if fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                ask()
        else:
            ask()
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
        assert [part.training for part in module.modules()] == modes
        assert torch.equal(module.head.weight.grad, torch.ones_like(module.head.weight))
        assert module.embedding.weight.grad is None and not module.hidden.weight.requires_grad
        assert torch.equal(torch.get_rng_state(), random)
        assert not module.head._forward_hooks and not module.embedding._forward_pre_hooks


# Through a Trainer


def test_predict_equals_asking_directly(fit, truth):
    influence = InfluenceModule(fit[0], fit[1], TracIn(), k=4)
    with pytest.raises(QueryError, match="nothing was asked yet"):
        influence.attribution  # noqa: B018
    answers = quiet().predict(influence, loader_of(ASKED))
    assert [len(a) for a in answers] == [4, 4, 3]
    assert [a.query_ids.tolist() for a in answers] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    best = truth.sort(1, descending=True)
    assert torch.equal(influence.attribution.proponents.sample_ids, best.indices[:, :4])
    torch.testing.assert_close(influence.attribution.proponents.scores, best.values[:, :4], rtol=1e-10, atol=1e-14)
    worst = truth.sort(1)
    assert torch.equal(influence.attribution.opponents.sample_ids, worst.indices[:, :4])
    assert torch.equal(answers[1].proponents.scores, influence.attribution.proponents.scores[4:8])
    again = influence.query(batch_of(ASKED, [5]), k=4)  # asking directly after the Trainer is gone
    assert torch.equal(again.proponents.sample_ids[0], best.indices[5, :4])


class Data(LightningDataModule):
    """Its `dataset` is the training set: the number of queries is the loader's."""

    def __init__(self) -> None:
        super().__init__()
        self.dataset = TRAIN

    def setup(self, stage: str) -> None:
        self.asked = ASKED

    def predict_dataloader(self) -> DataLoader[Any]:
        return loader_of(self.asked, 5)


def test_a_data_module_and_several_loaders(fit, truth):
    influence = InfluenceModule(fit[0], fit[1], TracIn(), k=2)
    quiet().predict(influence, datamodule=Data())
    best = truth.sort(1, descending=True).indices[:, :2]
    assert torch.equal(influence.attribution.proponents.sample_ids, best)
    quiet().predict(influence, [loader_of(ASKED, 4), loader_of(TRAIN, 3)])
    assert influence.attribution.query_ids.tolist() == list(range(25))
    assert torch.equal(influence.attribution.proponents.sample_ids[:11], best)
    own = influence.query(batch_of(TRAIN), k=2).proponents.sample_ids
    assert torch.equal(influence.attribution.proponents.sample_ids[11:], own)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return (ASKED[i] for i in range(len(ASKED)))


def test_orders_that_only_the_loader_knows(fit, truth):
    influence = InfluenceModule(fit[0], fit[1], TracIn(), k=2)
    best = truth.sort(1, descending=True).indices[:, :2]
    quiet().predict(influence, loader_of(Stream()))
    assert influence.attribution.query_ids.tolist() == list(range(11))
    assert torch.equal(influence.attribution.proponents.sample_ids, best)
    order = [7, 0, 3, 10, 2]
    quiet(limit_predict_batches=2).predict(influence, DataLoader(ASKED, 2, sampler=order, collate_fn=collate))
    assert influence.attribution.query_ids.tolist() == [0, 3, 7, 10]
    assert torch.equal(influence.attribution.proponents.sample_ids, best[[0, 3, 7, 10]])


def test_the_answers_are_saved(tmp_path, fit):
    path = tmp_path / "answers.safetensors"
    influence = InfluenceModule(fit[0], fit[1], TracIn(), k=2, save_to=path)
    quiet().predict(influence, loader_of(ASKED))
    found = type(influence.attribution).load(path)
    assert torch.equal(found.proponents.scores, influence.attribution.proponents.scores)


def test_everything_inside_inference_mode(fit, truth):
    with torch.inference_mode():
        influence = InfluenceModule(Classifier, fit[1], TracIn(), k=3)  # builds the module
        assert not any(p.is_inference() for p in influence.user.parameters())
        influence = InfluenceModule(fit[0], fit[1], TracIn(), k=3)
        scores = influence.scores(batch_of(ASKED))
        quiet().predict(influence, loader_of(ASKED))
    torch.testing.assert_close(scores.clone(), truth, rtol=1e-10, atol=1e-14)
    best = truth.sort(1, descending=True).indices[:, :3]
    assert torch.equal(influence.attribution.proponents.sample_ids, best)


def test_parameters_made_in_inference_mode_are_refused(fit):
    with torch.inference_mode():
        module = classifier()
    with pytest.raises(QueryError, match="inference_mode"):
        InfluenceModule(module, fit[1], TracIn())


class Moving(Classifier):
    """The batch holds strings until the module's own hook turns them into tokens."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if "tokens" in batch:
            return batch
        texts = [torch.tensor([int(word) for word in text.split()]) for text in batch["text"]]
        return {"tokens": nn.utils.rnn.pad_sequence(texts, batch_first=True), "label": batch["label"]}


def spelled(samples: Sequence[tuple[Tensor, int]]) -> dict[str, Any]:
    texts = [" ".join(map(str, text.tolist())) for text, _ in samples]
    return {"text": texts, "label": torch.tensor([label for _, label in samples])}


def test_the_modules_own_transfer_hooks_are_used(tmp_path, truth):
    module = classifier(kind=Moving)
    influence = InfluenceModule(module, store_of(tmp_path / "s", module), TracIn(), k=2)
    asked = [ASKED[i] for i in range(11)]
    torch.testing.assert_close(influence.scores(spelled(asked)), truth, rtol=1e-10, atol=1e-14)
    quiet().predict(influence, DataLoader(ASKED, 4, collate_fn=spelled))
    assert torch.equal(influence.attribution.proponents.sample_ids, truth.sort(1, descending=True).indices[:, :2])


def test_a_copy_for_another_process_opens_the_store_again(fit, truth):
    influence = pickle.loads(pickle.dumps(InfluenceModule(fit[0], fit[1], TracIn())))
    assert influence.store is not fit[1] and influence.store.root == fit[1].root
    torch.testing.assert_close(influence.scores(batch_of(ASKED)), truth, rtol=1e-10, atol=1e-14)


# Kinds of batches


@dataclass
class Example:
    tokens: Tensor
    label: Tensor


class Any_(Classifier):
    """Takes batches of every shape, and two inputs."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        if isinstance(batch, Example):
            tokens, label = batch.tokens, batch.label
        elif isinstance(batch, (tuple, list)):
            (tokens, _), label = batch
        else:
            tokens, label = batch["inputs"]["tokens"], batch["label"]
        return F.cross_entropy(self({"tokens": tokens}), label)


def as_tuple(b: dict[str, Tensor]) -> Any:
    return ((b["tokens"], torch.rand(len(b["label"]), 2)), b["label"])


def nested(b: dict[str, Tensor]) -> Any:
    return {"inputs": {"tokens": b["tokens"], "names": ["x"] * len(b["label"])}, "label": b["label"], "note": "text"}


def example(b: dict[str, Tensor]) -> Any:
    return Example(b["tokens"], b["label"])


@pytest.mark.parametrize("shape", [as_tuple, nested, example])
def test_every_kind_of_batch(tmp_path, truth, shape):
    module = classifier(kind=Any_)
    store = store_of(tmp_path / "s", module, batch=lambda d, p: shape(batch_of(d, p)))
    influence = InfluenceModule(module, store, TracIn(), k=2)
    torch.testing.assert_close(influence.scores(shape(batch_of(ASKED))), truth, rtol=1e-10, atol=1e-14)
    quiet().predict(influence, DataLoader(ASKED, 4, collate_fn=lambda samples: shape(collate(samples))))
    assert torch.equal(influence.attribution.proponents.sample_ids, truth.sort(1, descending=True).indices[:, :2])


def test_a_batch_whose_queries_cannot_be_counted(fit):
    influence = InfluenceModule(fit[0], fit[1], TracIn())
    odd = {**batch_of(ASKED), "offsets": torch.arange(3)}
    with pytest.raises(QueryError, match="cannot be told"):
        influence.query(odd)
    answers = quiet().predict(
        influence, DataLoader(ASKED, 11, collate_fn=lambda s: {**collate(s), **{"o": torch.ones(3)}})
    )
    assert len(answers[0]) == 11  # the loader knows


class Unlabelled(Classifier):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch)


def test_queries_without_labels(tmp_path):
    module = classifier(kind=Unlabelled)
    store = store_of(tmp_path / "s", module, states=trajectory(module, 3, scale=2.0))
    influence = InfluenceModule(module, store, TracIn(), measurement="predicted_class")
    batch = batch_of(ASKED)
    unlabelled = {"tokens": batch["tokens"]}
    said = []
    for checkpoint in store.checkpoints():
        copied = copy.deepcopy(module)
        copied.load_state_dict(store.weights(checkpoint))
        said.append(copied.eval()(batch).argmax(1))
    assert not torch.equal(said[0], said[-1])  # some queries were taken for another class at first
    labelled = {**batch, "label": said[-1]}  # the fitted model's prediction is what is asked about, everywhere
    plain = InfluenceModule(module, store, TracIn())
    predicted = plain.scores(labelled)
    for asked in (batch, unlabelled):
        torch.testing.assert_close(influence.scores(asked), predicted, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(influence.measure(asked), plain.measure(labelled), rtol=1e-10, atol=1e-14)
    for measurement in (None, "loss", "margin"):
        with pytest.raises(QueryError, match="KeyError: 'label'") as refused:
            InfluenceModule(module, store, TracIn(), measurement=measurement).scores(unlabelled)
        assert "measurement='predicted_class'" in refused.value.hint and isinstance(refused.value.__cause__, KeyError)
    with pytest.raises(KeyError, match="label"):  # the user's own measurement speaks for itself
        InfluenceModule(module, store, TracIn(), measurement=lambda m, b: b["label"] * 1.0).scores(unlabelled)


class Without(TracIn):
    """TracIn without some of the checkpoints."""

    def __init__(self, left_out: Any) -> None:
        super().__init__()
        self.left_out = left_out

    def terms(self, stage: Any) -> Any:
        return [term for term in super().terms(stage) if term.query_at not in self.left_out]


def test_a_measurement_of_the_users_own(fit):
    def logit(module: Any, batch: Any) -> Tensor:
        return -module(batch)[:, 0]

    def loss(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch), batch["label"], reduction="none")

    batch = batch_of(ASKED)
    own = InfluenceModule(fit[0], fit[1], TracIn(), measurement=loss).scores(batch)
    torch.testing.assert_close(own, InfluenceModule(fit[0], fit[1], TracIn()).scores(batch), rtol=1e-10, atol=1e-14)
    assert not torch.allclose(InfluenceModule(fit[0], fit[1], TracIn(), measurement=logit).scores(batch), own)


# Which model, which data


def test_built_from_the_class(fit, truth, tmp_path):
    influence = InfluenceModule(Classifier, fit[1], TracIn())
    last = fit[1].weights(fit[1].checkpoints()[-1])
    assert all(torch.equal(v, last[n]) for n, v in influence.user.state_dict().items())  # in the precision of the fit
    torch.testing.assert_close(influence.scores(batch_of(ASKED)), truth, rtol=1e-10, atol=1e-14)

    class Needy(Classifier):
        def __init__(self, width: int, classes: int, depth: int) -> None:
            super().__init__(width, classes)

    with pytest.raises(StoreError, match="cannot be rebuilt"):
        InfluenceModule(Needy, fit[1], TracIn())
    manifest = fit[1].manifest
    bare = Manifest(**{**vars(manifest), "hyper_parameters": None})
    with pytest.raises(StoreError, match="cannot be rebuilt"):
        InfluenceModule(Classifier, ArtifactStore.create(tmp_path / "bare", bare), TracIn())


class Renamed(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.body = self.hidden
        del self.hidden


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (lambda: Classifier(width=6), EMBEDDING),
        (lambda: Classifier(classes=4), "head.weight"),
        (Renamed, "hidden.weight"),
    ],
)
def test_another_model(fit, other, name):
    with pytest.raises(StoreError, match=name):
        InfluenceModule(other(), fit[1], TracIn())


class Buffered(Classifier):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(size))


def test_weights_that_do_not_fit_leave_the_module_alone(tmp_path):
    module = classifier(kind=Buffered)
    store = store_of(tmp_path / "s", module)
    other = Buffered(5).double()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(StoreError, match="do not fit"):
        InfluenceModule(other, store, TracIn()).scores(batch_of(ASKED))
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_another_training_set(fit):
    shuffled, changed = Texts(), Texts()
    shuffled.texts, shuffled.labels = shuffled.texts[::-1], shuffled.labels[::-1]
    changed.labels[0] = (changed.labels[0] + 1) % 3
    InfluenceModule(fit[0], fit[1], TracIn(), train_loader=loader_of(TRAIN))
    for dataset, what in ((Texts(13), "13 samples"), (shuffled, "fingerprint"), (changed, "fingerprint")):
        with pytest.raises(StoreError, match=what):
            InfluenceModule(fit[0], fit[1], TracIn(), train_loader=loader_of(dataset))


def test_no_store_and_k_out_of_range(tmp_path, fit):
    with pytest.raises(StoreError, match="no artifact store"):
        InfluenceModule(fit[0], tmp_path / "nothing", TracIn())
    influence = InfluenceModule(fit[0], fit[1], TracIn(), k=15)
    for ask in (
        lambda: influence.query(batch_of(ASKED)),
        lambda: influence.query(batch_of(ASKED), k=0),
        lambda: quiet().predict(influence, loader_of(ASKED)),
    ):
        with pytest.raises(QueryError, match="k does not fit") as refused:
            ask()
        assert "HINT" in str(refused.value)


def test_a_store_without_checkpoints(tmp_path, fit):
    empty = ArtifactStore.create(tmp_path / "s", fit[1].manifest)
    with pytest.raises(QueryError, match="no checkpoint"):
        InfluenceModule(Classifier, empty, TracIn()).query(batch_of(ASKED))


def test_a_query_whose_gradient_is_not_finite(fit):
    influence = InfluenceModule(fit[0], fit[1], TracIn(), measurement=lambda m, b: m(b)[:, 0] * float("nan"))
    with pytest.raises(Exception, match="NaN or infinite"):
        influence.query(batch_of(ASKED))


@pytest.mark.parametrize("k", ["3", 2.0, None, [1]], ids=repr)
def test_k_that_is_no_number(fit, k):
    influence = InfluenceModule(fit[0], fit[1], TracIn(), k=k)
    with pytest.raises(QueryError, match="k does not fit"):
        influence.query(batch_of(ASKED))


@pytest.mark.parametrize("estimator", [TracInWE, "TracInWE", None], ids=repr)
def test_an_estimator_that_is_none(fit, estimator):
    with pytest.raises(QueryError, match="no estimator") as refused:
        InfluenceModule(fit[0], fit[1], estimator)
    assert "TracInWE()" in refused.value.hint


def test_a_batch_without_queries(fit):
    influence = InfluenceModule(fit[0], fit[1], TracIn())
    empty = {"tokens": torch.zeros(0, 5, dtype=torch.int64), "label": torch.zeros(0, dtype=torch.int64)}
    for ask in (influence.query, influence.scores, lambda batch: influence.words(batch, [[]])):
        with pytest.raises(QueryError, match="holds no query"):
            ask(empty)


@pytest.mark.parametrize("ids", [[[0, 1], [2]], "text", [["a"], ["b"]], None, [[0.5], [1.5]], [0, 1]], ids=repr)
def test_sample_ids_that_are_no_table(fit, ids):
    with pytest.raises(QueryError, match="must name some samples") as refused:
        InfluenceModule(fit[0], fit[1], TracInWE()).words(batch_of(ASKED, [0, 1]), ids)
    assert refused.value.expected == "integers of shape (2, k)"


# Answers of which some are refused, and memory


def test_a_query_without_a_shared_word_costs_nobody_else_an_answer(tmp_path, fit):
    path = tmp_path / "answers.safetensors"
    asked = Texts(11, seed=1)
    for lonely in (9, 4):
        asked.texts[lonely] = torch.tensor([23, 23, 23])
    refusing = InfluenceModule(fit[0], fit[1], TracInWE(exclude_tokens=[23]), k=3, save_to=path)
    with pytest.raises(QueryError, match="2 of 11 queries score 0") as refused:
        quiet().predict(refusing, loader_of(asked, 3))
    assert "[4, 9]" in refused.value.found
    kind = InfluenceModule(fit[0], fit[1], TracInWE(exclude_tokens=[23], unmatched="zeros"), k=3)
    quiet().predict(kind, loader_of(asked, 3))
    for found in (refusing.attribution, type(kind.attribution).load(path)):
        assert torch.equal(found.query_ids, kind.attribution.query_ids)
        assert torch.equal(found.proponents.sample_ids, kind.attribution.proponents.sample_ids)
        assert torch.equal(found.opponents.scores, kind.attribution.opponents.scores)
    order = [9, 0, 4]  # places in the dataset, whatever order the loader takes
    with pytest.raises(QueryError) as refused:
        quiet().predict(refusing, DataLoader(asked, 2, sampler=order, collate_fn=collate))
    assert "[4, 9]" in refused.value.found


def test_batches_wait_in_the_main_memory(fit, truth, monkeypatch):
    """Moved there when they are noted, and back one at a time when they are used."""
    from lightning_influence.queries import batches as query_batches

    moves, move = [], query_batches.move_data_to_device
    monkeypatch.setattr(
        query_batches, "move_data_to_device", lambda batch, to: moves.append(str(to)) or move(batch, to)
    )
    influence = InfluenceModule(fit[0], fit[1], TracIn(), k=2)
    monkeypatch.setattr(type(fit[0]), "device", torch.device("cpu", 0))
    quiet().predict(influence, loader_of(ASKED, 6))
    assert moves == ["cpu"] * 2 + ["cpu:0"] * 2 * 3
    assert torch.equal(influence.attribution.proponents.sample_ids, truth.sort(1, descending=True).indices[:, :2])


@pytest.mark.parametrize("estimator", [TracIn(), TracInWE(), TracInWE(synonyms=0.3)], ids=["all", "words", "synonyms"])
def test_query_gradients_of_one_checkpoint_at_a_time(fit, estimator, monkeypatch):
    from lightning_influence.estimators import estimator as room

    influence, asked = InfluenceModule(fit[0], fit[1], estimator), batch_of(Texts(3, seed=1))
    whole, best = influence.scores(asked), influence.query(asked, k=4)
    alive, sizes, query_side = set(), [], room.query_side

    def watched(terms: Any, queries: Any, projection: Any) -> Any:
        found = query_side(terms, queries, projection)
        for block in (block for gradients in found for block in gradients.values()):
            key = id(block)
            alive.add(key)
            Fate(block, lambda key=key: alive.discard(key))
        sizes.append(len(alive))
        return found

    monkeypatch.setattr(room, "query_side", watched)
    influence.scores(asked)
    together, sizes[:] = max(sizes), []
    monkeypatch.setattr(room, "_MOST_BYTES", 8 * 3 * len(TRAIN))
    assert torch.equal(influence.scores(asked), whole)
    assert max(sizes) * 3 == together, "the gradients of a checkpoint are gone when those of the next are taken"
    found = influence.query(asked, k=4)
    assert torch.equal(found.proponents.sample_ids, best.proponents.sample_ids)
    assert torch.equal(found.opponents.scores, best.opponents.scores)
