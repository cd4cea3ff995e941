"""Multi-stage influence against training all stages again, and the invariances that follow from its definition."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_influence import (
    EKFAC,
    InfluenceFunction,
    InfluenceModule,
    MatrixFree,
    MultiStage,
    Proximity,
    SmallProximity,
    Source,
)
from lightning_influence.artifacts import ArtifactStore
from lightning_influence.curvature import Dense
from tests.two_stages import (
    DECAY,
    Network,
    State,
    data,
    encoder,
    linked,
    loader,
    losses,
    minimum,
    network,
    objective,
    state_of,
    stored,
    with_state,
)

SHARED = ("encoder.0.weight", "encoder.0.bias")
STEP = 1e-4
EXACT = pytest.mark.parametrize(
    "curvature", [Dense("hessian"), MatrixFree("hessian", "minres", tolerance=1e-13)], ids=["dense", "matrix_free"]
)


@dataclass
class Stages:
    """Two runs, trained to the bottom, with their stores."""

    pre: Network
    fine: Network
    pre_store: ArtifactStore
    fine_store: ArtifactStore

    def scores(self, estimator: Any, asked: Any, **options: Any) -> Tensor:
        return InfluenceModule(self.fine, self.fine_store, estimator, **options).scores(asked.tensors)


PRE_DATA, FINE_DATA, ASKED = data(9, 3, 0), data(8, 2, 1), data(3, 2, 2)


def pretrained(sample: int = 0, weight: float = 0.0) -> State:
    module = network(3, 0)
    return minimum(objective(module, PRE_DATA, sample=sample, weight=weight), begin=_pretrained_begin())


_BEGIN: dict[str, State] = {}


def _pretrained_begin() -> State:
    if "pre" not in _BEGIN:
        module = network(3, 0)
        _BEGIN["pre"] = minimum(objective(module, PRE_DATA), state_of(module))
    return _BEGIN["pre"]


def finetuned(start: State, alpha: float | None) -> State:
    """The state of the finetuned network: α is `None` where the encoder is frozen."""
    module = network(2, 1)
    begin = _BEGIN.get(f"fine {alpha}", {**state_of(module), **encoder(start)})
    if alpha is None:
        head = {name: value for name, value in begin.items() if name.startswith("head")}
        found = {**encoder(start), **minimum(objective(module, FINE_DATA, encoder(start)), head)}
    else:
        found = minimum(objective(module, FINE_DATA, alpha=alpha, start=encoder(start)), begin)
    _BEGIN.setdefault(f"fine {alpha}", found)
    return found


def true_scores(alpha: float | None, samples: range) -> Tensor:
    """−dm/dε by central differences over both stages, (Q, samples)."""
    module = network(2, 1)
    columns = []
    for sample in samples:
        ends = [
            losses(module, finetuned(pretrained(sample, sign * STEP), alpha), ASKED).detach() for sign in (1.0, -1.0)
        ]
        columns.append(-(ends[0] - ends[1]) / (2 * STEP))
    return torch.stack(columns, 1)


def stages(root: Path, alpha: float | None, statistics: Any = None) -> Stages:
    start = pretrained()
    pre = with_state(network(3, 0), start)
    fine = with_state(network(2, 1), finetuned(start, alpha))
    pre_store = stored(root / "pre", pre, PRE_DATA, statistics)
    if alpha is None:
        for name in SHARED:
            fine.get_parameter(name).requires_grad_(False)
    fine_store = stored(root / "fine", fine, FINE_DATA, statistics)
    facts = {"frozen": SHARED} if alpha is None else {}
    return Stages(pre, fine, pre_store, linked(fine_store, pre_store, dict(zip(SHARED, SHARED, strict=True)), **facts))


def estimator(curvature: Any, made: Stages, link: Any = None, **options: Any) -> MultiStage:
    exact = InfluenceFunction(curvature, damping=0.0)
    return MultiStage(
        exact, link, finetuned=InfluenceFunction(curvature, damping=0.0), module=made.pre,
        train_loader=loader(PRE_DATA), **options,
    )  # fmt: skip


def trainer() -> Trainer:
    return Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        enable_checkpointing=False,
    )


def streamed(
    made: Stages, asked: Any, method: MultiStage, fine_data: Any = FINE_DATA, pre_data: Any = PRE_DATA
) -> Tensor:
    """All scores of pretraining samples that stream by."""
    influence = InfluenceModule(made.fine, made.fine_store, method, train_loader=loader(fine_data), k=len(pre_data))
    influence.prepare([asked.tensors])
    trainer().predict(influence, loader(pre_data))
    ranking = influence.attribution.proponents
    return torch.zeros_like(ranking.scores).scatter(1, ranking.sample_ids, ranking.scores)


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


def rows(module: Network, dataset: Any) -> Tensor:
    """The loss gradient of every sample, (N, P)."""
    found = []
    for x, y in zip(*dataset.tensors, strict=True):
        flat = flat_of(module).requires_grad_()
        loss = F.cross_entropy(logits_at(module, flat, x)[None], y[None])
        found.append(torch.autograd.grad(loss, flat)[0])
    return torch.stack(found)


def flat_of(module: Network) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def logits_at(module: Network, flat: Tensor, x: Tensor) -> Tensor:
    named = dict(module.named_parameters())
    parts = flat.split([p.numel() for p in named.values()])
    state = {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}
    return torch.func.functional_call(module, state, (x[None],))[0]  # type: ignore[no-any-return]


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
