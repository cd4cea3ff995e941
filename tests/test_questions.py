"""What else can be asked: removals, groups, tokens, neighbours and a damping; each against an explicit loop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import (
    CurvatureSnapshot,
    GradientSnapshot,
    InfluenceFunction,
    InfluenceModule,
    NearestFirst,
    QueryError,
    Random,
    Relative,
    Removals,
    TracIn,
    TracInWE,
)
from lightning_influence.curvature import Dense
from tests.reference import per_sample_gradients
from tests.stores import quiet

WORDS, TRAIN, ASKED = 12, 30, 4


class Speaker(LightningModule):
    """A tiny language model: each token foretells the next; token 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 5, padding_idx=0)
        self.norm = nn.LayerNorm(5)
        self.mixing = nn.Linear(5, 6)
        self.head = nn.Linear(6, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.words(tokens)).cumsum(1)
        return self.head(torch.tanh(self.mixing(h)))

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        (tokens,) = batch
        z = self(tokens[:, :-1])
        return F.cross_entropy(z.reshape(-1, WORDS), tokens[:, 1:].reshape(-1), ignore_index=0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, weight_decay=1e-3)


def texts(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, WORDS, (count, 7), generator=generator)
    lengths = torch.randint(4, 8, (count, 1), generator=generator)
    return TensorDataset(torch.where(torch.arange(7) < lengths, tokens, 0))


class Run:
    """A fitted language model with gradients, features and curvature in one store."""

    def __init__(self, root: Path) -> None:
        seed_everything(0, verbose=False)
        self.module, self.train, self.asked = Speaker().double(), texts(TRAIN, 1), texts(ASKED, 2)
        self.loader = DataLoader(self.train, batch_size=8, shuffle=True)
        self.store = root / "store"
        gradients = GradientSnapshot(self.store, "all", every_n_epochs=4, dtype="float64", features=True)
        quiet(max_epochs=8, callbacks=[gradients, CurvatureSnapshot(self.store, at_steps=[16])]).fit(
            self.module, self.loader
        )
        self.batch = next(iter(DataLoader(self.asked, batch_size=ASKED)))

    def influence(self, estimator: Any = None, **options: Any) -> InfluenceModule:
        return InfluenceModule(self.module, self.store, estimator or InfluenceFunction(), k=3, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("questions"))


pytestmark = pytest.mark.filterwarnings("ignore:The model was far from a stationary point")


def test_a_removal_changes_m_by_the_mean_of_its_scores(run: Run) -> None:
    influence = run.influence()
    scores = influence.scores(run.batch)
    sets = [[0, 3, 4], [29], [5, 6]]
    expected = torch.stack([scores[:, ids].sum(1) / TRAIN for ids in sets], 1)
    torch.testing.assert_close(influence.predict_removal(run.batch, sets), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(influence.predict_removal(run.batch, torch.tensor([0, 3, 4])), expected[:, 0])


@pytest.mark.parametrize("wrong", [[30], [-1], [2, 2]])
def test_a_removal_of_what_is_not_there_is_refused(run: Run, wrong: list[int]) -> None:
    with pytest.raises(QueryError, match="cannot be removed"):
        run.influence().predict_removal(run.batch, wrong)


@pytest.mark.parametrize("wrong", [3, torch.tensor(3), [1.5], [[1.0, 2.0]], ["a"], torch.ones(30, dtype=torch.bool)])
def test_a_removal_of_what_is_no_set_of_ids_is_refused(run: Run, wrong: Any) -> None:
    with pytest.raises(QueryError, match="must name training samples"):
        run.influence().predict_removal(run.batch, wrong)


def test_ids_in_any_form_name_the_same_removal(run: Run) -> None:
    ids = torch.tensor([0, 3, 4])
    expected = run.influence().predict_removal(run.batch, ids)
    for same in ([0, 3, 4], list(ids), ids.numpy(), tuple(ids.numpy())):
        assert torch.equal(run.influence().predict_removal(run.batch, same), expected)


@pytest.mark.parametrize("estimator", [TracIn(), Random()])
def test_scores_that_only_rank_foretell_no_amounts(run: Run, estimator: Any) -> None:
    with pytest.raises(QueryError, match="they are no amounts"):
        run.influence(estimator).predict_removal(run.batch, [0])


@pytest.mark.parametrize("estimator", [InfluenceFunction(), TracIn(), TracInWE()])
def test_a_group_is_the_sum_of_its_queries(run: Run, estimator: Any) -> None:
    influence = run.influence(estimator)
    expected = influence.scores(run.batch).sum(0)
    for size in (1, 3, ASKED):
        found = influence.group_scores(DataLoader(run.asked, batch_size=size))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    answer = influence.group_query(DataLoader(run.asked, batch_size=3), k=5)
    assert len(answer) == 1
    assert answer.proponents.sample_ids[0].tolist() == expected.argsort(descending=True)[:5].tolist()
    assert answer.opponents.sample_ids[0].tolist() == expected.argsort()[:5].tolist()


def test_an_empty_group_is_refused(run: Run) -> None:
    with pytest.raises(QueryError, match="no queries"):
        run.influence().group_scores([])


@pytest.mark.parametrize("estimator", [InfluenceFunction(), TracIn()])
def test_token_scores_sum_to_the_score(run: Run, estimator: Any) -> None:
    influence = run.influence(estimator, train_loader=run.loader)
    ids = [[0, 5], [7, 5], [1, 2], [3, 29]]
    scores = influence.scores(run.batch)
    for q, row in enumerate(influence.token_scores(run.batch, ids)):
        for z, found in zip(ids[q], row, strict=True):
            tokens = [t for t in run.train[z][0][:-1].tolist() if t]
            assert found.sample_id == z and list(found.tokens) == tokens and found.scores.shape == (len(tokens),)
            assert float(found.scores.sum()) + found.rest == pytest.approx(float(scores[q, z]), rel=1e-9)


def test_a_token_has_its_share_of_each_layers_gradient(run: Run) -> None:
    """Of the head alone: h_t g_tᵀ at each position, from the layer's own input and output gradient."""
    influence = run.influence(TracIn(parameters="head.weight"), train_loader=run.loader)
    (found,) = influence.token_scores(run.batch, [[4]] * ASKED)[0]
    store, total = influence.store, 0
    for checkpoint in store.checkpoints():
        module = Speaker().double()
        module.load_state_dict(store.weights(checkpoint))
        query = per_sample_gradients(module, lambda m, b: m.training_step(b), [[run.asked[0][0][None]]])["head.weight"]
        seen: dict[str, Tensor] = {}

        def keep(layer: nn.Module, args: Any, output: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen["input"] = args[0].detach()
            output.register_hook(lambda g: seen.update(grad=g))

        module.head.register_forward_hook(keep)
        module.training_step([run.train[4][0][None]]).backward()
        rate = checkpoint.learning_rate("head.weight")
        total = total + rate * torch.einsum("oi,ti,to->t", query[0], seen["input"][0], seen["grad"][0])
    torch.testing.assert_close(found.scores, total[: len(found.tokens)], rtol=1e-9, atol=1e-14)
    assert found.rest == 0


def test_token_scores_need_the_training_data(run: Run) -> None:
    with pytest.raises(QueryError, match="training samples themselves"):
        run.influence().token_scores(run.batch, [[0]] * ASKED)


@pytest.mark.parametrize("estimator", [InfluenceFunction(), TracIn()])
def test_neighbours_are_the_nearest_in_feature_space_with_exact_scores(run: Run, estimator: Any) -> None:
    near = run.influence(NearestFirst(estimator, neighbours=6)).scores(run.batch)
    scores = run.influence(estimator).scores(run.batch)

    def features(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            h = run.module.norm(run.module.words(tokens[:, :-1])).cumsum(1)
            return torch.tanh(run.module.mixing(h)).mean(1).float()

    distances = torch.cdist(features(run.batch[0]), features(run.train.tensors[0]))
    for q, row in enumerate(distances.topk(6, largest=False).indices):
        kept = torch.zeros(TRAIN, dtype=torch.bool).index_fill(0, row, True)
        torch.testing.assert_close(near[q, kept], scores[q, kept], rtol=1e-10, atol=1e-15)
        assert bool((near[q, ~kept] == 0).all())
    answer = run.influence(NearestFirst(estimator, neighbours=6)).query(run.batch, k=6)
    assert sorted(answer.proponents.sample_ids[0].tolist()) == sorted(
        distances[0].topk(6, largest=False).indices.tolist()
    )


def test_neighbours_need_features(run: Run, tmp_path: Path) -> None:
    quiet(max_epochs=1, callbacks=[GradientSnapshot(tmp_path / "bare", "head.*")]).fit(Speaker().double(), run.loader)
    with pytest.raises(QueryError, match="no features"):
        InfluenceModule(run.module, tmp_path / "bare", NearestFirst(TracIn()), k=2).query(run.batch)
    with pytest.raises(QueryError, match="k exceeds"):
        run.influence(NearestFirst(TracIn(), neighbours=2)).query(run.batch)


class Line(LightningModule):
    """Ridge regression, by full-batch gradient descent."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return F.mse_loss(self.line(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, weight_decay=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1000)]


@pytest.fixture(scope="module")
def ridge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    seed_everything(1, verbose=False)
    x = torch.randn(60, 3, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + 0.3 * torch.randn(60, 1, dtype=torch.float64)
    train, held = TensorDataset(x[:40], y[:40]), DataLoader(TensorDataset(x[40:], y[40:]), batch_size=7)
    module, store = Line().double(), tmp_path_factory.mktemp("ridge") / "store"
    loader = DataLoader(train, batch_size=40)
    callbacks = [
        GradientSnapshot(store, "all", every_n_epochs=200, dtype="float64"),
        CurvatureSnapshot(store, Dense("hessian")),
    ]
    quiet(max_epochs=200, callbacks=callbacks).fit(module, loader)
    return module, store, loader, held


def test_the_damping_of_a_converged_quadratic_is_small(ridge: Any) -> None:
    """There the undamped inverse is the truth, which a long enough training comes to."""
    module, store, loader, held = ridge
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state, environment = torch.get_rng_state(), dict(os.environ)
    influence = InfluenceModule(module, store, InfluenceFunction(damping="auto"), train_loader=loader)
    with pytest.raises(QueryError, match="no damping has been chosen"):
        influence.query((torch.zeros(1, 3).double(), torch.zeros(1, 1).double()), k=1)
    choice = influence.choose_damping(held, removals=Removals(steps=120))
    assert isinstance(choice.damping, Relative) and choice.damping.factor < 0.1
    best = max(score for _, score in choice.curve)
    assert best > 0.85 and choice.curve[-1][1] < best
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and environment == dict(os.environ)
    recorded = influence.store.manifest.facts["damping"]["dense_hessian"]
    assert recorded["removals"] == 16 and recorded["seconds"] > 0 and len(recorded["curve"]) == len(choice.curve)
    batch = next(iter(held))
    chosen = InfluenceModule(module, store, InfluenceFunction(damping="auto")).scores(batch)
    torch.testing.assert_close(
        chosen, InfluenceModule(module, store, InfluenceFunction(damping=choice.damping)).scores(batch)
    )


def test_the_damping_asks_for_queries_that_were_held_out(ridge: Any) -> None:
    module, store, loader, held = ridge
    influence = InfluenceModule(module, store, InfluenceFunction(damping="auto"), train_loader=loader)
    with pytest.raises(QueryError, match="held out"):
        influence.choose_damping(DataLoader(loader.dataset, batch_size=5))
    with pytest.raises(QueryError, match="training data"):
        InfluenceModule(module, store, InfluenceFunction()).choose_damping(held)
    with pytest.raises(QueryError, match="say too little"):
        Removals(count=3)
    with pytest.raises(QueryError, match="no damping"):
        InfluenceModule(module, store, TracIn(), train_loader=loader).choose_damping(held)


def test_a_removal_is_foretold_as_training_again_shows_it(ridge: Any) -> None:
    """Ridge regression: real retraining without 5 of 40 samples, for twelve such sets."""
    module, store, loader, held = ridge
    influence = InfluenceModule(module, store, InfluenceFunction(damping=0.0))
    x, y = loader.dataset.tensors
    batch = [torch.cat(parts) for parts in zip(*held, strict=True)]
    sets = [torch.randperm(40, generator=torch.Generator().manual_seed(i))[:5].tolist() for i in range(12)]
    before, truth = influence.measure(batch), []
    for removed in sets:
        kept = [i for i in range(40) if i not in removed]
        again = Line().double()
        again.load_state_dict(module.state_dict())
        # the mean over the kept samples alone weighs them by 40/35, so the decay has to be weighed alike
        optimizer = torch.optim.SGD(again.parameters(), lr=0.2, weight_decay=0.05 * 40 / 35)
        for _ in range(300):
            optimizer.zero_grad()
            again.training_step((x[kept], y[kept])).backward()
            optimizer.step()
        truth.append(InfluenceModule(again, store, InfluenceFunction()).measure(batch) - before)
    predicted = influence.predict_removal(batch, sets)
    true = torch.stack(truth, 1)
    correlation = torch.corrcoef(torch.stack([predicted.flatten(), true.flatten()]))[0, 1]
    assert float(correlation) > 0.97
    slope = float((predicted * true).sum() / (predicted * predicted).sum())
    assert 0.9 < slope < 1.4  # to first order; removing an eighth of the data is no small step


def test_m_is_measured_at_the_present_weights(ridge: Any) -> None:
    module, store, _, held = ridge
    batch = next(iter(held))
    found = InfluenceModule(module, store, InfluenceFunction()).measure(batch)
    expected = F.mse_loss(module.line(batch[0]), batch[1], reduction="none").squeeze(1).detach()
    torch.testing.assert_close(found, expected)


def test_a_trainer_is_not_disturbed(ridge: Any) -> None:
    module, store, loader, _ = ridge
    assert isinstance(Trainer, type) and InfluenceModule(module, store, InfluenceFunction(), k=1).scores(
        next(iter(loader))
    ).shape == (40, 40)
