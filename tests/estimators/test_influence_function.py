"""Influence functions against their formula, against retraining without each sample, and what they refuse."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import CurvatureSnapshot, GradientSnapshot, InfluenceFunction, InfluenceModule
from lightning_influence.artifacts import ArtifactStore
from lightning_influence.curvature import (
    EKFAC,
    KFAC,
    Dense,
    Diagonal,
    LowRank,
    MatrixFree,
    Relative,
    write_curvature,
)
from lightning_influence.errors import CurvatureError, QueryError
from tests import reference
from tests.curvature.settings import (
    Model,
    draws,
    evidence,
    eye,
    matrix_of,
    model,
    same,
    shapes_of,
)
from tests.stores import (
    Classifier,
    Texts,
    all_names,
    batch_of,
    classifier,
    collate,
    group,
    loader_of,
    loss_of_one,
    quiet,
    replay_store,
)
from tests.stores import singles as single_texts

TRAIN, ASKED = Texts(), Texts(5, seed=1)
FEW = pytest.mark.parametrize("statistics", [Dense("fisher"), Diagonal(), EKFAC()], ids=lambda s: s.name)
FAR = "The model was far from a stationary point"
pytestmark = pytest.mark.filterwarnings(f"ignore:{FAR}")  # most of these models are not trained at all


def with_curvature(
    root: Path,
    module: Any,
    dataset: Any,
    *statistics: Any,
    parameters: Any = "all",
    of_curvature: Any = None,
    labels: Any = "exact",
    batch_size: int = 4,
    shard_size: int = 5,
    decay: float = 0.0,
    batch: Any = batch_of,
    collate_fn: Any = collate,
    steps: int = 1,
) -> ArtifactStore:
    """A store as a fit leaves it, with gradients and curvatures at the last checkpoint."""
    groups = [group(all_names(module), 0.1)]
    states = [module.state_dict()] * steps
    options: dict[str, Any] = {"parameters": parameters, "shard_size": shard_size, "batch": batch}
    store = replay_store(root, module, dataset, states, lambda c: groups, **options)
    writer = ArtifactStore.resume(root, store.manifest, None)
    for each in statistics:
        chosen = parameters if of_curvature is None else of_curvature
        found = evidence(module, dataset, chosen, labels=labels, batch_size=batch_size, collate=collate_fn)
        rates = dict.fromkeys(found.selection.names, decay) if decay else {}
        write_curvature(writer, writer.checkpoints()[-1], each, each.collect(found), found, rates)
    return ArtifactStore.open(root)


def class_labels(module: Any, batch: Any) -> Any:
    """Every class of a text, in eval mode, for the reference."""
    module.eval()
    log_p = module(batch)[0].log_softmax(0)
    for value in log_p:
        yield value.detach().exp(), -value


def rows(module: Any, samples: Any, names: Any) -> Tensor:
    """Gradients of single samples' losses, (N, P)."""
    found = reference.per_sample_gradients(module, loss_of_one, samples, names)
    return torch.cat([found[name].flatten(1) for name in names], 1)


def scores(module: Any, store: Any, estimator: Any, batch: Any = None, **options: Any) -> Tensor:
    return InfluenceModule(module, store, estimator, **options).scores(batch_of(ASKED) if batch is None else batch)


# The formula


def test_with_the_dense_fisher_information_it_is_the_formula(tmp_path: Path):
    module = classifier()
    names = all_names(module)
    store = with_curvature(tmp_path / "s", module, TRAIN, Dense("fisher"), decay=0.02)
    fisher = reference.fisher(module, class_labels, single_texts(TRAIN), names).mean(0)
    query, train = rows(module, single_texts(ASKED), names), rows(module, single_texts(TRAIN), names)
    decayed = fisher + 0.02 * eye(len(fisher))
    same(scores(module, store, InfluenceFunction(damping=0.1)), reference.influence(query, train, decayed, 0.1))
    relative = 0.3 * float(fisher.trace()) / len(fisher)
    found = scores(module, store, InfluenceFunction("dense_fisher", damping=Relative(0.3)))
    same(found, reference.influence(query, train, decayed, relative))
    default = 0.1 * float(fisher.trace()) / len(fisher)
    same(scores(module, store, InfluenceFunction()), reference.influence(query, train, decayed, default))


@pytest.mark.parametrize(
    "statistics", [Dense("fisher"), Dense("hessian"), Diagonal(), KFAC(), EKFAC()], ids=lambda s: s.name
)
def test_with_every_curvature_it_is_the_formula_in_blocks(tmp_path: Path, statistics):
    module = classifier()
    names = all_names(module)
    store = with_curvature(tmp_path / "s", module, TRAIN, statistics)
    curvature = statistics.collect(evidence(module, TRAIN, labels="exact", collate=collate))
    train, query = (
        reference.per_sample_gradients(module, loss_of_one, single_texts(data), names) for data in (TRAIN, ASKED)
    )
    truth = torch.zeros(len(ASKED), len(TRAIN), dtype=torch.float64)
    for block in curvature.blocks:
        q, t = (torch.cat([side[name].flatten(1) for name in block.names], 1) for side in (query, train))
        matrix = matrix_of(curvature, shapes_of(module, block.names)) if len(curvature.blocks) > 1 else None
        matrix = block.matrix if matrix is None else matrix
        truth += reference.influence(q, t, matrix, 0.2)
    same(scores(module, store, InfluenceFunction(damping=0.2)), truth, 1e-9)


def test_some_of_the_parameters(tmp_path: Path):
    module = classifier()
    store = with_curvature(tmp_path / "s", module, TRAIN, EKFAC())
    whole = scores(module, store, InfluenceFunction(damping=0.2))
    parts = [
        scores(module, store, InfluenceFunction(damping=0.2, parameters=globs))
        for globs in ("head.*", ["hidden.weight", "hidden.bias"], "embedding.*")
    ]
    same(sum(parts[1:], parts[0]), whole)
    head = scores(module, store, InfluenceFunction(Dense("fisher"), damping=0.2, parameters="head.*", labels="exact"),
                  train_loader=loader_of(TRAIN))  # fmt: skip
    names = ["head.weight", "head.bias"]
    fisher = reference.fisher(module, class_labels, single_texts(TRAIN), names).mean(0)
    sides = (rows(module, single_texts(data), names) for data in (ASKED, TRAIN))
    same(head, reference.influence(*sides, fisher, 0.2))


def test_parameters_that_only_one_of_both_knows_are_left_out(tmp_path: Path):
    module = classifier()
    head = with_curvature(tmp_path / "a", module, TRAIN, EKFAC(), parameters="last_layer", of_curvature="all")
    whole = with_curvature(tmp_path / "b", module, TRAIN, EKFAC(), of_curvature="last_layer")
    same(scores(module, head, InfluenceFunction()), scores(module, whole, InfluenceFunction()))


def test_the_curvature_of_the_last_checkpoint_is_asked_at_its_weights(tmp_path: Path):
    module = classifier()
    store = with_curvature(tmp_path / "s", module, TRAIN, EKFAC(), steps=2)
    (term,) = InfluenceFunction().terms(InfluenceModule(module, store, InfluenceFunction()).stage)
    assert term.query_at == term.train_at == store.checkpoints()[-1]
    assert InfluenceFunction.counterfactual
    truth = scores(module, store, InfluenceFunction())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3.0)  # what the module holds at the moment does not matter
    torch.testing.assert_close(scores(module, store, InfluenceFunction()), truth, rtol=0, atol=0)


# Signs


@FEW
def test_self_influence_is_positive_and_the_diagonal(tmp_path: Path, statistics):
    module = classifier()
    store = with_curvature(tmp_path / "s", module, TRAIN, statistics)
    influence = InfluenceModule(module, store, InfluenceFunction(damping=1.0))
    own = influence.self_influence()
    same(own, influence.scores(batch_of(TRAIN)).diagonal())
    assert bool((own > 0).all())


@FEW
def test_the_query_itself_is_a_proponent_and_with_another_label_an_opponent(tmp_path: Path, statistics):
    dataset = Texts()
    text, label = dataset[0]
    dataset.texts += [text.clone(), text.clone()]
    dataset.labels += [label, (label + 1) % 3]
    module = classifier()
    store = with_curvature(tmp_path / "s", module, dataset, statistics)
    found = scores(module, store, InfluenceFunction(damping=Relative(1.0)), batch_of(dataset, [0]))[0]
    assert float(found[0]) > 0 and float(found[14]) == pytest.approx(float(found[0])) and float(found[15]) < 0
    assert int(found.argmin()) == 15


# What must not matter


def test_asking_again_and_in_other_batches(tmp_path: Path):
    module = classifier()
    influence = InfluenceModule(module, with_curvature(tmp_path / "s", module, TRAIN, EKFAC()), InfluenceFunction())
    first = influence.scores(batch_of(ASKED))
    assert torch.equal(influence.scores(batch_of(ASKED)), first)
    assert torch.equal(influence.scores(batch_of(ASKED)), first)
    alone = torch.cat([influence.scores(batch_of(ASKED, [q])) for q in range(len(ASKED))])
    same(alone, first)
    turned = influence.scores(batch_of(ASKED, [3, 1, 4, 0, 2]))
    same(turned, first[[3, 1, 4, 0, 2]])


@pytest.mark.parametrize("labels", ["exact", "sampled", "observed"])
@pytest.mark.parametrize("statistics", [EKFAC(), Dense("fisher")], ids=lambda s: s.name)
def test_batches_and_shards_of_the_fit(tmp_path: Path, statistics, labels):
    module = classifier()
    truth = scores(
        module, with_curvature(tmp_path / "t", module, TRAIN, statistics, labels=labels), InfluenceFunction()
    )
    for batch_size, shard_size in ((1, 3), (14, 14), (3, 1)):
        options = {"labels": labels, "batch_size": batch_size, "shard_size": shard_size}
        store = with_curvature(tmp_path / f"{batch_size}", module, TRAIN, statistics, **options)
        same(scores(module, store, InfluenceFunction()), truth, 1e-9)


def test_the_order_of_the_training_set(tmp_path: Path):
    module, turned = classifier(), Texts()
    order = torch.randperm(len(TRAIN), generator=torch.Generator().manual_seed(0)).tolist()
    turned.texts, turned.labels = [TRAIN.texts[i] for i in order], [TRAIN.labels[i] for i in order]
    stores = [with_curvature(tmp_path / name, module, data, EKFAC()) for name, data in (("a", TRAIN), ("b", turned))]
    found, other = (scores(module, store, InfluenceFunction()) for store in stores)
    same(other, found[:, order], 1e-9)


# Estimated when it is needed


class Fitted(Classifier):
    def configure_optimizers(self) -> Any:
        body = [p for name, p in self.named_parameters() if not name.startswith("head")]
        head = [{"params": body}, {"params": self.head.parameters(), "weight_decay": 0.0}]
        return torch.optim.AdamW(head, lr=0.05, weight_decay=0.1)


def fitted(root: Path, *callbacks: Any, kind: Any = Fitted, epochs: int = 2) -> Any:
    module = classifier(kind=kind)
    quiet(max_epochs=epochs, callbacks=list(callbacks)).fit(module, loader_of(TRAIN))
    return module


@pytest.mark.parametrize(
    ("statistics", "labels"),
    [(EKFAC(), None), (EKFAC(), "sampled"), (KFAC(), "observed"), (Diagonal(), None), (Dense("hessian"), None)],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_estimate_at_hand_equals_the_one_that_the_callback_wrote(tmp_path: Path, statistics, labels):
    gradients = GradientSnapshot(tmp_path / "s", parameters="all", dtype="float64")
    module = fitted(tmp_path, gradients, CurvatureSnapshot(tmp_path / "s", statistics, labels=labels, seed=3))
    store = ArtifactStore.open(tmp_path / "s")
    truth = scores(module, store, InfluenceFunction(statistics.name, damping=0.5))
    estimator = InfluenceFunction(statistics, damping=0.5, labels=labels, seed=3)
    same(scores(module, store, estimator, train_loader=loader_of(TRAIN)), truth, 1e-8)
    recorded = estimator.recorded(InfluenceModule(module, store, estimator, train_loader=loader_of(TRAIN)).stage)
    assert set(recorded.decay) == {"embedding.weight", "hidden.weight", "hidden.bias"}
    assert recorded.labels == (None if isinstance(statistics, Dense) else labels or "exact")


class Summed(Fitted):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), batch["label"], reduction="sum")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=0.1)


def test_beside_a_sum_over_the_batch_weight_decay_weighs_less(tmp_path: Path):
    """The step descends Σ ℓ + wd/2 |θ|²: in units of the mean loss, wd over the batch size."""
    gradients = GradientSnapshot(tmp_path / "s", parameters="all", dtype="float64")
    module = fitted(tmp_path, gradients, kind=Summed)
    store = ArtifactStore.open(tmp_path / "s")
    estimator = InfluenceFunction(Dense("fisher"), labels="exact")
    influence = InfluenceModule(module, store, estimator, train_loader=loader_of(TRAIN, 4))
    recorded = estimator.recorded(influence.stage)
    assert recorded.decay == dict.fromkeys(all_names(module), 0.025)


def test_an_estimate_is_made_once_and_anew_for_other_weights(tmp_path: Path, monkeypatch):
    module = classifier()
    stores = [with_curvature(tmp_path / name, module, TRAIN) for name in "ab"]
    made = []
    collect = EKFAC.collect
    monkeypatch.setattr(EKFAC, "collect", lambda self, found: made.append(1) or collect(self, found))
    estimator = InfluenceFunction(EKFAC())
    influence = InfluenceModule(module, stores[0], estimator, train_loader=loader_of(TRAIN))
    first = influence.scores(batch_of(ASKED))
    assert torch.equal(influence.scores(batch_of(ASKED)), first) and len(made) == 1
    scores(module, stores[1], estimator, train_loader=loader_of(TRAIN))
    assert len(made) == 2


def test_matrix_free_products_are_taken_at_the_weights_of_the_checkpoint(tmp_path: Path):
    """A module with other weights gets the answers of the fit, those of the dense matrix; and keeps its weights."""
    module = fitted(tmp_path, GradientSnapshot(tmp_path / "s", parameters="all", dtype="float64"))
    options = {"damping": 0.1, "parameters": "head.*"}
    exact = InfluenceFunction(Dense("ggn"), **options)
    expected = scores(module, tmp_path / "s", exact, train_loader=loader_of(TRAIN))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3)
    moved = copy.deepcopy(module.state_dict())
    free = InfluenceFunction(MatrixFree(tolerance=1e-12), **options)
    found = scores(module, tmp_path / "s", free, train_loader=loader_of(TRAIN))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    assert all(torch.equal(value, moved[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("statistics", [MatrixFree(), LowRank(3), Dense("hessian")], ids=lambda s: s.name)
def test_labels_of_exact_second_derivatives_are_refused(statistics):
    with pytest.raises(CurvatureError, match="labels have no effect"):
        InfluenceFunction(statistics, labels="observed")
    with pytest.raises(CurvatureError, match="labels have no effect"):
        CurvatureSnapshot("store", statistics, labels="sampled")


def test_what_was_asked_before_does_not_change_what_an_estimate_is_of(tmp_path: Path):
    """Stored gradients are of one layer; those that stream by are of all, whichever was asked first."""
    gradients = GradientSnapshot(tmp_path / "s", parameters="hidden.*", dtype="float64")
    module = fitted(tmp_path, gradients)
    estimator = InfluenceFunction(Diagonal())
    influence = InfluenceModule(module, tmp_path / "s", estimator, train_loader=loader_of(TRAIN))
    stored = estimator.recorded(influence.stage).curvature.parameters
    streamed = estimator.recorded(replace(influence.stage, stored=False)).curvature.parameters
    assert all(name.startswith("hidden.") for name in stored)
    assert set(streamed) == set(all_names(module))
    other = copy.deepcopy(module)
    assert estimator.recorded(replace(influence.stage, module=other)) is not estimator.recorded(influence.stage)


class Tied(LightningModule):
    """A bag of words whose output head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.words.weight

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return F.cross_entropy(self.head(self.words(batch[0]).mean(1)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("of_gradients", ["word_embeddings", "all"])
@pytest.mark.parametrize("of_curvature", ["word_embeddings", "all"])
def test_of_a_tied_embedding_gradients_and_curvature_are_of_the_same_uses(tmp_path: Path, of_gradients, of_curvature):
    words = torch.arange(24).reshape(8, 3) % 5
    loader = DataLoader(TensorDataset(words, torch.arange(8) % 5), batch_size=4)
    module = Tied()
    gradients = GradientSnapshot(tmp_path / "s", parameters=of_gradients)
    curvature = CurvatureSnapshot(tmp_path / "s", "diagonal", parameters=of_curvature)
    quiet(max_epochs=1, callbacks=[gradients, curvature]).fit(module, loader)
    influence = InfluenceModule(module, tmp_path / "s", InfluenceFunction())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        influence.scores(next(iter(loader)))
    said = any("is tied" in str(warning.message) for warning in caught)
    assert said == (of_gradients != of_curvature)


# What is refused


def test_a_store_without_a_curvature_says_what_to_add(tmp_path: Path):
    module = classifier()
    store = with_curvature(tmp_path / "s", module, TRAIN)
    with pytest.raises(CurvatureError, match="no such curvature") as caught:
        scores(module, store, InfluenceFunction())
    assert "CurvatureSnapshot(store)" in caught.value.hint
    with pytest.raises(CurvatureError, match="no such curvature"):
        scores(module, store, InfluenceFunction("ekfac"))


def test_a_wrong_name_and_several_without_a_name(tmp_path: Path):
    module = classifier()
    store = with_curvature(tmp_path / "s", module, TRAIN, EKFAC(), Diagonal())
    with pytest.raises(CurvatureError, match="several curvatures"):
        scores(module, store, InfluenceFunction())
    with pytest.raises(CurvatureError, match="no such curvature") as caught:
        scores(module, store, InfluenceFunction("lissa"))
    assert "diagonal, ekfac" in str(caught.value)


def test_a_curvature_where_there_are_no_gradients(tmp_path: Path):
    module = fitted(tmp_path, CurvatureSnapshot(tmp_path / "s"))
    with pytest.raises(QueryError, match="no training gradients at step 8") as caught:
        scores(module, ArtifactStore.open(tmp_path / "s"), InfluenceFunction())
    assert "GradientSnapshot" in caught.value.hint and "prepare" in caught.value.hint


def test_gradients_of_other_parameters(tmp_path: Path):
    module = classifier()
    store = with_curvature(
        tmp_path / "s", module, TRAIN, EKFAC(), parameters="word_embeddings", of_curvature="last_layer"
    )
    with pytest.raises(QueryError, match="share no parameter") as caught:
        scores(module, store, InfluenceFunction())
    assert "head.weight" in str(caught.value) and "embedding.weight" in str(caught.value)


def test_a_weight_without_its_bias(tmp_path: Path):
    module = classifier()
    store = with_curvature(tmp_path / "s", module, TRAIN, EKFAC(), parameters="head.weight", of_curvature="last_layer")
    with pytest.raises(CurvatureError, match="only a part of it is asked for") as caught:
        scores(module, store, InfluenceFunction())
    assert "gradients of head.bias too" in str(caught.value)
    whole = with_curvature(tmp_path / "w", module, TRAIN, EKFAC())
    with pytest.raises(CurvatureError, match="only a part of it"):
        scores(module, whole, InfluenceFunction(parameters="head.bias"))


@pytest.mark.parametrize("curvature", [None, EKFAC()])
def test_parameters_that_nobody_knows(tmp_path: Path, curvature):
    module = classifier()
    store = with_curvature(tmp_path / "s", module, TRAIN, Diagonal())
    with pytest.raises(QueryError, match="decoder") as caught:
        estimator = InfluenceFunction(curvature, parameters=["head.*", "decoder.*"])
        scores(module, store, estimator, train_loader=loader_of(TRAIN))
    assert "head.weight" in str(caught.value)


def test_an_estimate_without_training_data(tmp_path: Path):
    module = classifier()
    store = with_curvature(tmp_path / "s", module, TRAIN)
    with pytest.raises(QueryError, match="EKFAC is estimated from the training data") as caught:
        scores(module, store, InfluenceFunction(EKFAC()))
    assert "train_loader=train_loader" in caught.value.hint


@pytest.mark.parametrize("curvature", [EKFAC, 3, ["ekfac"]])
def test_things_that_are_no_curvature(curvature):
    with pytest.raises(QueryError, match="no curvature"):
        InfluenceFunction(curvature)


def test_a_damping_that_nobody_chose(tmp_path: Path):
    module = classifier()
    store = with_curvature(tmp_path / "s", module, TRAIN, EKFAC())
    with pytest.raises(QueryError, match=r"no damping has been chosen for the curvature 'ekfac'") as caught:
        scores(module, store, InfluenceFunction(damping="auto"))
    assert "choose_damping" in caught.value.hint
    writer = ArtifactStore.resume(tmp_path / "s", store.manifest, None)
    writer.record("damping", {"ekfac": Relative(0.7).record()})
    chosen = scores(module, ArtifactStore.open(tmp_path / "s"), InfluenceFunction(damping="auto"))
    same(chosen, scores(module, store, InfluenceFunction(damping=Relative(0.7))))
    with pytest.raises(CurvatureError, match="cannot be negative"):
        InfluenceFunction(damping=-0.1)


# Retraining: a convex model, its optimum, and the optimum without some of the samples

N, DECAY, EPOCHS = 200, 0.03, 400


def clusters(count: int, seed: int) -> TensorDataset:
    """Three overlapping classes in four dimensions."""
    centres = draws(3, 4, seed=5)
    labels = torch.arange(count) % 3
    return TensorDataset(0.8 * centres[labels] + draws(count, 4, seed=seed), labels)


class Logistic(Model):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9, weight_decay=DECAY)


CLUSTERS, HELD_OUT = clusters(N, 1), clusters(20, 2)
QUERIES = (HELD_OUT.tensors[0], HELD_OUT.tensors[1])


@pytest.fixture(scope="module")
def converged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ArtifactStore]:
    root = tmp_path_factory.mktemp("logistic") / "s"
    callbacks = [
        GradientSnapshot(root, parameters="all", dtype="float64", every_n_epochs=EPOCHS),
        CurvatureSnapshot(root, Dense("hessian")),
        CurvatureSnapshot(root, EKFAC()),
    ]
    module = model(Logistic)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", FAR)
        quiet(max_epochs=EPOCHS, callbacks=callbacks).fit(module, DataLoader(CLUSTERS, batch_size=N))
    return module, ArtifactStore.open(root)


def weights_of(module: Any) -> Tensor:
    return torch.cat([module.network.weight, module.network.bias[:, None]], 1).detach()


def losses(theta: Tensor) -> Tensor:
    """Of the queries."""
    z = torch.cat([QUERIES[0], torch.ones(len(QUERIES[0]), 1)], 1) @ theta.T
    return F.cross_entropy(z, QUERIES[1], reduction="none")


def without(samples: list[int], start: Tensor) -> Tensor:
    """The optimum without some samples, with the 1/N of all."""
    weights = torch.ones(N)
    weights[samples] = 0
    return reference.logistic_regression(*CLUSTERS.tensors, DECAY, weights, start=start)


def compared(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """Pearson correlation, and the slope of the truth on the prediction, over queries and removals."""
    p, t = predicted.flatten() - predicted.mean(), true.flatten() - true.mean()
    return float(p @ t / (p.norm() * t.norm())), float(p @ t / (p @ p))


def test_the_fit_has_reached_the_optimum(converged):
    theta = weights_of(converged[0])
    torch.testing.assert_close(theta, reference.logistic_regression(*CLUSTERS.tensors, DECAY), rtol=1e-8, atol=1e-9)


def test_leaving_a_sample_out(converged):
    module, store = converged
    theta, left_out = weights_of(module), list(range(0, N, 7))
    found = InfluenceModule(module, store, InfluenceFunction("dense_hessian", damping=0.0)).scores(QUERIES)
    predicted = found[:, left_out] / N
    true = torch.stack([losses(without([z], theta)) - losses(theta) for z in left_out], 1)
    pearson, slope = compared(predicted, true)
    assert pearson >= 0.99
    assert slope == pytest.approx(1.0, abs=0.05)
    assert float((predicted - true).norm()) < 0.1 * float(true.norm())
    helpful = predicted.abs() > 1e-4  # a proponent's absence raises the loss
    assert bool((predicted.sign() == true.sign())[helpful].all())


def test_removing_five_percent(converged):
    module, store = converged
    theta = weights_of(module)
    found = InfluenceModule(module, store, InfluenceFunction("dense_hessian", damping=0.0)).scores(QUERIES)
    groups = [
        torch.randperm(N, generator=torch.Generator().manual_seed(seed))[: N // 20].tolist() for seed in range(20)
    ]
    predicted = torch.stack([found[:, samples].sum(1) / N for samples in groups], 1)
    true = torch.stack([losses(without(samples, theta)) - losses(theta) for samples in groups], 1)
    pearson, slope = compared(predicted, true)
    assert pearson >= 0.99
    assert slope == pytest.approx(1.0, abs=0.15)


def test_without_the_weight_decay_in_it_the_amounts_are_wrong(converged):
    module, _ = converged
    theta, left_out = weights_of(module), list(range(0, N, 7))
    hessian = Dense("hessian").collect(evidence(module, CLUSTERS, batch_size=N))
    train, query = (
        torch.stack([flat_gradient(module, x, y) for x, y in zip(*data, strict=True)])
        for data in (CLUSTERS.tensors, QUERIES)
    )
    plain = matrix_of(hessian, shapes_of(module, all_names(module)))
    true = torch.stack([losses(without([z], theta)) - losses(theta) for z in left_out], 1)
    slopes = [
        compared(reference.influence(query, train[left_out], plain, shift) / N, true)[1] for shift in (DECAY, 1e-6)
    ]
    assert slopes[0] == pytest.approx(1.0, abs=0.05)
    assert slopes[1] < 0.93


def flat_gradient(module: Any, x: Tensor, y: Tensor) -> Tensor:
    gradients = torch.autograd.grad(F.cross_entropy(module(x[None]), y[None]), list(module.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_for_a_convex_classifier_hessian_gauss_newton_and_fisher_are_one(converged):
    module, store = converged
    at_hand = [
        InfluenceModule(
            module,
            store,
            InfluenceFunction(Dense(matrix), damping=0.01, labels="exact" if matrix == "fisher" else None),
            train_loader=DataLoader(CLUSTERS, batch_size=N),
        ).scores(QUERIES)
        for matrix in ("fisher", "ggn")
    ]
    truth = InfluenceModule(module, store, InfluenceFunction("dense_hessian", damping=0.01)).scores(QUERIES)
    for found in at_hand:
        same(found, truth)


def test_ekfac_ranks_as_the_hessian_does(converged):
    module, store = converged
    theta, left_out = weights_of(module), list(range(0, N, 7))
    found = InfluenceModule(module, store, InfluenceFunction("ekfac", damping=1e-6)).scores(QUERIES)[:, left_out]
    true = torch.stack([losses(without([z], theta)) - losses(theta) for z in left_out], 1)
    pearson, slope = compared(found / N, true)
    assert pearson > 0.9
    assert 0.7 < slope < 1.4


# Half-trained models


def one_sided(count: int) -> TensorDataset:
    """Nearly all of one class, so that all samples pull a fresh model the same way."""
    labels = (torch.arange(count) % 20 == 0).long()
    return TensorDataset(0.1 * draws(count, 4), labels)


def test_a_barely_trained_model_is_warned_of(tmp_path: Path):
    module, data = model(Logistic), one_sided(60)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    root = tmp_path / "s"
    callbacks = [GradientSnapshot(root, parameters="all", dtype="float64"), CurvatureSnapshot(root)]
    quiet(max_steps=1, callbacks=callbacks).fit(module, DataLoader(data, batch_size=1))
    with pytest.warns(UserWarning, match=f"{FAR} at step 1") as caught:
        InfluenceModule(module, root, InfluenceFunction()).scores([t[:3] for t in data.tensors])
    assert "train longer" in str(caught[0].message)
    estimator = InfluenceFunction(EKFAC())
    influence = InfluenceModule(module, root, estimator, train_loader=DataLoader(data, batch_size=8))
    with pytest.warns(UserWarning, match=FAR):
        influence.scores([t[:3] for t in data.tensors])
    influence.scores([t[:3] for t in data.tensors])  # said once


@pytest.mark.filterwarnings(f"error:{FAR}")
def test_a_converged_model_is_not(converged):
    module, store = converged
    for curvature in ("ekfac", "dense_hessian"):
        InfluenceModule(module, store, InfluenceFunction(curvature)).scores(QUERIES)
    estimator = InfluenceFunction(EKFAC())
    influence = InfluenceModule(module, store, estimator, train_loader=DataLoader(CLUSTERS, batch_size=N))
    look = estimator.recorded(influence.stage).stationarity
    assert look is not None and look.num_samples == N
    assert look.ratio < 1e-8
