"""One linear step of an edit against autograd's dense Hessian and least squares, where the loss is no quadratic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import (
    EKFAC,
    FreezingInfluenceFunction,
    GeneralizedInfluenceFunction,
    How,
    InfluenceFunction,
    ModelEdit,
    ProjectedInfluenceFunction,
    Relative,
    SecondOrderInfluenceFunction,
    Solver,
    TargetParameters,
)
from lightning_influence.curvature import (
    KFAC,
    Absolute,
    DataInf,
    Dense,
    Diagonal,
    LowRank,
    MatrixFree,
    TrainingEvidence,
)
from lightning_influence.errors import CurvatureError, QueryError
from lightning_influence.gradients import Dense as Rows
from lightning_influence.gradients import select
from lightning_influence.replay import TrainingData
from tests import reference
from tests.stores import quiet

N, DECAY, DAMPING = 30, 0.02, 0.01
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))
OTHERS = (LABELS + 1) % 3
IDS = [1, 5, 7, 20]
KEPT = [i for i in range(N) if i not in IDS]
EXACT = Solver("minres", tolerance=1e-14, max_iterations=1000)
HESSIAN = MatrixFree("hessian", "minres", tolerance=1e-13)
pytestmark = pytest.mark.filterwarnings("ignore:.*stopped before its tolerance", "ignore:.*did not converge")


class Model(LightningModule):
    """A classifier that was never trained: its Hessian is indefinite."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=DECAY)


class Decoupled(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def made(kind: Any = Model) -> Any:
    torch.manual_seed(0)
    return kind()


def loader(labels: Tensor = LABELS, batch_size: int = 7) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, labels), batch_size=batch_size)


class Truth:
    """Derivatives of sums of losses with respect to all weights end to end, and a random half of them as K."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.theta = nn.utils.parameters_to_vector(module.parameters()).detach()
        generator = torch.Generator().manual_seed(3)
        self.target = TargetParameters.of(
            module, {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in self.shapes.items()}
        )
        self.inside = self.target.flat(self.shapes)

    def loss(self, ids: Any, labels: Tensor = LABELS) -> Any:
        """The function θ -> (1/N) Σ ℓ."""

        def of(theta: Tensor) -> Tensor:
            parts = theta.split([torch.Size(shape).numel() for shape in self.shapes.values()])
            named = {
                n.removeprefix("network."): p.view(s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)
            }
            z = torch.func.functional_call(self.module.network, named, (X[ids],))
            return F.cross_entropy(z, labels[ids], reduction="sum") / N

        return of

    def gradient(self, ids: Any, labels: Tensor = LABELS) -> Tensor:
        return torch.autograd.functional.jacobian(self.loss(ids, labels), self.theta)

    def hessian(self, ids: Any, labels: Tensor = LABELS, shift: float = DECAY + DAMPING) -> Tensor:
        matrix = torch.autograd.functional.hessian(self.loss(ids, labels), self.theta)
        return matrix + shift * torch.eye(len(matrix), dtype=torch.float64)

    def flat(self, edit: ModelEdit) -> Tensor:
        change = edit.change()
        return torch.cat([change.get(n, torch.zeros(s, dtype=torch.float64)).flatten() for n, s in self.shapes.items()])


def rows_of(truth: Truth, flat: Tensor) -> Any:
    """A vector by parameter."""
    parts = flat.split([torch.Size(shape).numel() for shape in truth.shapes.values()])
    return {n: Rows(p.reshape(1, *s)) for (n, s), p in zip(truth.shapes.items(), parts, strict=True)}


def flat_of(truth: Truth, rows: Any) -> Tensor:
    return torch.cat([rows[name].dense()[0].flatten() for name in truth.shapes])


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(made())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def methods(target: TargetParameters) -> dict[str, Any]:
    return {
        "GIF": GeneralizedInfluenceFunction(target, HESSIAN, damping=DAMPING, solver=EXACT),
        "FIF": FreezingInfluenceFunction(target, HESSIAN, damping=DAMPING, solver=EXACT),
        "PIF": ProjectedInfluenceFunction(target, Dense("hessian"), damping=DAMPING),
    }


CHANGES = {"GIF": reference.generalized_change, "FIF": reference.freezing_change, "PIF": reference.projected_change}


@pytest.mark.parametrize("name", CHANGES)
def test_a_removal_solves_the_retained_hessian_against_the_removed_gradient(truth, name):
    h, g = truth.hessian(KEPT), truth.gradient(IDS)
    assert torch.linalg.eigvalsh(h).min() < -1e-3
    edit = ModelEdit.from_removal(truth.module, loader(), IDS, methods(truth.target)[name])
    expected = CHANGES[name](h, g[None], truth.inside)[0]
    close(truth.flat(edit), expected)
    (told,) = edit.record["steps"]
    rest = g - h @ expected
    assert told["left"] == pytest.approx(float(rest.norm() / g.norm()), rel=1e-7)
    assert told["left_frozen"] == pytest.approx(float(rest[~truth.inside].norm() / g.norm()), rel=1e-7)


@pytest.mark.parametrize("name", CHANGES)
def test_a_relabelling_solves_the_relabelled_hessian_against_the_difference(truth, name):
    relabelled = LABELS.clone()
    relabelled[IDS] = OTHERS[IDS]
    h, g = truth.hessian(range(N), relabelled), truth.gradient(IDS) - truth.gradient(IDS, relabelled)
    labels = {i: OTHERS[i] for i in IDS}
    edit = ModelEdit.from_relabelling(truth.module, loader(), labels, methods(truth.target)[name])
    close(truth.flat(edit), CHANGES[name](h, g[None], truth.inside)[0])


def test_second_order_takes_the_hessian_of_all_and_of_the_group(truth):
    h, part, g = truth.hessian(range(N), shift=DECAY + 0.3), truth.hessian(IDS, shift=0.0), truth.gradient(IDS)
    first = torch.linalg.solve(h, g)
    method = SecondOrderInfluenceFunction(HESSIAN, damping=0.3)
    close(
        truth.flat(ModelEdit.from_removal(truth.module, loader(), IDS, method)),
        first + torch.linalg.solve(h, part @ first),
    )
    relabelled = LABELS.clone()
    relabelled[IDS] = OTHERS[IDS]
    part, g = part - truth.hessian(IDS, relabelled, shift=0.0), g - truth.gradient(IDS, relabelled)
    first = torch.linalg.solve(h, g)
    edit = ModelEdit.from_relabelling(truth.module, loader(), {i: OTHERS[i] for i in IDS}, method)
    close(truth.flat(edit), first + torch.linalg.solve(h, part @ first))


def test_second_order_with_the_fisher_information(truth):
    """Its part of the group is that of the Gauss–Newton matrix, which is the same."""
    edits = [
        ModelEdit.from_removal(truth.module, loader(), IDS, SecondOrderInfluenceFunction(Dense(matrix), damping=0.3))
        for matrix in ("fisher", "ggn")
    ]
    close(truth.flat(edits[0]), truth.flat(edits[1]), 1e-9)


@pytest.mark.parametrize("statistics", [KFAC(), EKFAC(), Diagonal(), Dense("fisher")])
def test_second_order_of_a_fisher_matrix_takes_the_group_by_the_gauss_newton_matrix(truth, statistics):
    """Not by the Hessian, which is another one here."""
    method = SecondOrderInfluenceFunction(statistics, damping=0.3)
    found = truth.flat(ModelEdit.from_removal(truth.module, loader(), IDS, method))
    selection = select(truth.module, "all")
    data = TrainingData.of(loader())
    whole = statistics.collect(TrainingEvidence(truth.module, selection, data))
    whole = whole.decayed(dict.fromkeys(selection.names, DECAY))
    rows = rows_of(truth, truth.gradient(IDS))
    first = whole.solve(rows, Absolute(0.3))
    group = TrainingEvidence(truth.module, selection, data, positions=IDS).operator("ggn")
    second = whole.solve(rows_of(truth, group.matvec(flat_of(truth, first)[None])[0] * len(IDS) / N), Absolute(0.3))
    close(found, flat_of(truth, first) + flat_of(truth, second))


def test_what_products_stand_for():
    stands = {"hessian": (Dense("hessian"), MatrixFree("hessian"), LowRank(2, "hessian"))}
    stands["ggn"] = (Dense("ggn"), Dense("fisher"), MatrixFree("ggn"), LowRank(2, "ggn"), EKFAC(), DataInf())
    assert all(each.stands_for == name for name, group in stands.items() for each in group)


def test_damping_relative_to_the_mean_eigenvalue(truth):
    """Weight decay apart, and in units of the mean over all samples, retained or not."""
    h, g = truth.hessian(KEPT, shift=0.0), truth.gradient(IDS)
    mean = float(h.trace()) / len(h)
    assert mean > 0
    method = InfluenceFunction(Dense("hessian"), damping=Relative(0.5))
    edit = ModelEdit.from_removal(truth.module, loader(), IDS, method)
    assert edit.record["steps"][0]["damping"] == pytest.approx(0.5 * mean, rel=1e-9)
    shifted = h + (DECAY + 0.5 * mean) * torch.eye(len(h), dtype=torch.float64)
    close(truth.flat(edit), torch.linalg.solve(shifted, g))


def test_several_steps_are_newtons_method(truth):
    """Each step answers an equal share of what is still to leave, at the weights that the one before has led to."""
    start = truth.theta
    method = InfluenceFunction(Dense("hessian"), damping=0.3)
    edit = ModelEdit.from_removal(truth.module, loader(), IDS, method, How(steps=2))
    unrest = truth.gradient(KEPT) + DECAY * start + truth.gradient(IDS)
    try:
        for number in range(2):
            slope = truth.gradient(KEPT) + DECAY * truth.theta
            g = truth.gradient(IDS) if number == 0 else unrest - slope
            truth.theta = truth.theta + torch.linalg.solve(truth.hessian(KEPT, shift=DECAY + 0.3), g / (2 - number))
        close(truth.flat(edit), truth.theta - start)
    finally:
        truth.theta = start


# What the method says


@pytest.mark.parametrize("globs", ["network.2.*", ["network.0.bias", "network.2.weight"]])
def test_parameters_of_an_influence_function(truth, globs):
    method = InfluenceFunction(Dense("hessian"), damping=0.3, parameters=globs)
    edit = ModelEdit.from_removal(truth.module, loader(), IDS, method)
    chosen = ["network.2.weight", "network.2.bias"] if isinstance(globs, str) else globs
    assert list(edit.path) == chosen
    masks = {name: torch.ones(truth.shapes[name], dtype=torch.bool) for name in chosen}
    inside = TargetParameters.of(truth.module, masks).flat(truth.shapes)
    h, g = truth.hessian(KEPT, shift=DECAY + 0.3), truth.gradient(IDS)
    close(truth.flat(edit), reference.freezing_change(h, g[None], inside)[0])
    frozen = float(g[~inside].norm() / g.norm())  # as if nothing that moves had a part in it
    assert edit.record["left"] == pytest.approx(frozen) and edit.record["left_frozen"] == pytest.approx(frozen)
    assert f"{int(inside.sum())} of {len(inside)} parameters" in repr(edit)
    with pytest.raises(QueryError, match="names what is not known"):
        ModelEdit.from_removal(
            truth.module, loader(), IDS, InfluenceFunction(Dense("hessian"), damping=0.3, parameters="head.*")
        )


def test_a_name_that_reads_as_a_glob_is_a_name():
    known = ("a[0].weight", "a0.weight", "a*.bias", "ab.bias")
    for wanted, found in (
        (known[:1], known[:1]),
        ("a*.bias", known[2:3]),
        ("a[0].*", known[1:2]),
        ("*.bias", known[2:]),
    ):
        assert InfluenceFunction(parameters=wanted).chosen(known) == found


def test_labels_of_an_influence_function(truth):
    def edit(labels: Any) -> ModelEdit:
        method = InfluenceFunction(EKFAC(), damping=0.1, labels=labels)
        return ModelEdit.from_removal(truth.module, loader(), IDS, method)

    found = {labels: edit(labels) for labels in (None, "exact", "observed")}
    assert [e.record["steps"][0]["labels"] for e in found.values()] == ["exact", "exact", "observed"]
    close(truth.flat(found[None]), truth.flat(found["exact"]), 1e-12)
    assert float((truth.flat(found["observed"]) - truth.flat(found["exact"])).norm()) > 1e-3
    with pytest.raises(CurvatureError, match="labels have no effect"):
        ModelEdit.from_removal(truth.module, loader(), IDS, InfluenceFunction(None, labels="observed"))


def test_batches_of_products_do_not_matter(truth):
    method = methods(truth.target)["GIF"]
    found = [
        truth.flat(ModelEdit.from_removal(truth.module, loader(batch_size=a), IDS, method, How(batch_size=b)))
        for a, b in ((7, None), (1, 5), (30, 30))
    ]
    close(found[1], found[0], 1e-9)
    close(found[2], found[0], 1e-9)


# Weight decay


def test_weight_decay_by_parameter(truth):
    given = {"network.0.weight": 0.5, "network.2.bias": 0.1, "network.0.bias": 0.0}
    method = InfluenceFunction(Dense("hessian"), damping=0.3)
    edit = ModelEdit.from_removal(truth.module, loader(), IDS, method, How(weight_decay=given))
    assert edit.record["decay"] == {"network.0.weight": 0.5, "network.2.bias": 0.1}
    diagonal = torch.cat(
        [
            torch.full((torch.Size(shape).numel(),), given.get(name, 0.0), dtype=torch.float64)
            for name, shape in truth.shapes.items()
        ]
    )
    h = truth.hessian(KEPT, shift=0.3) + torch.diag(diagonal)
    close(truth.flat(edit), torch.linalg.solve(h, truth.gradient(IDS)))


def test_weight_decay_of_a_fit_with_adamw_is_read_off_its_trainer():
    module = made(Decoupled)
    trainer = quiet(max_epochs=1)
    trainer.fit(module, loader())
    edit = ModelEdit.from_removal(module, loader(), IDS, InfluenceFunction(Dense("ggn"), damping=0.3))
    (optimizer,) = trainer.optimizers
    for name, p in module.named_parameters():
        v = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999 ** float(optimizer.state[p]["step"]))
        assert edit.record["decay"][name] == pytest.approx(0.1 * float((v.sqrt() + 1e-8).mean()), rel=1e-9)


def sgd(*layers: Any) -> list[Any]:
    return [torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.3) for layer in layers]


FORMS = {
    "one": lambda m: sgd(m)[0],
    "dictionary": lambda m: {"optimizer": sgd(m)[0]},
    "list": lambda m: sgd(m.network[0], m.network[2]),
    "dictionaries": lambda m: tuple({"optimizer": each} for each in sgd(m.network[0], m.network[2])),
    "schedulers": lambda m: (sgd(m), [torch.optim.lr_scheduler.StepLR(sgd(m)[0], 1)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_weight_decay_of_whatever_configure_optimizers_returns(truth, form, monkeypatch):
    monkeypatch.setattr(Model, "configure_optimizers", FORMS[form])
    edit = ModelEdit.from_removal(truth.module, loader(), IDS, InfluenceFunction(Dense("hessian"), damping=0.3))
    assert edit.record["decay"] == dict.fromkeys(truth.shapes, 0.3)
    monkeypatch.setattr(Model, "configure_optimizers", lambda m: None)
    edit = ModelEdit.from_removal(truth.module, loader(), IDS, InfluenceFunction(Dense("hessian"), damping=0.3))
    assert edit.record["decay"] == {}


@pytest.mark.parametrize("wrong", [{"network.0.weigth": 0.1}, -1.0, float("nan"), True, "0.1", {"network.0.bias": []}])
def test_what_is_no_weight_decay(truth, wrong):
    with pytest.raises(QueryError, match="no weight decay"):
        ModelEdit.from_removal(truth.module, loader(), IDS, InfluenceFunction(Dense("ggn")), How(weight_decay=wrong))


def test_frozen_parameters_stay(truth):
    module = made()
    module.network[0].weight.requires_grad_(False)
    edit = ModelEdit.from_removal(module, loader(), IDS, InfluenceFunction(Dense("hessian"), damping=0.3))
    assert "network.0.weight" not in edit.path and len(edit.path) == 3
    masks = {n: torch.full(s, n != "network.0.weight") for n, s in truth.shapes.items()}
    inside = TargetParameters.of(truth.module, masks).flat(truth.shapes)
    h = truth.hessian(KEPT, shift=DECAY + 0.3)
    close(truth.flat(edit), reference.freezing_change(h, truth.gradient(IDS)[None], inside)[0])
