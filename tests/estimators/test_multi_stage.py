"""Multi-stage influence against training all stages again, and the invariances that follow from its definition."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_influence import (
    BM25,
    EKFAC,
    ArtifactStore,
    CurvatureSnapshot,
    GradientSnapshot,
    InfluenceFunction,
    InfluenceModule,
    MatrixFree,
    MultiStage,
    Proximity,
    QueryError,
    SmallProximity,
    Source,
    StageLinker,
    StoreError,
    TracIn,
)
from lightning_influence.curvature import Dense
from tests.callbacks.fits import WARNINGS
from tests.two_stages import (
    ASKED,
    DECAY,
    FINE_DATA,
    PRE_DATA,
    SHARED,
    STEP,
    Network,
    Stages,
    State,
    begun,
    data,
    encoder,
    estimator,
    finetuned,
    fit,
    flat_of,
    linked,
    loader,
    logits_at,
    losses,
    minimum,
    network,
    objective,
    pretrained,
    rows,
    stages,
    state_of,
    stored,
    streamed,
    trainer,
    true_scores,
    with_state,
)

EXACT = pytest.mark.parametrize(
    "curvature", [Dense("hessian"), MatrixFree("hessian", "minres", tolerance=1e-13)], ids=["dense", "matrix_free"]
)


@EXACT
@pytest.mark.parametrize("alpha", [None, 1.0, 0.05, 0.001], ids=str)
def test_both_cases_equal_training_both_stages_again(tmp_path, curvature, alpha):
    made = stages(tmp_path, alpha)
    link = None if alpha is None else Proximity(alpha)
    found = streamed(made, ASKED, estimator(curvature, made, link))
    truth = true_scores(alpha, range(3))
    assert float((found[:, :3] - truth).norm() / truth.norm()) < 1e-6


def test_a_start_that_is_partly_frozen_and_partly_tuned(tmp_path):
    """One formula for both: the weight stays, the bias is held to its start."""
    start, alpha, module = pretrained(), 0.05, network(2, 1)

    def tuned(begin: State) -> State:
        fixed = {SHARED[0]: begin[SHARED[0]]}
        free = {name: value for name, value in {**state_of(module), **encoder(begin)}.items() if name not in fixed}
        held = {SHARED[1]: begin[SHARED[1]]}
        return {**fixed, **minimum(objective(module, FINE_DATA, fixed, alpha=alpha, start=held), free)}

    made = stages(tmp_path, None)
    fine = with_state(module, tuned(start))
    fine_store = stored(tmp_path / "partly", fine, FINE_DATA)
    names = dict(zip(SHARED, SHARED, strict=True))
    made.fine, made.fine_store = fine, linked(fine_store, made.pre_store, names, frozen=SHARED[:1])
    found = streamed(made, ASKED, estimator(Dense("hessian"), made, Proximity(alpha)))
    for sample in range(2):
        ends = [losses(module, tuned(pretrained(sample, sign * STEP)), ASKED) for sign in (1.0, -1.0)]
        truth = -(ends[0] - ends[1]) / (2 * STEP)
        assert float((found[:, sample] - truth).norm() / truth.norm()) < 1e-6


def test_three_stages_equal_training_all_of_them_again(tmp_path):
    start, alphas, module = pretrained(), (0.05, 0.2), network(4, 5)
    last_data, asked = data(7, 4, 6), data(2, 4, 7)

    def last(begin: State) -> State:
        free = {**state_of(module), **encoder(begin)}
        return minimum(objective(module, last_data, alpha=alphas[1], start=encoder(begin)), free)

    made = stages(tmp_path, alphas[0])
    third = with_state(module, last(finetuned(start, alphas[0])))
    names = dict(zip(SHARED, SHARED, strict=True))
    third_store = linked(stored(tmp_path / "third", third, last_data), made.fine_store, names)
    exact = Dense("hessian")
    inner = estimator(exact, made, Proximity(alphas[0]))
    outer = MultiStage(
        inner, Proximity(alphas[1]), finetuned=InfluenceFunction(exact, damping=0.0), module=made.fine,
        train_loader=loader(FINE_DATA),
    )  # fmt: skip
    influence = Stages(made.pre, third, made.pre_store, third_store)
    found = streamed(influence, asked, outer, last_data)
    for sample in range(2):
        ends = [
            losses(module, last(finetuned(pretrained(sample, sign * STEP), alphas[0])), asked) for sign in (1.0, -1.0)
        ]
        truth = -(ends[0] - ends[1]) / (2 * STEP)
        assert float((found[:, sample] - truth).norm() / truth.norm()) < 1e-6


def test_an_identity_link_leaves_the_plain_influence_function(tmp_path):
    """Held firmly, everything stays where it began: the query is the pretraining run's own."""
    start = pretrained()
    pre = with_state(network(3, 0), start)
    asked = data(3, 3, 4)
    pre_store = stored(tmp_path / "pre", pre, PRE_DATA)
    other = data(6, 3, 9)
    fine_store = stored(tmp_path / "fine", pre, other)
    names = {name: name for name in start}
    made = Stages(pre, pre, pre_store, linked(fine_store, pre_store, names))
    found = streamed(made, asked, estimator(Dense("hessian"), made, Proximity(1e9)), other)
    plain = InfluenceModule(
        pre, pre_store, InfluenceFunction(Dense("hessian"), damping=0.0), train_loader=loader(PRE_DATA), k=len(PRE_DATA)
    )
    plain.prepare([asked.tensors])
    trainer().predict(plain, loader(PRE_DATA))
    ranking = plain.attribution.proponents
    expected = torch.zeros_like(ranking.scores).scatter(1, ranking.sample_ids, ranking.scores)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


class Renamed(Network):
    """The same network, with another name for each part and its classes in reverse."""

    def __init__(self) -> None:
        super().__init__(2)
        self.body, self.classifier = self.encoder, self.head
        del self.encoder, self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("alpha", [None, 0.05], ids=["frozen", "tuned"])
def test_names_and_order_of_heads_change_nothing(tmp_path, alpha):
    made = stages(tmp_path, alpha)
    link = None if alpha is None else Proximity(alpha)
    expected = streamed(made, ASKED, estimator(Dense("hessian"), made, link))
    other = Renamed().double()
    state = made.fine.state_dict()
    other.body.load_state_dict({n.removeprefix("encoder."): v for n, v in state.items() if n.startswith("encoder")})
    other.classifier.load_state_dict({"weight": state["head.weight"].flip(0), "bias": state["head.bias"].flip(0)})

    def turned(dataset: Any) -> Any:
        x, y = dataset.tensors
        return torch.utils.data.TensorDataset(x, 1 - y)

    names = {"body.0.weight": SHARED[0], "body.0.bias": SHARED[1]}
    if alpha is None:
        for name in names:
            other.get_parameter(name).requires_grad_(False)
    store = stored(tmp_path / "renamed", other, turned(FINE_DATA))
    facts = {"frozen": tuple(names)} if alpha is None else {}
    made.fine, made.fine_store = other, linked(store, made.pre_store, names, **facts)
    found = streamed(made, turned(ASKED), estimator(Dense("hessian"), made, link), turned(FINE_DATA))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_a_small_proximity_ranks_as_its_limit_does(tmp_path):
    made = stages(tmp_path, 0.05)
    limit = streamed(made, ASKED, estimator(Dense("hessian"), made, SmallProximity()))
    alpha = 1e-7
    near = streamed(made, ASKED, estimator(Dense("hessian"), made, Proximity(alpha)))
    torch.testing.assert_close(near / (2 * alpha), limit, rtol=1e-4, atol=1e-7)


class Twice(Network):
    """Two layers before the encoder, which may be one."""

    def __init__(self, classes: int, tied: bool) -> None:
        super().__init__(classes)
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.second(torch.tanh(self.first(x))))


def test_copies_of_what_was_tied_in_pretraining_add_up(tmp_path):
    """One matrix in pretraining, two in finetuning that begin at it and part."""
    torch.manual_seed(3)
    tied, untied, alpha = Twice(3, True).double(), Twice(2, False).double(), 0.05
    at = minimum(objective(tied, PRE_DATA), state_of(tied))

    def first(sample: int = 0, weight: float = 0.0) -> State:
        return minimum(objective(tied, PRE_DATA, sample=sample, weight=weight), at)

    def last(begin: State, near: State | None = None) -> State:
        taken = {**encoder(begin), "first.weight": begin["first.weight"], "second.weight": begin["first.weight"]}
        free = near or {**state_of(untied), **taken}
        return minimum(objective(untied, FINE_DATA, alpha=alpha, start=taken), free)

    end = last(at)
    pre, fine = with_state(tied, at), with_state(untied, end)
    names = {**dict(zip(SHARED, SHARED, strict=True)), "first.weight": "first.weight", "second.weight": "first.weight"}
    pre_store = stored(tmp_path / "pre", pre, PRE_DATA)
    fine_store = linked(stored(tmp_path / "fine", fine, FINE_DATA), pre_store, names)
    made = Stages(pre, fine, pre_store, fine_store)
    found = streamed(made, ASKED, estimator(Dense("hessian"), made, Proximity(alpha)))
    for sample in range(2):
        ends = [losses(untied, last(first(sample, sign * STEP), end), ASKED) for sign in (1.0, -1.0)]
        truth = -(ends[0] - ends[1]) / (2 * STEP)
        assert float((found[:, sample] - truth).norm() / truth.norm()) < 1e-6


def test_three_stages_with_a_frozen_one_in_the_middle_equal_training_all_of_them_again(tmp_path):
    """The middle run trains a head on a fixed encoder; the last one tunes both."""
    alpha, module = 0.2, network(2, 5)
    last_data, asked = data(7, 2, 6), data(2, 2, 7)

    def last(begin: State) -> State:
        return minimum(objective(module, last_data, alpha=alpha, start=begin), begin)

    made = stages(tmp_path, None)
    third = with_state(module, last(finetuned(pretrained(), None)))
    names = {name: name for name, _ in third.named_parameters()}
    third_store = linked(stored(tmp_path / "third", third, last_data), made.fine_store, names)
    exact = Dense("hessian")
    outer = MultiStage(
        estimator(exact, made), Proximity(alpha), finetuned=InfluenceFunction(exact, damping=0.0), module=made.fine,
        train_loader=loader(FINE_DATA),
    )  # fmt: skip
    found = streamed(Stages(made.pre, third, made.pre_store, third_store), asked, outer, last_data)
    for sample in range(2):
        ends = [losses(module, last(finetuned(pretrained(sample, sign * STEP), None)), asked) for sign in (1.0, -1.0)]
        truth = -(ends[0] - ends[1]) / (2 * STEP)
        assert float((found[:, sample] - truth).norm() / truth.norm()) < 1e-6


# -- curvature in blocks --------------------------------------------------------------------------------------------


class Single(LightningModule):
    """One linear layer and nothing else: of one sample its Fisher information is a Kronecker product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.layer(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
@pytest.mark.parametrize("link", [Proximity(0.3), SmallProximity(), Source()], ids=repr)
def test_ekfac_is_the_dense_form_where_the_layer_makes_it_exact(tmp_path, link):
    torch.manual_seed(0)
    pre, fine = Single().double(), Single().double()
    one, two, asked = data(1, 2, 0), data(1, 2, 1), data(2, 2, 2)
    pre_store = stored(tmp_path / "pre", pre, one, EKFAC(), labels="exact")
    fine_store = stored(tmp_path / "fine", fine, two, EKFAC(), labels="exact")
    names = {name: name for name in ("layer.weight", "layer.bias")}
    made = Stages(pre, fine, pre_store, linked(fine_store, pre_store, names, travel=dict.fromkeys(names, 2.0)))
    scores = []
    for curvature in ("ekfac", Dense("fisher")):
        labels = None if isinstance(curvature, str) else "exact"
        method = MultiStage(
            InfluenceFunction(curvature, damping=0.1, labels=labels), link,
            finetuned=InfluenceFunction(curvature, damping=0.2, labels=labels), module=pre, train_loader=loader(one),
        )  # fmt: skip
        scores.append(streamed(made, asked, method, two, one))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-8, atol=1e-12)


def test_both_solves_are_used(tmp_path):
    """∇mᵀ H_ft⁻¹ H_pt⁻¹ ∇ℓ by explicit matrices, which leaving out either solve is not."""
    made = stages(tmp_path, 0.05)
    lam = (0.3, 0.7)
    method = MultiStage(
        InfluenceFunction(Dense("ggn"), damping=lam[0]), SmallProximity(),
        finetuned=InfluenceFunction(Dense("ggn"), damping=lam[1]), module=made.pre, train_loader=loader(PRE_DATA),
    )  # fmt: skip
    found = streamed(made, ASKED, method)
    h_pre, h_fine = gauss_newton(made.pre, PRE_DATA), gauss_newton(made.fine, FINE_DATA)
    g, m = rows(made.pre, PRE_DATA), rows(made.fine, ASKED)
    size = sum(made.pre.get_parameter(name).numel() for name in SHARED)  # the first ones in both

    def scores(of_fine: Tensor, of_pre: Tensor) -> Tensor:
        through = torch.linalg.solve(of_fine, m.T).T
        embedded = torch.zeros(len(m), g.shape[1], dtype=g.dtype)
        embedded[:, :size] = through[:, :size]
        return embedded @ torch.linalg.solve(of_pre, g.T)

    damped = (
        h_fine + (DECAY + lam[1]) * torch.eye(len(h_fine), dtype=g.dtype),
        h_pre + (DECAY + lam[0]) * torch.eye(len(h_pre), dtype=g.dtype),
    )
    torch.testing.assert_close(found, scores(*damped), rtol=1e-8, atol=1e-12)
    skipped = (
        scores(torch.eye(len(h_fine), dtype=g.dtype), damped[1]),
        scores(damped[0], torch.eye(len(h_pre), dtype=g.dtype)),
    )
    for other in skipped:
        assert float((other - found).norm() / found.norm()) > 0.1


def gauss_newton(module: Network, dataset: Any) -> Tensor:
    """(1/N) Σ Jᵀ (diag p − p pᵀ) J, sample by sample."""
    total: Any = 0.0
    for x in dataset.tensors[0]:
        jacobian = torch.autograd.functional.jacobian(lambda flat: logits_at(module, flat, x), flat_of(module))  # noqa: B023
        p = module(x[None])[0].softmax(0).detach()
        total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(dataset)
    return total  # type: ignore[no-any-return]


# -- how firmly the start is held -----------------------------------------------------------------------------------


class Linear(LightningModule):
    """A quadratic loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.layer(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_source_is_what_gradient_descent_with_small_steps_does(tmp_path):
    """On a quadratic loss K small steps from W* end at (1 − ηH)^K W* + …, and the query follows."""
    torch.manual_seed(0)
    pre, fine = Linear().double(), Linear().double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    h = 2 * x.T @ x / x.shape[0] / 2  # of the mean over samples and outputs, for each output
    rate, steps = 1e-5, 40_000
    grown = torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - rate * h, steps)
    dataset, first = torch.utils.data.TensorDataset(x, y), torch.utils.data.TensorDataset(x[:4], y[:4])
    pre_store = stored(tmp_path / "pre", pre, first)
    fine_store = linked(
        stored(tmp_path / "fine", fine, dataset, ), pre_store, {"layer.weight": "layer.weight"},
        travel={"layer.weight": rate * steps},
    )  # fmt: skip
    module = InfluenceModule(fine, fine_store, MultiStage(
        InfluenceFunction(MatrixFree("hessian"), damping=0.0), Source(),
        finetuned=InfluenceFunction(MatrixFree("hessian"), damping=0.0, ), module=pre, train_loader=loader(first),
    ), train_loader=loader(dataset))  # fmt: skip
    asked = module._queries([[x[:2], y[:2]]])
    pulled = module.estimator.asked(module.stage, asked).gradients_at(None, ["layer.weight"])["layer.weight"].dense()
    own = asked.gradients_at(fine_store.checkpoints()[-1], ["layer.weight"])["layer.weight"].dense()
    decayed = grown * (1 - rate * DECAY) ** steps
    torch.testing.assert_close(pulled, own @ decayed, rtol=2e-4, atol=1e-8)


# -- in fits, files and refusals ------------------------------------------------------------------------------------


FITS = [
    *(pytest.mark.filterwarnings(w) for w in WARNINGS),
    pytest.mark.filterwarnings("ignore:The model was far from a stationary point"),
]


def in_fits(function: Any) -> Any:
    for mark in FITS:
        function = mark(function)
    return function


@in_fits
@pytest.mark.parametrize("form", [Proximity(), Source()], ids=repr)
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "RMSprop"])
def test_under_adam_the_start_is_held_entry_by_entry(tmp_path, form, optimizer):
    """P = (√v̂+ε)/Σ_t η_t: x = (H + P E)⁻¹ v, or the exponential in the metric of P."""
    start = network(3, 0)
    stored(tmp_path / "pre", start, PRE_DATA)
    module = begun(start, optimizer=optimizer)
    linker = StageLinker(tmp_path / "fine", pretrain=tmp_path / "pre")
    ended = fit(tmp_path, module, FINE_DATA, linker, epochs=3)
    scale = {}
    for name, p in module.named_parameters():
        state, group = ended.optimizers[0].state[p], ended.optimizers[0].param_groups[0]
        second, eps = state.get("exp_avg_sq", state.get("square_avg")), group["eps"]
        correction = 1 - group["betas"][1] ** 6 if "betas" in group else 1.0
        scale[name] = ((second / correction).sqrt() + eps) / (6 * 0.01)
    solved = InfluenceFunction(Dense("ggn"), damping=0.05)
    method = MultiStage(InfluenceFunction(Dense("ggn"), damping=0.1), form, finetuned=solved, module=start)
    influence = InfluenceModule(module, tmp_path / "fine", method, train_loader=loader(FINE_DATA))
    queries = influence.estimator.asked(influence.stage, influence._queries([ASKED.tensors]))
    found = queries.gradients_at(None, SHARED)  # type: ignore[arg-type]
    decay = 0.01 if optimizer == "AdamW" else 0.0
    h, m = gauss_newton(module, FINE_DATA), rows(module, ASKED)
    p = torch.cat([scale[name].reshape(-1) for name, _ in module.named_parameters()])
    means = [scale[name].mean().expand(value.numel()) for name, value in module.named_parameters()]
    h = h + torch.diag(decay * torch.cat(means) * (6 * 0.01))  # decoupled: wd (√v̂+ε), the mean of each parameter
    size = sum(module.get_parameter(name).numel() for name in SHARED)
    if isinstance(form, Source):
        values, u = torch.linalg.eigh(h / p.sqrt()[:, None] / p.sqrt())
        expected = ((m / p.sqrt()) @ u @ torch.diag((-values).exp()) @ u.T * p.sqrt())[:, :size]
    else:
        held = torch.where(torch.arange(len(p)) < size, p, 0.0)
        expected = (torch.linalg.solve(h + torch.diag(held + 0.05), m.T).T * p)[:, :size]
    there = torch.cat([found[name].dense().flatten(1) for name in SHARED], 1)
    torch.testing.assert_close(there, expected, rtol=1e-6, atol=1e-9)


@in_fits
@pytest.mark.parametrize("form", [Proximity(), SmallProximity(), Source()], ids=repr)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_narrow_types_give_finite_answers_near_those_of_wide_ones(tmp_path, form, kind):
    start = network(3, 0)
    stored(tmp_path / "pre", start, PRE_DATA, EKFAC())
    x, y = FINE_DATA.tensors
    found = []
    for dtype in (torch.float64, kind):
        folder = tmp_path / str(dtype)
        module = begun(start).to(dtype)
        dataset = torch.utils.data.TensorDataset(x.to(dtype), y)
        fit(
            tmp_path,
            module,
            dataset,
            StageLinker(folder, pretrain=tmp_path / "pre"),
            CurvatureSnapshot(folder),
            epochs=1,
        )
        method = MultiStage(InfluenceFunction("ekfac", damping=0.1), form, finetuned=InfluenceFunction(damping=0.2))
        influence = InfluenceModule(module, folder, method)
        asked = [ASKED.tensors[0].to(dtype), ASKED.tensors[1]]
        queries = influence.estimator.asked(influence.stage, influence._queries([asked]))
        back = queries.gradients_at(None, SHARED)  # type: ignore[arg-type]
        found.append(torch.cat([back[name].dense().flatten(1).double() for name in SHARED], 1))
    assert bool(found[1].isfinite().all())
    near = 1e-3 if kind == torch.float32 else 0.2
    assert float((found[1] - found[0]).norm() / found[0].norm()) < near


@in_fits
def test_a_module_that_has_answered_is_pickled_and_answers_again(tmp_path):
    start = network(3, 0)
    fit(tmp_path, start, PRE_DATA, GradientSnapshot(tmp_path / "pre", "all"), CurvatureSnapshot(tmp_path / "pre"))
    module = begun(start)
    linker = StageLinker(tmp_path / "fine", pretrain=tmp_path / "pre")
    fit(tmp_path, module, FINE_DATA, linker, CurvatureSnapshot(tmp_path / "fine"))
    influence = InfluenceModule(module, tmp_path / "fine", MultiStage(InfluenceFunction("ekfac")))
    scores = influence.scores(ASKED.tensors)
    for again in (pickle.loads(pickle.dumps(influence)), copy.deepcopy(influence)):
        assert torch.equal(again.scores(ASKED.tensors), scores)


def test_scores_that_were_interrupted_go_on_and_those_of_another_link_are_refused(tmp_path):
    made, path = stages(tmp_path, 0.05), tmp_path / "scores.safetensors"

    def run(method: MultiStage, **limits: Any) -> InfluenceModule:
        influence = InfluenceModule(made.fine, made.fine_store, method, train_loader=loader(FINE_DATA), k=3)
        influence.prepare([ASKED.tensors], scores_file=path)
        trainer(**limits).predict(influence, loader(PRE_DATA, 3))
        return influence

    def method(link: Any = None, **options: Any) -> MultiStage:
        return estimator(Dense("ggn"), made, link or Proximity(0.05), **options)

    some = run(method(), limit_predict_batches=2).streamed_scores
    assert bool(some[:, :6].isfinite().all()) and bool(some[:, 6:].isnan().all())
    for other in (method(Proximity(0.06)), method(SmallProximity())):
        with pytest.raises(QueryError, match="scores of something else"):
            run(other)
    scores = run(method()).streamed_scores
    assert torch.equal(scores[:, :6], some[:, :6])
    torch.testing.assert_close(scores, streamed(made, ASKED, method()).float(), rtol=1e-5, atol=1e-7)


def test_a_pretraining_module_that_is_frozen_is_refused(tmp_path):
    made = stages(tmp_path, 0.05)
    made.pre.requires_grad_(False)
    method = estimator(Dense("ggn"), made)
    for _ in range(2):  # and again, when it is asked again
        with pytest.raises(QueryError, match="no parameter of the pretraining module requires gradients") as refused:
            streamed(made, ASKED, method)
        assert "requires_grad_(True)" in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ((InfluenceFunction("ekfac"),), {"finetuned": InfluenceFunction(parameters="encoder.*")}),
            "all that finetuning",
        ),
        (((InfluenceFunction("ekfac"),), {"finetuned": TracIn()}), "as finetuned="),
        (((InfluenceFunction("ekfac"), 0.1), {}), "as link="),
        (((InfluenceFunction("ekfac"), Proximity), {}), "as link="),
        (((TracIn,), {}), "as inner="),
        (((BM25(),), {}), "as inner="),
        (((InfluenceFunction("ekfac"),), {"module": nn.Linear(1, 1)}), "as module="),
        (((InfluenceFunction("ekfac"),), {"store": 3}), "as store="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_are_none_of_theirs_are_refused(arguments, message):
    given, named = arguments
    with pytest.raises(QueryError, match=message) as refused:
        MultiStage(*given, **named)
    assert "HINT" in str(refused.value)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), True, "0.1"])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha):
    with pytest.raises(QueryError, match="no proximity"):
        Proximity(alpha)


def test_the_module_and_data_of_another_run_are_refused(tmp_path):
    made = stages(tmp_path, 0.05)
    exact = InfluenceFunction(Dense("ggn"), damping=0.1)
    for options in ({"module": made.fine}, {"module": made.pre, "train_loader": loader(FINE_DATA)}):
        with pytest.raises(StoreError):
            streamed(made, ASKED, MultiStage(exact, finetuned=exact, **options))
    with pytest.raises(StoreError, match="linked to no earlier run"):  # one run further back than there are
        streamed(made, ASKED, MultiStage(MultiStage(exact, finetuned=exact, module=made.pre), finetuned=exact))


@pytest.mark.parametrize(
    ("facts", "error", "message"),
    [
        ({"travel": {SHARED[0]: -1.0, SHARED[1]: 1.0}}, QueryError, r"not known for encoder\.0\.weight"),
        ({"travel": {}}, QueryError, "how far finetuning went is not known"),
        ({"alpha": -1.0}, StoreError, "is damaged"),
        ({"alpha": 0.0}, StoreError, "is damaged"),
        ({"shared": {}}, StoreError, "is damaged"),
        ({"shared": {"nope": SHARED[0]}}, StoreError, "is damaged"),
        ({"shared": {SHARED[0]: "nope"}}, StoreError, "is damaged"),
        ({"shared": {SHARED[0]: SHARED[1]}}, StoreError, "is damaged"),
        ({"parent": ""}, StoreError, "is not there"),
        ({"parent_beside": "\0", "parent_folder": "a" * 5000}, StoreError, "is not there"),
        ({"complete": "false"}, StoreError, "did not reach its end"),
        ({"start": [1]}, StoreError, "is damaged"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, dict) else "",
)
def test_a_link_that_was_tampered_with_is_refused_and_never_fails_raw(tmp_path, facts, error, message):
    made = stages(tmp_path, 0.05)
    assert made.fine_store.link is not None
    writable = ArtifactStore.resume(made.fine_store.root, made.fine_store.manifest, None)
    writable.record("stage_link", {**made.fine_store.link.to_json(), "travel": dict.fromkeys(SHARED, 1.0), **facts})
    exact = InfluenceFunction(Dense("ggn"), damping=0.1)
    method = MultiStage(exact, finetuned=exact, module=made.pre, train_loader=loader(PRE_DATA))
    influence = InfluenceModule(made.fine, made.fine_store.root, method, train_loader=loader(FINE_DATA))
    with pytest.raises(error, match=message) as refused:
        influence.prepare([ASKED.tensors])
    assert "HINT" in str(refused.value)
