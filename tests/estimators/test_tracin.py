"""TracIn in all its forms against explicit sums in float64, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_influence import GradientSnapshot, InfluenceModule, QueryError, StoreError, TracIn, TracInLast, TracInWE
from tests import reference
from tests.stores import (
    EMBEDDING,
    Classifier,
    Texts,
    all_names,
    batch_of,
    classifier,
    group,
    in_flight_store,
    loader_of,
    loss_of_one,
    quiet,
    replay_store,
    singles,
    trajectory,
)

TRAIN, ASKED = Texts(), Texts(5, seed=1)
HEAD = ["head.weight", "head.bias"]


def rates_of(names: list[str], c: int) -> dict[str, float]:
    """Two groups: the head learns ten times faster."""
    return {name: (0.5 if name in HEAD else 0.05) / (c + 1) for name in names}


def groups_of(c: int) -> list:
    body = [n for n in all_names(Classifier()) if n not in HEAD]
    return [group(body, 0.05 / (c + 1)), group(HEAD, 0.5 / (c + 1), 1)]


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory):
    module = classifier()
    states = trajectory(module, 3)
    denominators = [{name: value.abs() + 0.1 for name, value in state.items()} for state in states]
    root = tmp_path_factory.mktemp("tracin") / "store"
    return module, states, denominators, replay_store(root, module, TRAIN, states, groups_of, denominators=denominators)


def expected(fit, names: list[str], denominators=None) -> torch.Tensor:
    module, states, _, _ = fit
    checkpoints = [(state, rates_of(names, c)) for c, state in enumerate(states)]
    return reference.tracin(module, loss_of_one, checkpoints, singles(TRAIN), singles(ASKED), denominators)


def scores(fit, estimator, module=None) -> torch.Tensor:
    return InfluenceModule(module or fit[0], fit[3], estimator).scores(batch_of(ASKED))


def same(found: torch.Tensor, truth: torch.Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12 * float(truth.abs().max()))


def test_tracin_sums_two_groups_and_three_checkpoints(fit):
    same(scores(fit, TracIn()), expected(fit, all_names(fit[0])))


def test_tracin_takes_some_of_the_parameters(fit):
    same(scores(fit, TracIn("hidden.*")), expected(fit, ["hidden.weight", "hidden.bias"]))
    same(scores(fit, TracIn(["hidden.bias", "head.*"])), expected(fit, ["hidden.bias", *HEAD]))


def test_the_optimizer_as_preconditioner(fit):
    same(scores(fit, TracIn(preconditioner="optimizer")), expected(fit, all_names(fit[0]), fit[2]))
    same(scores(fit, TracInWE(preconditioner="optimizer")), expected(fit, [EMBEDDING], fit[2]))


def test_tracin_last_is_the_product_of_inputs_and_output_gradients(fit):
    module, states, _, _ = fit
    truth = torch.zeros(len(ASKED), len(TRAIN), dtype=torch.float64)
    for c, state in enumerate(states):
        copied = reference.at(module, state).eval()
        sides = []
        for dataset in (ASKED, TRAIN):
            batch = batch_of(dataset)
            a = copied.features(batch["tokens"])
            e = copied.head(a).softmax(1) - nn.functional.one_hot(batch["label"], 3)
            sides.append((torch.cat([a, torch.ones(len(a), 1)], 1), e))
        (a, e), (a_train, e_train) = sides
        truth += 0.5 / (c + 1) * (a @ a_train.T) * (e @ e_train.T)
    same(scores(fit, TracInLast()), truth.detach())
    same(scores(fit, TracInLast()), expected(fit, HEAD))


def test_a_frozen_embedding_takes_the_common_rate(tmp_path: Path):
    module = classifier()
    module.embedding.weight.requires_grad_(False)
    states = trajectory(module, 2)
    store = replay_store(
        tmp_path / "a", module, TRAIN, states, lambda c: [group(HEAD, 0.2)], parameters="word_embeddings"
    )
    truth = reference.tracin(
        module, loss_of_one, [(s, {EMBEDDING: 0.2}) for s in states], singles(TRAIN), singles(ASKED)
    )
    same(InfluenceModule(module, store, TracInWE()).scores(batch_of(ASKED)), truth)
    assert not module.embedding.weight.requires_grad
    differing = replay_store(
        tmp_path / "b",
        module,
        TRAIN,
        states[:1],
        lambda c: [group(["head.weight"], 0.2), group(["head.bias"], 0.1, 1)],
        parameters="word_embeddings",
    )
    with pytest.raises(StoreError, match="learning rate"):
        InfluenceModule(module, differing, TracInWE()).scores(batch_of(ASKED))


# In flight


def flight(tmp_path: Path, estimator, denominators=None):
    module = classifier()
    names, states = all_names(module), trajectory(module, 7)
    body = [name for name in names if name not in HEAD]
    groups = [group(body, 0.1), group(HEAD, 0.3, 1)]
    checkpoints = [(0, states[0], groups), (2, states[2], groups), (4, states[4], groups), (9, states[6], groups)]
    records, truth = [], []
    for step in (1, 2, 3, 4):  # the same sample twice at step 1, others never
        for z in (0, 3, 0) if step == 1 else (step, 5 + step):
            rates, size = [0.1 / step, 0.3 / step], 2.0 + z
            state = states[step]
            records.append((step, z, state, rates, size))
            truth.append((step, z, state, {n: rates[n in HEAD] for n in names}, size))
    store = in_flight_store(tmp_path / "flight", module, TRAIN, checkpoints, records, denominators=denominators)
    return module, store, InfluenceModule(module, store, estimator), [c[:2] for c in checkpoints], truth


def test_records_made_in_flight_are_weighted_by_their_step(tmp_path: Path):
    module, _, influence, checkpoints, records = flight(tmp_path, TracIn())
    truth = reference.in_flight_tracin(module, loss_of_one, checkpoints, records, singles(TRAIN), singles(ASKED))
    found = influence.scores(batch_of(ASKED))
    same(found, truth)
    assert (found[:, 13] == 0).all()  # never trained on
    top = influence.query(batch_of(ASKED), k=3)
    trained = sorted({record[1] for record in records})
    assert torch.equal(top.proponents.scores, found[:, trained].sort(1, descending=True).values[:, :3])
    own = torch.zeros(len(TRAIN), dtype=torch.float64)
    for _, z, state, rates, size in records:
        g = reference.per_sample_gradients(reference.at(module, state), loss_of_one, [singles(TRAIN)[z]])
        own[z] += sum(rate / size * float((g[name] ** 2).sum()) for name, rate in rates.items())
    torch.testing.assert_close(influence.self_influence(), own, rtol=1e-10, atol=1e-14)


def test_a_checkpoint_after_which_nothing_was_recorded_needs_no_query_gradient(tmp_path: Path, monkeypatch):
    _, store, influence, _, _ = flight(tmp_path, TracIn())
    asked = []
    weights = store.weights
    monkeypatch.setattr(store, "weights", lambda at: asked.append(at.step) or weights(at))
    influence.scores(batch_of(ASKED))
    assert asked == [0, 2]


def test_in_flight_the_first_stretch_takes_the_denominators_of_the_second_checkpoint(tmp_path: Path):
    names = all_names(classifier())
    shapes = {name: p.shape for name, p in classifier().named_parameters()}
    denominators = {step: {n: torch.full(shapes[n], 1.0 + step, dtype=torch.float64) for n in names} for step in (2, 4)}
    module, _, influence, checkpoints, records = flight(tmp_path, TracIn(preconditioner="optimizer"), denominators)
    early = [r for r in records if r[0] <= 2]
    late = [r for r in records if r[0] > 2]
    one = (module, loss_of_one, checkpoints)
    two = (singles(TRAIN), singles(ASKED))
    truth = (reference.in_flight_tracin(*one, early, *two) + reference.in_flight_tracin(*one, late, *two)) / 3
    same(influence.scores(batch_of(ASKED)), truth)


def test_a_store_without_records_is_refused(tmp_path: Path):
    module = classifier()
    store = in_flight_store(tmp_path / "s", module, TRAIN, [(0, module.state_dict(), [group(HEAD, 0.1)])], [])
    with pytest.raises(QueryError, match="no records"):
        InfluenceModule(module, store, TracIn()).scores(batch_of(ASKED))


# Signs


def test_training_on_a_proponent_lowers_the_loss_and_a_flipped_label_makes_an_opponent(tmp_path: Path):
    dataset = copy.deepcopy(TRAIN)
    text, label = dataset[0]
    dataset.texts += [text.clone(), text.clone()]
    dataset.labels += [label, (label + 1) % 3]  # the query again, and the query with another label
    module = classifier()
    store = replay_store(
        tmp_path / "s", module, dataset, [module.state_dict()], lambda c: [group(all_names(module), 1.0)]
    )
    query = batch_of(dataset, [0])
    found = InfluenceModule(module, store, TracIn()).query(query, k=3)
    assert {0, len(TRAIN)} <= set(found.proponents.sample_ids[0].tolist())
    assert int(found.opponents.sample_ids[0, 0]) == len(TRAIN) + 1
    for position, sign in ((len(TRAIN), -1), (len(TRAIN) + 1, 1)):
        trained = copy.deepcopy(module).eval()
        before = loss_of_one(trained, query)
        loss_of_one(trained, batch_of(dataset, [position])).backward()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter -= 1e-3 * parameter.grad
        change = float((loss_of_one(trained, query) - before).detach())
        score = float(InfluenceModule(module, store, TracIn()).scores(query)[0, position])
        assert change * sign > 0
        assert change == pytest.approx(-1e-3 * score, rel=1e-2)


def test_self_influence_is_the_diagonal(fit):
    names = all_names(fit[0])
    checkpoints = [(state, rates_of(names, c)) for c, state in enumerate(fit[1])]
    truth = reference.tracin(fit[0], loss_of_one, checkpoints, singles(TRAIN), singles(TRAIN)).diagonal()
    same(InfluenceModule(fit[0], fit[3], TracIn()).self_influence(), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_for_storage_only(tmp_path: Path, fit, dtype):
    module, states, _, _ = fit
    small = replay_store(tmp_path / "s", module, TRAIN, states, groups_of, dtype=dtype)
    truth = expected(fit, all_names(module))
    bits = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    found = InfluenceModule(module, small, TracIn())
    assert float((found.scores(batch_of(ASKED)) - truth).norm() / truth.norm()) < bits
    own = InfluenceModule(module, fit[3], TracIn()).self_influence()
    assert float((found.self_influence() - own).norm() / own.norm()) < bits


# What is refused


def test_unknown_words_of_the_user(fit):
    with pytest.raises(QueryError, match="preconditioner"):
        TracIn(preconditioner="adam")  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="decoder"):
        scores(fit, TracIn(["hidden.*", "decoder.*"]))


def test_parameters_that_were_not_captured(tmp_path: Path):
    module = classifier()
    arguments = (module, TRAIN, [module.state_dict()], lambda c: [group(all_names(module), 1.0)])
    words = replay_store(tmp_path / "w", *arguments, parameters="word_embeddings")
    last = replay_store(tmp_path / "l", *arguments, parameters="last_layer")
    with pytest.raises(QueryError, match=r"head\.weight"):
        InfluenceModule(module, words, TracInLast()).scores(batch_of(ASKED))
    with pytest.raises(QueryError, match="word-embedding"):
        InfluenceModule(module, last, TracInWE()).scores(batch_of(ASKED))


def test_sgd_has_no_second_moments(tmp_path: Path):
    module = classifier()
    store = replay_store(
        tmp_path / "s", module, TRAIN, [module.state_dict()], lambda c: [group(all_names(module), 1.0)]
    )
    with pytest.raises(QueryError, match="second moments"):
        InfluenceModule(module, store, TracIn(preconditioner="optimizer")).scores(batch_of(ASKED))


class Tied(Classifier):
    """A head that is the embedding's transpose."""

    def __init__(self) -> None:
        super().__init__(classes=24)
        self.head = nn.Linear(4, 24, bias=False)
        self.head.weight = self.embedding.weight


def test_of_a_tied_embedding_the_look_ups_count_alone(tmp_path: Path):
    module = classifier(kind=Tied)
    states = trajectory(module, 1)
    states[0]["head.weight"] = states[0][EMBEDDING]
    store = replay_store(
        tmp_path / "s", module, TRAIN, states, lambda c: [group([EMBEDDING], 1.0)], parameters="word_embeddings"
    )

    untied = copy.deepcopy(module)
    untied.head.weight = nn.Parameter(module.head.weight.detach().clone())
    truth = reference.tracin(untied, loss_of_one, [(states[0], {EMBEDDING: 1.0})], singles(TRAIN), singles(ASKED))
    same(InfluenceModule(module, store, TracInWE()).scores(batch_of(ASKED)), truth)
    with pytest.raises(QueryError, match="tied"):
        InfluenceModule(module, store, TracInLast()).scores(batch_of(ASKED))


@pytest.mark.parametrize("mode", ["replay", "in_flight"])
@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
def test_of_a_tied_embedding_after_a_real_fit(tmp_path: Path, mode):
    snapshot = GradientSnapshot(tmp_path / "s", mode=mode, dtype="float64")
    module = classifier(kind=Fitted)
    quiet(max_epochs=1, callbacks=[snapshot]).fit(module, loader_of(TRAIN))
    influence = InfluenceModule(module, tmp_path / "s", TracInWE(), k=3)
    found = influence.query(batch_of(ASKED))
    words = influence.words(batch_of(ASKED), found.proponents.sample_ids)
    sums = torch.tensor([[sum(c.score for c in pair) for pair in row] for row in words], dtype=torch.float64)
    torch.testing.assert_close(sums, found.proponents.scores, rtol=1e-10, atol=1e-16)


class Fitted(Tied):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
