"""Starts of which some parameters stayed frozen: limits, parts of curvature blocks, and parameters out of reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence import (
    EKFAC,
    CaptureError,
    InfluenceFunction,
    InfluenceModule,
    MultiStage,
    Proximity,
    QueryError,
    SmallProximity,
    Source,
)
from lightning_influence.curvature import Dense
from lightning_influence.gradients import Dense as DenseBlock
from tests.two_stages import (
    ASKED,
    DECAY,
    FINE_DATA,
    PRE_DATA,
    SHARED,
    Network,
    Stages,
    data,
    encoder,
    estimator,
    linked,
    loader,
    network,
    pretrained,
    rows,
    stages,
    state_of,
    stored,
    streamed,
    with_state,
)

pytestmark = pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
HEAD = ("head.weight", "head.bias")


def pulled(made: Stages, method: MultiStage, asked: Any = ASKED) -> dict[str, Tensor]:
    """The queries' gradients at the start of finetuning, by the earlier run's names."""
    influence = InfluenceModule(made.fine, made.fine_store, method, train_loader=loader(FINE_DATA))
    names = [name for name, _ in made.pre.named_parameters()]
    queries = influence.estimator.asked(influence.stage, influence._queries([asked.tensors]))
    return {name: block.dense() for name, block in queries.gradients_at(None, names).items()}  # type: ignore[arg-type]


# -- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [SHARED[:1], SHARED[1:], SHARED], ids=["weight", "bias", "all"])
def test_where_something_is_frozen_a_small_proximity_is_the_limit_itself(tmp_path, frozen):
    """Not divided by 2α: beside what stayed frozen, what was tuned is nothing."""
    made = stages(tmp_path, None)
    made.fine_store = linked(made.fine_store, made.pre_store, {name: name for name in SHARED}, frozen=frozen)
    limit = streamed(made, ASKED, estimator(Dense("hessian"), made, SmallProximity()))
    near = streamed(made, ASKED, estimator(Dense("hessian"), made, Proximity(1e-9)))
    assert float((near - limit).norm() / limit.norm()) < 1e-6
    if frozen == SHARED:  # nothing is held: every link says the same
        torch.testing.assert_close(near, limit, rtol=1e-12, atol=0)


def test_ignored_cross_terms_of_a_start_that_is_frozen_as_a_whole_need_no_curvature(tmp_path):
    """∇m of the encoder itself, and the pretraining run's solve."""
    made = stages(tmp_path, None)
    method = MultiStage(
        InfluenceFunction(Dense("ggn"), damping=0.3), ignore_cross_terms=True, module=made.pre,
        train_loader=loader(PRE_DATA),
    )  # fmt: skip
    influence = InfluenceModule(made.fine, made.fine_store, method)  # no finetuning data either
    influence.prepare([ASKED.tensors])
    found = pulled(made, method)
    own = rows(made.fine, ASKED)
    size = sum(made.fine.get_parameter(name).numel() for name in SHARED)
    there = torch.cat([found[name].flatten(1) for name in SHARED], 1)
    torch.testing.assert_close(there, own[:, :size], rtol=1e-10, atol=1e-14)
    assert all(bool((found[name] == 0).all()) for name in HEAD)
    scores = streamed(made, ASKED, method)
    curvature = hessian_like(made.pre, PRE_DATA, "ggn") + (DECAY + 0.3) * torch.eye(own.shape[1] + 5, dtype=own.dtype)
    v = torch.cat([there, there.new_zeros(len(there), len(curvature) - size)], 1)
    torch.testing.assert_close(
        scores, v @ torch.linalg.solve(curvature, rows(made.pre, PRE_DATA).T), rtol=1e-8, atol=1e-12
    )


def hessian_like(module: Network, dataset: Any, kind: str) -> Tensor:
    """The Gauss-Newton matrix of the mean loss, or its Hessian."""
    names, shapes = zip(*((name, p.shape) for name, p in module.named_parameters()), strict=True)
    sizes = [shape.numel() for shape in shapes]
    at = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    x, y = dataset.tensors

    def logits(flat: Tensor) -> Tensor:
        parts = {n: part.view(s) for n, part, s in zip(names, flat.split(sizes), shapes, strict=True)}
        return torch.func.functional_call(module, parts, (x,))

    if kind == "hessian":
        return torch.autograd.functional.hessian(lambda flat: F.cross_entropy(logits(flat), y), at)
    jacobian = torch.autograd.functional.jacobian(logits, at)  # (N, C, P)
    p = logits(at).softmax(1).detach()
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, inner, jacobian) / len(x)


# -- a part of a curvature block ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Proximity(), Proximity(0.3), SmallProximity(), Source()], ids=repr)
@pytest.mark.parametrize("frozen", [SHARED[:1], SHARED[1:]], ids=["weight", "bias"])
def test_a_part_of_an_ekfac_block_is_solved_as_the_dense_matrix_of_that_part(tmp_path, form, frozen):
    """The weight requires gradients and is in no optimizer, say: the stored block has it, and it did not move."""
    start = pretrained()
    fine = with_state(network(2, 1), {**state_of(network(2, 1)), **encoder(start)})
    pre = with_state(network(3, 0), start)
    pre_store = stored(tmp_path / "pre", pre, PRE_DATA, EKFAC(), labels="exact")
    fine_store = stored(tmp_path / "fine", fine, FINE_DATA, EKFAC(), labels="exact")
    trained = [name for name, _ in fine.named_parameters() if name not in frozen]
    travel = {name: 2.0 + number for number, name in enumerate(trained)}
    fine_store = linked(fine_store, pre_store, {name: name for name in SHARED}, frozen=frozen, travel=travel)
    made, lam = Stages(pre, fine, pre_store, fine_store), 0.2
    method = MultiStage(
        InfluenceFunction("ekfac", damping=0.1), form, finetuned=InfluenceFunction("ekfac", damping=lam)
    )
    found = pulled(made, method)

    problem = method.problem(InfluenceModule(fine, fine_store, method, train_loader=loader(FINE_DATA)).stage)
    every = {name: p.detach() for name, p in fine.named_parameters()}
    sizes = [p.numel() for p in every.values()]
    at = dict(zip(every, torch.arange(sum(sizes)).split(sizes), strict=True))
    matrix = ekfac_matrix(problem.curvature, every)
    y, f = torch.cat([at[name] for name in trained]), torch.cat([at[name] for name in frozen])
    tuned = [name for name in trained if name in SHARED]
    t = torch.isin(y, torch.cat([at[name] for name in tuned]))
    h, m = matrix[y][:, y], rows(fine, ASKED)
    eye = torch.eye(len(h), dtype=h.dtype)
    if isinstance(form, Source):
        p = torch.cat([torch.full((every[n].numel(),), 1 / travel[n], dtype=h.dtype) for n in trained])
        values, u = torch.linalg.eigh(h / p.sqrt()[:, None] / p.sqrt())
        x = (m[:, y] / p.sqrt()) @ u @ torch.diag(-torch.expm1(-values) / values) @ u.T / p.sqrt()
        kept = ((m[:, y] / p.sqrt()) @ u @ torch.diag((-values).exp()) @ u.T * p.sqrt())[:, t]
    else:
        two_alpha = {None: 1 / travel[tuned[0]]}.get(getattr(form, "alpha", None), 0.6)
        held = torch.where(t, two_alpha, 0.0) if isinstance(form, Proximity) else torch.zeros(len(h), dtype=h.dtype)
        x = torch.linalg.solve(h + lam * eye + torch.diag(held), m[:, y].T).T
        kept = x[:, t] * two_alpha
        if isinstance(form, SmallProximity):
            kept = torch.zeros_like(kept)  # beside a frozen part
    cross = hessian_like(fine, FINE_DATA, "hessian")[f][:, y]
    torch.testing.assert_close(found[frozen[0]].flatten(1), m[:, f] - x @ cross.T, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[tuned[0]].flatten(1), kept, rtol=1e-6, atol=1e-9)


def ekfac_matrix(curvature: Any, every: dict[str, Tensor]) -> Tensor:
    """All of a block-diagonal curvature, column by column."""
    sizes = [p.numel() for p in every.values()]
    eye = torch.eye(sum(sizes), dtype=torch.float64)
    parts = zip(every.items(), eye.split(sizes, 1), strict=True)
    product = curvature.matvec({name: DenseBlock(part.reshape(-1, *p.shape)) for (name, p), part in parts})
    return torch.cat([product[name].dense().flatten(1) for name in every], 1)


def test_a_trained_head_is_solved_by_ekfac_as_by_its_fisher_matrix_where_that_is_exact(tmp_path):
    """Of one sample the Fisher information of a linear head is a Kronecker product."""
    made = stages(tmp_path, None)
    one = data(1, 2, 1)
    store = stored(tmp_path / "one", made.fine, one, EKFAC(), labels="exact")
    made.fine_store = linked(store, made.pre_store, {name: name for name in SHARED}, frozen=SHARED)
    inner, scores = InfluenceFunction(Dense("ggn"), damping=0.1), []
    for curvature, labels in (("ekfac", None), (Dense("fisher"), "exact")):
        own = InfluenceFunction(curvature, damping=0.2, labels=labels)
        method = MultiStage(inner, finetuned=own, module=made.pre, train_loader=loader(PRE_DATA))
        scores.append(streamed(made, ASKED, method, one))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-8, atol=1e-12)


# -- out of reach ---------------------------------------------------------------------------------------------------


class Old(Network):
    """The pretraining run: its head has a name that finetuning keeps beside its own."""

    def __init__(self) -> None:
        super().__init__(3)
        self.old = self.head
        del self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.old(self.encoder(x))  # type: ignore[no-any-return]


class Kept(Network):
    """The old head is still there, and nothing uses it."""

    def __init__(self) -> None:
        super().__init__(2)
        self.old = nn.Linear(4, 3)


class Called(Kept):
    """It is called, and the loss does not depend on what it says."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        self.said = self.old(h).detach()
        return self.head(h)  # type: ignore[no-any-return]


class Silent(Network):
    """The frozen encoder runs without a graph."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.encoder(x)
        return self.head(h)  # type: ignore[no-any-return]


def with_old_head(root: Any, kind: type[Network], frozen: tuple[str, ...]) -> Stages:
    """The same two runs as `stages` makes, with the old head shared and out of reach."""
    plain = stages(root / "plain", None if len(frozen) > 2 else 0.05)
    pre, fine = Old().double(), kind().double()  # type: ignore[call-arg]
    state = {name.replace("head", "old"): value for name, value in state_of(plain.pre).items()}
    pre.load_state_dict(state)
    fine.load_state_dict({**fine.state_dict(), **state_of(plain.fine), **state}, strict=False)
    for name in SHARED:
        fine.load_state_dict({**fine.state_dict(), name: plain.fine.get_parameter(name).detach()})
    for name in frozen:
        fine.get_parameter(name).requires_grad_(False)
    pre_store = stored(root / "pre", pre, PRE_DATA)
    trained = [name for name, p in fine.named_parameters() if p.requires_grad]
    fine_store = stored(root / "fine", fine, FINE_DATA, parameters=trained)
    shared = {name: name for name in (*SHARED, "old.weight", "old.bias")}
    return Stages(pre, fine, pre_store, linked(fine_store, pre_store, shared, frozen=frozen))


@pytest.mark.parametrize("kind", [Kept, Called])
@pytest.mark.parametrize("tuned", [False, True], ids=["frozen", "tuned"])
@pytest.mark.parametrize("ignoring", [False, True], ids=["cross", "no cross"])
def test_frozen_parameters_that_a_query_does_not_reach_have_no_gradient(tmp_path, kind, tuned, ignoring):
    """Whatever the link: beside one that is out of reach, a small proximity still is what the tuned ones say."""
    frozen = ("old.weight", "old.bias") if tuned else (*SHARED, "old.weight", "old.bias")
    made = with_old_head(tmp_path, kind, frozen)
    plain = stages(tmp_path / "without", 0.05 if tuned else None)
    for link in (Proximity(0.05), SmallProximity()):
        with_it, without = (
            streamed(each, ASKED, estimator(Dense("hessian"), each, link, ignore_cross_terms=ignoring))
            for each in (made, plain)
        )
        assert float(without.norm()) > 1e-3
        torch.testing.assert_close(with_it, without, rtol=1e-8, atol=1e-12)


def test_a_frozen_encoder_without_a_graph_is_named(tmp_path):
    plain = stages(tmp_path / "plain", None)
    fine = Silent(2).double()
    fine.load_state_dict(plain.fine.state_dict())
    for name in SHARED:
        fine.get_parameter(name).requires_grad_(False)
    store = stored(tmp_path / "silent", fine, FINE_DATA, EKFAC(), parameters=["head.*"])
    names = {name: name for name in SHARED}
    made = Stages(plain.pre, fine, plain.pre_store, linked(store, plain.pre_store, names, frozen=SHARED))
    for options in ({}, {"ignore_cross_terms": True}):
        method = MultiStage(InfluenceFunction("ekfac"), module=plain.pre, **options)
        with pytest.raises(QueryError, match=r"'encoder\.0\.weight' runs under torch\.no_grad\(\)"):
            pulled(made, method)
    assert not any(layer._forward_pre_hooks for layer in fine.modules())


def test_a_trained_parameter_out_of_reach_is_still_refused(tmp_path):
    """A measurement that does not look at the head that was trained."""
    made = stages(tmp_path, None)

    def measured(module: Any, batch: Any) -> Tensor:
        return module.encoder(batch[0]).sum(1)

    method = estimator(Dense("hessian"), made)
    influence = InfluenceModule(
        made.fine, made.fine_store, method, train_loader=loader(FINE_DATA), measurement=measured
    )
    with pytest.raises(CaptureError, match=r"head\.weight"):
        influence.prepare([ASKED.tensors])


def test_a_head_of_more_classes_that_cannot_be_chosen_changes_nothing(tmp_path):
    """A third logit of −40 whatever the sample: the encoder's answers are those of the head of two."""
    plain = stages(tmp_path / "plain", 0.05)
    wide = Network(3).double()
    state = state_of(plain.fine)
    wide.load_state_dict(
        {
            **state,
            "head.weight": torch.cat([state["head.weight"], torch.zeros(1, 4, dtype=torch.float64)]),
            "head.bias": torch.cat([state["head.bias"], torch.full((1,), -40.0, dtype=torch.float64)]),
        }
    )
    store = stored(tmp_path / "wide", wide, FINE_DATA)
    made = Stages(plain.pre, wide, plain.pre_store, linked(store, plain.pre_store, {name: name for name in SHARED}))
    one, other = (streamed(each, ASKED, estimator(Dense("hessian"), each, Proximity(0.05))) for each in (plain, made))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
