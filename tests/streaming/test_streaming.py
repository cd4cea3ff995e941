"""Streamed scores are those of stored gradients, in whatever order and batches the training data stream by."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence import (
    BM25,
    EKFAC,
    KFAC,
    CaptureError,
    CurvatureSnapshot,
    Diagonal,
    InfluenceFunction,
    InfluenceModule,
    LossError,
    QueryError,
    Relative,
    StoreError,
    TracIn,
    TracInLast,
    TracInWE,
)
from lightning_influence.curvature import Dense, recorded_curvature
from lightning_influence.gradients import Dense as Dense_
from lightning_influence.gradients import GradientCapture, select
from lightning_influence.samples import fingerprint
from tests.reference import per_sample_gradients
from tests.reference import tracin as reference_tracin
from tests.stores import Texts, all_names, group, in_flight_store, loader_of, quiet
from tests.streaming.models import QUERIES, SAMPLES, Case, Perceptron, Twice, bare_store, close, table, vectors


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("streaming")
    return {kind: Case(kind, folder / kind) for kind in ("mlp", "cnn", "twice", "text")}


@pytest.fixture
def mlp(cases: dict[str, Case]) -> Case:
    return cases["mlp"]


# The same scores

EVERYWHERE = [TracIn(), TracInLast(), *(InfluenceFunction(c) for c in (EKFAC(), KFAC(), Diagonal(), Dense("ggn")))]
IDS = ["TracIn", "TracInLast", "EKFAC", "KFAC", "Diagonal", "Dense"]


@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
@pytest.mark.parametrize("kind", ["mlp", "cnn", "twice", "text"])
@pytest.mark.parametrize("estimator", EVERYWHERE, ids=IDS)
def test_streamed_equals_stored(cases, kind, estimator):
    case = cases[kind]
    influence = case.influence(copy.copy(estimator))
    stored = influence.scores(case.batch(case.asked))
    prepared = influence.prepare(case.loader(case.asked, 2))
    assert prepared.num_queries == QUERIES and prepared.relative_error is None and prepared.nbytes > 0
    close(case.streamed(influence, case.loader(case.train, 5)), stored)


@pytest.mark.parametrize(
    "estimator",
    [TracInWE(), TracInWE(top_words=2, unmatched="zeros"), TracInWE(synonyms=0.3), TracInWE(exclude_tokens=[3, 5])],
    ids=["words", "top words", "synonyms", "excluded"],
)
def test_words(cases, estimator):
    case = cases["text"]
    influence = case.influence(estimator)
    stored = influence.scores(case.batch(case.asked))
    influence.prepare(case.loader(case.asked))
    close(case.streamed(influence), stored)


def loss(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def test_against_a_loop(mlp):
    """TracIn sample by sample, from formulas alone."""
    checkpoints = [(state, dict.fromkeys(all_names(mlp.module), 0.3 / (c + 1))) for c, state in enumerate(mlp.states)]
    expected = reference_tracin(mlp.module, loss, checkpoints, mlp.ones, mlp.ones_asked)
    influence = mlp.influence(TracIn())
    influence.prepare([mlp.batch(mlp.asked)])
    close(mlp.streamed(influence), expected)


@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
def test_a_store_without_any_gradients(tmp_path, mlp):
    """Weights are enough: the curvature comes from the training data, the gradients as they stream by."""
    bare = bare_store(tmp_path / "bare", mlp)
    options: dict[str, Any] = {"k": SAMPLES, "train_loader": mlp.loader(mlp.train)}
    influence = InfluenceModule(mlp.module, bare, InfluenceFunction(EKFAC()), **options)
    influence.prepare(mlp.loader(mlp.asked))
    found = mlp.streamed(influence)
    whole = mlp.influence(InfluenceFunction(EKFAC()))
    close(found, whole.scores(mlp.batch(mlp.asked)))
    for estimator, names in ((TracIn(), "body."), (TracIn("body.0.*"), "body.0."), (TracInLast(), "body.2.")):
        influence = InfluenceModule(mlp.module, bare, estimator, **options)
        influence.prepare(mlp.loader(mlp.asked))
        chosen = [name for name in all_names(mlp.module) if name.startswith(names)]
        checkpoints = [(mlp.states[-1], dict.fromkeys(chosen, 0.15))]
        close(mlp.streamed(influence), reference_tracin(mlp.module, loss, checkpoints, mlp.ones, mlp.ones_asked))
    with pytest.raises(QueryError, match="does not hold"):
        InfluenceModule(mlp.module, bare, TracInLast(), k=2).query(mlp.batch(mlp.asked))


class Doubling(Perceptron):
    """Its batches are changed on their way to the device."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], batch[1]]


def squares(module: Any, batch: Any) -> Tensor:
    return module(batch[0]).square().sum(1)


@pytest.mark.parametrize("given", ["transfer hook", "per_sample_loss", "sum"])
def test_the_loss_of_one_sample_as_the_fit_had_it(tmp_path, mlp, given):
    """The module's transfer hooks, a loss that was passed in, and a loss that is a sum over the batch."""

    class Summing(Perceptron):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")

    kinds: dict[str, Any] = {"transfer hook": Doubling, "per_sample_loss": Perceptron, "sum": Summing}
    options: dict[str, Any] = {"per_sample_loss": squares} if given == "per_sample_loss" else {}
    store = bare_store(tmp_path / "s", mlp, settings={"reduction": "sum" if given == "sum" else "mean"})
    influence = InfluenceModule(kinds[given]().double(), store, TracIn(), k=SAMPLES, **options)
    influence.prepare(mlp.loader(mlp.asked))

    def alone(module: Any, batch: Any) -> Tensor:
        if given == "per_sample_loss":
            return squares(module, batch).sum()
        return F.cross_entropy(module((2 if given == "transfer hook" else 1) * batch[0]), batch[1])

    checkpoints = [(mlp.states[-1], dict.fromkeys(all_names(mlp.module), 0.15))]
    close(mlp.streamed(influence), reference_tracin(mlp.module, alone, checkpoints, mlp.ones, mlp.ones_asked))


def test_in_mixed_precision(mlp):
    influence = mlp.influence(TracIn())
    stored = influence.scores(mlp.batch(mlp.asked))
    influence.prepare(mlp.loader(mlp.asked))
    found = mlp.streamed(influence, precision="bf16-mixed")
    assert float(F.cosine_similarity(found.flatten(), stored.flatten(), 0)) > 0.999 and not torch.equal(found, stored)


# Whatever the order


@pytest.mark.parametrize("size", [1, 3, 14, 100])
def test_batches_and_order_do_not_matter(cases, size):
    case = cases["text"]
    influence = case.influence(TracIn())
    stored = influence.scores(case.batch(case.asked))
    influence.prepare(case.loader(case.asked))
    close(case.streamed(influence, case.loader(case.train, size, sampler=torch.randperm(SAMPLES).tolist())), stored)


def test_samples_that_come_twice_count_once(mlp):
    influence = mlp.influence(TracIn(), k=3)
    stored = influence.scores(mlp.batch(mlp.asked))
    influence.prepare(mlp.loader(mlp.asked))
    order = [7, 0, 7, 3, 0, 12, 3]
    quiet().predict(influence, mlp.loader(mlp.train, 3, sampler=order))
    kept = torch.tensor([0, 3, 7, 12])
    best = kept[stored[:, kept].sort(1, descending=True).indices[:, :3]]
    assert torch.equal(influence.attribution.proponents.sample_ids, best)


def test_a_part_of_the_training_set(mlp):
    influence = mlp.influence(TracIn(), k=4)
    stored = influence.scores(mlp.batch(mlp.asked))
    influence.prepare(mlp.loader(mlp.asked))
    returned = quiet(limit_predict_batches=2).predict(influence, mlp.loader(mlp.train, 3))
    assert [ids.tolist() for ids in returned] == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(influence.attribution.opponents.sample_ids, stored[:, :6].sort(1).indices[:, :4])
    assert influence.attribution.query_ids.tolist() == list(range(QUERIES))
    influence.k = 7
    with pytest.raises(QueryError, match="k exceeds") as refused:
        quiet(limit_predict_batches=2).predict(influence, mlp.loader(mlp.train, 3))
    assert refused.value.expected == "k <= 6" and "limit_predict_batches" in refused.value.hint


def test_back_to_queries(mlp):
    influence = mlp.influence(TracIn(), k=2)
    influence.prepare(mlp.loader(mlp.asked))
    quiet().predict(influence, mlp.loader(mlp.train))
    assert influence.attribution.proponents.sample_ids.shape == (QUERIES, 2)
    assert influence.query(mlp.batch(mlp.asked)).proponents.sample_ids.shape == (QUERIES, 2)  # directly, at any time
    influence.unprepare()
    answers = quiet().predict(influence, mlp.loader(mlp.asked))
    assert [len(a) for a in answers] == [4, 1]
    close(influence.attribution.proponents.scores, influence.query(mlp.batch(mlp.asked)).proponents.scores)


def test_a_measurement_and_saved_answers(tmp_path, mlp):
    path = tmp_path / "answers.safetensors"
    influence = mlp.influence(TracIn(), measurement="margin", save_to=path)
    stored = influence.scores(mlp.batch(mlp.asked))
    influence.prepare(mlp.loader(mlp.asked))
    close(mlp.streamed(influence), stored)
    saved = type(influence.attribution).load(path)
    assert torch.equal(saved.proponents.sample_ids, influence.attribution.proponents.sample_ids)


# Less memory


@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
@pytest.mark.parametrize("kind", ["mlp", "cnn", "text"])
def test_low_rank(cases, kind, monkeypatch):
    case = cases[kind]
    influence = case.influence(InfluenceFunction(EKFAC()))
    stored = influence.scores(case.batch(case.asked))
    whole = influence.prepare(case.loader(case.asked, 2), rank=100)
    assert float(whole.relative_error.max()) < 1e-6
    close(case.streamed(influence), stored)
    monkeypatch.setattr("lightning_influence.streaming.prepared._MOST_BYTES", 1)  # a batch at a time
    thin = influence.prepare(case.loader(case.asked, 2), rank=1)
    assert thin.nbytes < whole.nbytes and thin.relative_error.shape == (QUERIES,)
    assert (thin.relative_error > 0).all() and (thin.relative_error < 0.9).all() and "relative error" in repr(thin)
    found = case.streamed(influence)
    for q in range(QUERIES):
        cosine = float(F.cosine_similarity(found[q], stored[q], 0))
        assert cosine > 0.5 and cosine < 1 - 1e-9


def test_half_precision(mlp):
    influence = mlp.influence(TracIn())
    stored = influence.scores(mlp.batch(mlp.asked))
    whole = influence.prepare(mlp.loader(mlp.asked))
    half = influence.prepare(mlp.loader(mlp.asked), dtype=torch.bfloat16)
    assert half.nbytes * 4 == whole.nbytes
    close(mlp.streamed(influence), stored, 2e-2)


def test_gradients_are_dropped_as_they_come(mlp):
    """No block is kept, and what a layer had read is let go inside the backward pass."""

    class Loose(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(weakref.ref(x.untyped_storage()))
            return x * 1.0

    alive: list[Any] = []
    module = nn.Sequential(Loose(), nn.Linear(6, 6), Loose(), nn.Linear(6, 3))
    seen: dict[str, int] = {}
    with GradientCapture(select(module, "all"), consumer=lambda name, block: seen.update({name: 1})) as capture:
        capture.begin(4)
        capture.backward(module(torch.randn(4, 6)).square().sum())
        assert capture.collect() == {}
        capture.begin(4)
        with pytest.raises(CaptureError, match="no gradient of '1"):
            capture.collect()
    gc.collect()
    assert list(seen) == ["3.weight", "3.bias", "1.weight", "1.bias"] and all(ref() is None for ref in alive)
    assert not any(layer._forward_hooks for layer in module.modules())


# No trace


class Fragile(Twice):
    """Fails at its third batch, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.fails = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert not self.training and not self.dropout.training
        if self.fails and len(batch[0]) == 2:  # the last batch alone
            raise RuntimeError("on purpose")
        self.log("loss", torch.tensor(1.0))
        return F.cross_entropy(self.dropout(self(batch[0])), batch[1])


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_left_as_it_was(cases, fails):
    twice = cases["twice"]
    module = Fragile().double()
    module.load_state_dict(twice.module.state_dict())
    module.train()
    module.body.eval()
    module.head.weight.requires_grad_(False)
    module.body.weight.grad = torch.ones_like(module.body.weight)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    influence = InfluenceModule(module, twice.store, TracIn(), k=2)
    random = torch.get_rng_state()
    influence.prepare(twice.loader(twice.asked))
    module.fails = fails
    loader = twice.loader(twice.train)
    loader.generator = torch.Generator()
    for run in (1, 2):
        if fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                quiet().predict(influence, loader)
        else:
            quiet().predict(influence, loader)
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items()), run
        assert [part.training for part in module.modules()] == modes
        assert torch.equal(module.body.weight.grad, torch.ones_like(module.body.weight))
        assert module.head.weight.grad is None and not module.head.weight.requires_grad
        assert torch.equal(torch.get_rng_state(), random)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


# Refusals


class Stream(IterableDataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        return (self.dataset[i] for i in range(len(self.dataset)))


def test_loaders_without_positions(mlp):
    influence = mlp.influence(TracIn())
    influence.prepare(mlp.loader(mlp.asked))
    batches = [mlp.batch(mlp.train)]
    for loader, found in (
        (DataLoader(Stream(mlp.train), 4), "Stream"),
        (DataLoader(batches, batch_size=None), "batch_size=None"),
        ([mlp.loader(mlp.train), mlp.loader(mlp.train)], "2 loaders"),
    ):
        with pytest.raises(QueryError) as refused:
            quiet().predict(influence, loader)
        assert found in refused.value.found and "HINT" in str(refused.value)


def test_another_training_set(mlp):
    influence = mlp.influence(TracIn())
    influence.prepare(mlp.loader(mlp.asked))
    for dataset, what in ((mlp.asked, f"{QUERIES} samples"), (vectors(SAMPLES, 5, 6), "fingerprint")):
        with pytest.raises(StoreError, match=what):
            quiet().predict(influence, mlp.loader(dataset))


def test_what_cannot_be_prepared(mlp, tmp_path):
    influence = mlp.influence(TracIn())
    for queries, match in ((mlp.batch(mlp.asked)[0], "no query batches"), ([], "no queries"), (7, "no query batches")):
        with pytest.raises(QueryError, match=match):
            influence.prepare(queries)
    for options in ({"rank": 0}, {"rank": True}, {"rank": 1.5}, {"dtype": torch.int8}, {"dtype": "half"}):
        with pytest.raises(QueryError):
            influence.prepare(mlp.loader(mlp.asked), **options)
    with pytest.raises(QueryError, match="no scores were kept"):
        influence.streamed_scores  # noqa: B018
    with pytest.raises(QueryError, match="bilinear"):
        mlp.influence(BM25()).prepare(mlp.loader(mlp.asked))
    tiny = mlp.influence(TracIn(), measurement=lambda m, b: m(b[0])[:, 0] * 1e9)
    with pytest.raises(QueryError, match="float16 can hold"):
        tiny.prepare(mlp.loader(mlp.asked), dtype=torch.float16)


def test_records_made_in_flight(cases, tmp_path):
    case = cases["text"]
    rates = [group(all_names(case.module), 0.1)]
    store = in_flight_store(
        tmp_path / "s", case.module, case.train, [(0, case.states[0], rates)], [(1, 3, case.states[0], [0.1], 1.0)]
    )
    influence = InfluenceModule(case.module, store, TracIn(), k=1)
    with pytest.raises(QueryError, match="in flight cannot be streamed") as refused:
        influence.prepare(case.loader(case.asked))
    assert "mode='replay'" in refused.value.hint


class Coupled(Perceptron):
    """Its loss compares the samples of a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self(batch[0])
        return (out @ out.T).square().mean()


def test_a_loss_that_couples_samples(mlp):
    influence = InfluenceModule(Coupled().double(), mlp.store, TracIn(), k=1, measurement=lambda m, b: m(b[0])[:, 0])
    influence.prepare(mlp.loader(mlp.asked))
    with pytest.raises(LossError, match="couples"):
        quiet().predict(influence, mlp.loader(mlp.train))


def test_a_sample_whose_gradient_is_not_finite(tmp_path, mlp):
    many = vectors(40, 7, 6)
    special = many.tensors[0][1, 0]  # of a sample that the self-check does not look at

    class Bad(Perceptron):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
            return (losses * torch.where(batch[0][:, 0] == special, float("inf"), 1.0)).mean()

    facts = {"dataset_length": len(many), "dataset_fingerprint": fingerprint(many)}
    store = bare_store(tmp_path / "s", mlp, **facts)
    influence = InfluenceModule(Bad().double(), store, TracIn(), k=1)
    influence.prepare(mlp.loader(mlp.asked))
    with pytest.raises(CaptureError, match="NaN or infinite") as refused:
        quiet().predict(influence, mlp.loader(many, 5))
    assert "for the samples 1" in refused.value.found


def test_k_and_pickles(mlp):
    import pickle

    influence = mlp.influence(TracInLast(), k=15)
    influence.prepare(mlp.loader(mlp.asked))
    with pytest.raises(QueryError, match="k does not fit"):
        quiet().predict(influence, mlp.loader(mlp.train))
    influence.k = SAMPLES
    expected = mlp.streamed(influence)
    influence.train_loader = None
    again = pickle.loads(pickle.dumps(influence))  # as for spawned processes
    quiet().predict(again, mlp.loader(mlp.train))
    close(table(again), expected)


def test_texts_and_their_loader(cases):
    """A dataset that a forked process reads, with a collate function."""
    influence = InfluenceModule(cases["text"].module, cases["text"].store, TracIn(), k=2)
    influence.prepare(loader_of(Texts(3, seed=2)))
    quiet().predict(influence, loader_of(Texts(SAMPLES), 4))
    assert len(influence.attribution) == 3


@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
def test_from_a_fit_to_an_answer_without_gradients_on_disk(tmp_path):
    """CurvatureSnapshot alone, and the whole formula by hand."""
    module, train, asked = Perceptron(), vectors(SAMPLES, 0, 6), vectors(QUERIES, 1, 6)
    module.double()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)  # type: ignore[method-assign]
    trainer = quiet(max_epochs=2, callbacks=[CurvatureSnapshot(tmp_path / "influence", EKFAC())])
    trainer.fit(module, DataLoader(train, 7))
    influence = InfluenceModule(module, tmp_path / "influence", InfluenceFunction("ekfac"), k=SAMPLES)
    with pytest.raises(QueryError, match="no training gradients"):
        influence.query(next(iter(DataLoader(asked, QUERIES))))
    influence.prepare(DataLoader(asked, 2))
    quiet().predict(influence, DataLoader(train, 4))
    rows = [per_sample_gradients(module, loss, list(DataLoader(d, 1)), all_names(module)) for d in (asked, train)]
    curvature = recorded_curvature(influence.store, "ekfac").curvature
    solved = curvature.solve({name: Dense_(values) for name, values in rows[0].items()}, Relative(0.1))
    expected = sum(solved[name].dense().flatten(1) @ rows[1][name].flatten(1).T for name in solved)
    close(table(influence), expected)
