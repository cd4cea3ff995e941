"""Model edits against retraining where that is exact; what they leave alone, how they are kept, what they refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate

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
    TracIn,
)
from lightning_influence.curvature import DataInf, Dense, MatrixFree, ProjectedGram
from lightning_influence.edits import Standing, standing
from lightning_influence.errors import CaptureError, CurvatureError, LossError, QueryError, StoreError
from lightning_influence.gradients import FactorProjection
from tests.stores import quiet

N, DECAY = 30, 0.1
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(N, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))
IDS = [1, 5, 7, 20]
EXACT = Solver("minres", tolerance=1e-13, max_iterations=500)
pytestmark = pytest.mark.filterwarnings("ignore:.*stopped before its tolerance", "ignore:.*did not converge")


class Model(LightningModule):
    """A network, a loss, and SGD with weight decay."""

    def __init__(self, network: nn.Module, loss: Any = F.mse_loss, decay: float = DECAY) -> None:
        super().__init__()
        self.network, self.loss, self.decay = network, loss, decay

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=self.decay)


def ridge(y: Tensor = Y, without: Any = ()) -> Tensor:
    """argmin (1/N) Σ_kept ℓ + decay/2 |θ|², (5, 2) with the biases last; the loss of a sample is a mean of two."""
    kept = [i for i in range(N) if i not in without]
    a = torch.cat([X, torch.ones(N, 1, dtype=torch.float64)], 1)[kept]
    return torch.linalg.solve(a.T @ a / N + DECAY * torch.eye(5, dtype=torch.float64), a.T @ y[kept] / N)


def fitted(loss: Any = F.mse_loss, decay: float = DECAY) -> Model:
    """Linear regression at its optimum."""
    module = Model(nn.Linear(4, 2).double(), loss, decay)
    with torch.no_grad():
        module.network.weight.copy_(ridge()[:4].T)
        module.network.bias.copy_(ridge()[4])
    return module


def classifier(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)]
    return Model(nn.Sequential(*layers).double(), F.cross_entropy)


def loader(*tensors: Tensor, batch_size: int = 7) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*(tensors or (X, Y))), batch_size=batch_size)


def weights(module: Any) -> Tensor:
    return torch.cat([module.network.weight.T, module.network.bias[None]]).detach()


def methods(module: Any) -> dict[str, Any]:
    everything = TargetParameters.everything(module)
    exact = MatrixFree("hessian", "minres", tolerance=1e-13)
    return {
        "GIF": GeneralizedInfluenceFunction(everything, damping=0.0, solver=EXACT),
        "FIF": FreezingInfluenceFunction(everything, damping=0.0, solver=EXACT),
        "PIF": ProjectedInfluenceFunction(everything, exact, damping=0.0),
        "IF": InfluenceFunction(exact, damping=0.0),
        "dense": InfluenceFunction(Dense("hessian"), damping=0.0),
    }


def edit_of(module: Any = None, **how: Any) -> tuple[Any, TargetParameters, ModelEdit]:
    """A classifier with an edit of a third of it."""
    module = classifier() if module is None else module
    generator = torch.Generator().manual_seed(3)
    masks = {name: torch.rand(p.shape, generator=generator) < 0.3 for name, p in module.named_parameters()}
    target = TargetParameters.of(module, masks)
    method = GeneralizedInfluenceFunction(target, damping=0.05, solver=EXACT)
    return module, target, ModelEdit.from_removal(module, loader(X, LABELS), IDS, method, How(**how))


# Against retraining


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["GIF", "FIF", "PIF", "IF", "dense"])
def test_on_a_quadratic_removal_is_retraining(name, steps):
    module = fitted()
    edit = ModelEdit.from_removal(module, loader(), IDS, methods(module)[name], How(steps=steps))
    torch.testing.assert_close(weights(edit.apply(module)), ridge(without=IDS), rtol=1e-9, atol=1e-10)
    told = edit.record["steps"]
    assert len(told) == steps and told[0]["left"] < 1e-9 and told[0]["hessian_samples"] == N - len(IDS)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["GIF", "FIF", "PIF", "IF", "dense"])
def test_on_a_quadratic_relabelling_is_retraining(name, steps):
    module, other = fitted(), Y.clone()
    other[IDS] = 3.0
    labels = {i: other[i] for i in IDS}
    edit = ModelEdit.from_relabelling(module, loader(), labels, methods(module)[name], How(steps=steps))
    torch.testing.assert_close(weights(edit.apply(module)), ridge(other), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 3])
def test_on_a_quadratic_forgetting_given_samples_is_retraining(steps):
    module = fitted()
    kept = [i for i in range(N) if i not in IDS]
    parts, method = (loader(X[IDS], Y[IDS]), loader(X[kept], Y[kept])), methods(module)["GIF"]
    edit = ModelEdit.from_samples(module, *parts, method, How(steps=steps))
    for part in parts:
        with pytest.raises(QueryError, match="held out of training"):
            edit.line_search(module, part)
    torch.testing.assert_close(weights(edit.apply(module)), ridge(without=IDS), rtol=1e-9, atol=1e-10)
    assert (edit.record["num_samples"], edit.record["num_retained"]) == (N, N - len(IDS))


def test_second_order_is_nearer_to_retraining_than_first():
    module = fitted()
    exact = MatrixFree("hessian", "minres", tolerance=1e-13)
    edit = ModelEdit.from_removal(module, loader(), IDS, SecondOrderInfluenceFunction(exact, damping=0.0))
    a = torch.cat([X, torch.ones(N, 1, dtype=torch.float64)], 1)
    h = a.T @ a / N + DECAY * torch.eye(5, dtype=torch.float64)  # of all samples
    g = a[IDS].T @ (a[IDS] @ ridge() - Y[IDS]) / N
    first = torch.linalg.solve(h, g)
    second = first + torch.linalg.solve(h, a[IDS].T @ a[IDS] / N @ first)
    torch.testing.assert_close(weights(edit.apply(module)) - ridge(), second, rtol=1e-8, atol=1e-10)
    truth = ridge(without=IDS) - ridge()
    assert float((second - truth).norm()) < 0.5 * float((first - truth).norm())


def test_repeated_linear_steps_come_nearer_where_the_loss_is_no_quadratic():
    module = classifier()

    def objective(model: Any, kept: Any) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(model.network(X[kept]), LABELS[kept], reduction="sum") / N + DECAY / 2 * penalty

    def minimised(model: Any, kept: Any) -> Any:
        steps = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

        def closure() -> Tensor:
            steps.zero_grad()
            loss = objective(model, kept)
            loss.backward()
            return loss

        steps.step(closure)
        return model

    minimised(module, list(range(N)))
    kept = [i for i in range(N) if i not in IDS]
    truth = nn.utils.parameters_to_vector(minimised(copy.deepcopy(module), kept).parameters())
    error = []
    for steps in (1, 4):
        method = InfluenceFunction(Dense("hessian"), damping=0.0)
        edit = ModelEdit.from_removal(module, loader(X, LABELS), IDS, method, How(steps=steps))
        found = nn.utils.parameters_to_vector(edit.apply(module).parameters())
        error.append(float((found - truth).norm().detach()))
        assert len(edit.path["network.0.weight"]) == steps
    assert error[1] < 0.2 * error[0]


def test_a_summed_loss_gives_the_same_edit():
    """Beside a sum of seven losses the decay of the optimizer weighs a seventh."""

    def summed(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z, y, reduction="sum") / 2

    mean, total = fitted(), fitted(summed, decay=7 * DECAY)
    edits = [ModelEdit.from_removal(m, loader(), IDS, methods(m)["GIF"]) for m in (mean, total)]
    assert edits[1].record["reduction"] == "sum" and edits[0].record["reduction"] == "mean"
    torch.testing.assert_close(edits[0].change()["network.weight"], edits[1].change()["network.weight"])


def test_batches_do_not_matter():
    module = classifier()
    method = InfluenceFunction(Dense("hessian"), damping=0.05)
    found = [
        ModelEdit.from_removal(module, loader(X, LABELS, batch_size=size), IDS, method).change()["network.0.weight"]
        for size in (1, 7, 30)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[0], found[2], rtol=1e-9, atol=1e-12)


def test_a_sampled_hessian_is_recorded():
    _, _, sampled = edit_of(hessian_samples=10)
    _, _, whole = edit_of(hessian_samples=1000)
    assert (sampled.record["steps"][0]["hessian_samples"], sampled.record["steps"][0]["hessian_sampled"]) == (10, True)
    assert whole.record["steps"][0]["hessian_sampled"] is False
    assert not torch.equal(sampled.change()["network.0.weight"], whole.change()["network.0.weight"])


# What stays as it was


def test_the_module_is_not_touched():
    module = classifier().train()
    module.network[0].weight.grad = torch.ones_like(module.network[0].weight)
    before, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    _, target, edit = edit_of(module)
    edited = edit.apply(module, 0.7)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and module.training
    assert torch.equal(module.network[0].weight.grad, torch.ones_like(module.network[0].weight))
    for name, value in edited.state_dict().items():
        mask = target.masks.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert not mask.any() or not torch.equal(value[mask], before[name][mask])
        assert torch.equal(value[~mask], before[name][~mask])


def test_undo_is_exact_and_steps_are_linear():
    module, _, edit = edit_of()
    restored = edit.undo(edit.apply(module, 0.3))
    assert all(torch.equal(v, module.state_dict()[n]) for n, v in restored.state_dict().items())
    change = edit.change(1.0)["network.0.weight"]
    for step in (-1.0, 0.0, 0.5, 3.0):
        torch.testing.assert_close(edit.change(step)["network.0.weight"], step * change)


@pytest.mark.parametrize("step", [float("nan"), float("inf"), True, "1", None])
def test_steps_that_are_none(step):
    module, _, edit = edit_of()
    with pytest.raises(QueryError, match="cannot be followed so far"):
        edit.apply(module, step)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_gradients_may_be_off_where_an_edit_is_made_and_used(mode):
    module, _, edit = edit_of()
    with mode():
        _, _, again = edit_of(module)
        edited = again.apply(module)
        restored = again.undo(edited)
        found = standing(edited, loader(X, LABELS))
    assert not any(p.is_inference() for p in (*edited.parameters(), *restored.parameters()))
    torch.testing.assert_close(again.change()["network.0.weight"], edit.change()["network.0.weight"], rtol=0, atol=0)
    assert found == standing(edited, loader(X, LABELS))


def test_a_path_of_several_steps_is_followed():
    _, _, edit = edit_of(steps=2)
    knots = edit.path["network.0.weight"]
    torch.testing.assert_close(edit.change(0.5)["network.0.weight"], knots[0])
    torch.testing.assert_close(edit.change(0.75)["network.0.weight"], (knots[0] + knots[1]) / 2)
    torch.testing.assert_close(edit.change(1.5)["network.0.weight"], 2 * knots[1] - knots[0])


def test_the_edited_module_trains_on(tmp_path: Path):
    module, _, edit = edit_of()
    edited = edit.apply(module)
    quiet(max_epochs=1, default_root_dir=tmp_path).fit(edited, loader(X, LABELS))
    assert not torch.equal(edited.network[0].weight, edit.apply(module).network[0].weight)
    with pytest.raises(StoreError, match="not those that the edit was made on"):
        edit.undo(edited)


def test_part_of_a_whole_edit_is_the_projected_one():
    module, target, _ = edit_of()
    exact = Dense("hessian")
    whole = ModelEdit.from_removal(module, loader(X, LABELS), IDS, InfluenceFunction(exact, damping=0.05))
    cut = ModelEdit.from_removal(
        module, loader(X, LABELS), IDS, ProjectedInfluenceFunction(target, exact, damping=0.05)
    )
    for name, change in whole.within(target).change().items():
        torch.testing.assert_close(change, cut.change()[name])
    part = whole.within(target)
    assert part.record["within"]["size"] == target.size and part.record["left"] is part.record["left_frozen"] is None
    assert f"{target.size} of {target.total} parameters" in repr(part) and "gradient left" not in repr(part)
    assert "all parameters" in repr(whole)


def test_weights_beside_the_edit_must_be_those_of_then():
    """K lies in the last layer; training that moved the first one alone is told too."""
    module = classifier()
    target = TargetParameters.of(module, {"network.2.weight": torch.ones(3, 6, dtype=torch.bool)})
    method = FreezingInfluenceFunction(target, Dense("ggn"), damping=0.1)
    edit = ModelEdit.from_removal(module, loader(X, LABELS), IDS, method)
    edited = edit.apply(module)
    for model, use in ((copy.deepcopy(module), edit.apply), (edited, edit.undo)):
        with torch.no_grad():
            model.network[0].bias[0] += 1e-9
        with pytest.raises(StoreError, match=r"'network\.0\.bias' is not what the edit was made beside"):
            use(model)
    module.network[0].bias.requires_grad_(False)  # no other weights
    assert torch.equal(edit.undo(edit.apply(module)).network[2].weight, module.network[2].weight)


class Normed(Model):
    """Batch normalisation, a frozen layer, and a buffer that is nobody's business."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)]
        super().__init__(nn.Sequential(*layers).double(), F.cross_entropy)
        self.network[0].requires_grad_(False)
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def test_frozen_weights_and_buffers_must_be_those_of_then():
    module = Normed()
    edit = ModelEdit.from_removal(module, loader(X, LABELS), IDS, InfluenceFunction(Dense("ggn"), damping=0.1))
    for name in ("network.0.weight", "network.1.running_mean", "network.1.running_var", "mask"):
        for model, use in ((copy.deepcopy(module), edit.apply), (edit.apply(module), edit.undo)):
            value = model.state_dict()[name].view(-1)
            value[0] = ~value[0] if value.dtype == torch.bool else value[0] + 1e-9
            with pytest.raises(StoreError, match=name.replace(".", r"\.")):
                use(model)
    trained = edit.apply(module).train()
    trained.network(X)  # moves the running statistics
    with pytest.raises(StoreError, match="running"):
        edit.undo(trained)
    other = copy.deepcopy(module)
    other.register_buffer("new", torch.zeros(1))
    with pytest.raises(StoreError, match="was not there"):
        edit.apply(other)
    module.network[1].num_batches_tracked += 1  # no output depends on them
    module.cache += 1
    restored = edit.undo(edit.apply(module))
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in restored.state_dict().items())


class Watching(Model):
    """Its loss depends on the epoch that its Trainer is in."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1.0 + self.trainer.current_epoch)


def test_a_training_step_may_ask_its_trainer(tmp_path: Path):
    method = InfluenceFunction(Dense("hessian"), damping=0.1)
    module = Watching(classifier().network, F.cross_entropy)
    module.keeps = None
    trainer = quiet(max_epochs=2, default_root_dir=tmp_path)
    trainer.fit(module, loader(X, LABELS))
    module.keeps = trainer  # is shared, too
    edit = ModelEdit.from_removal(module, loader(X, LABELS), IDS, method, How(steps=2))
    plain = Model(module.network, lambda z, y: F.cross_entropy(z, y) * 3)
    same = ModelEdit.from_removal(plain, loader(X, LABELS), IDS, method, How(steps=2, weight_decay=DECAY))
    torch.testing.assert_close(edit.change(), same.change())
    edited = edit.apply(module)
    assert edited.trainer is module.trainer is edited.keeps and edit.undo(edited).trainer is trainer
    assert edit.line_search(module, loader(X + 0.1, LABELS), steps=(0.0, 1.0)).step >= 0
    module.trainer = None
    for use in (
        lambda: ModelEdit.from_removal(module, loader(X, LABELS), IDS, method, How(weight_decay=DECAY)),
        lambda: ModelEdit.from_relabelling(module, loader(X, LABELS), {0: 1}, method, How(weight_decay=DECAY)),
        lambda: edit.line_search(module, loader(X + 0.1, LABELS), steps=(0.0, 1.0)),
        lambda: standing(module, loader(X, LABELS)),
    ):
        with pytest.raises(QueryError, match=r"asks for self\.trainer"):
            use()


def test_the_path_of_half_weights_is_summed_in_single_precision():
    """A thousandth of a step is lost beside a weight in bfloat16, and not beside the sum of the others."""
    module = Half()
    method = InfluenceFunction(MatrixFree("ggn", "minres"), damping=0.5)
    edit = ModelEdit.from_removal(module, loader(X.bfloat16(), LABELS), IDS, method, How(steps=4))
    path = edit.path["network.0.weight"]
    assert path.dtype == torch.float32 and not torch.equal(path, path.bfloat16().float())
    before = module.network[0].weight.detach()
    reached = edit.apply(module).network[0].weight
    assert reached.dtype == torch.bfloat16 and torch.equal(reached, (before.float() + path[-1]).bfloat16())
    assert all(torch.equal(edit.change(1.0)[name], changes[-1]) for name, changes in edit.path.items())


def test_what_several_steps_have_left_is_measured_where_they_end():
    module = fitted()
    edit = ModelEdit.from_removal(module, loader(), IDS, methods(module)["IF"], How(steps=2))
    assert edit.record["left"] < 1e-9 and edit.record["left_frozen"] is None
    module, target, edit = edit_of(steps=3)
    kept = [i for i in range(N) if i not in IDS]

    def slope(model: Any, ids: Any) -> Tensor:
        """∇J over the samples, of all weights."""
        loss = F.cross_entropy(model.network(X[ids]), LABELS[ids], reduction="sum") / N
        found = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([(g + DECAY * p.detach()).flatten() for g, p in zip(found, model.parameters(), strict=True)])

    g = slope(module, range(N)) - slope(module, kept)
    rest = slope(module, range(N)) - slope(edit.apply(module), kept)
    outside = ~target.flat({name: tuple(p.shape) for name, p in module.named_parameters()})
    assert edit.record["left"] == pytest.approx(float(rest.norm() / g.norm()), rel=1e-9)
    assert edit.record["left_frozen"] == pytest.approx(float(rest[outside].norm() / g.norm()), rel=1e-9)
    _, _, one = edit_of()
    assert one.record["left"] == one.record["steps"][0]["left"] > 0


def test_an_edit_of_several_steps_cannot_be_cut():
    module, target, _ = edit_of()
    method = InfluenceFunction(Dense("hessian"), damping=0.05)
    edit = ModelEdit.from_removal(module, loader(X, LABELS), IDS, method, How(steps=2))
    with pytest.raises(QueryError, match="several steps cannot be cut"):
        edit.within(target)
    assert "gradient left" in repr(edit)


def test_second_order_tells_nothing_of_what_is_left():
    module = fitted()
    edit = ModelEdit.from_removal(module, loader(), IDS, SecondOrderInfluenceFunction(Dense("hessian"), damping=0.0))
    assert edit.record["steps"][0]["left"] is None


# Keeping


def test_edits_commute_with_saving_and_loading(tmp_path: Path):
    module, _, edit = edit_of(steps=2)
    edit.save(tmp_path / "edit")
    loaded = ModelEdit.load(tmp_path / "edit")
    assert loaded.record == json.loads(json.dumps(edit.record)) and repr(loaded) == repr(edit)
    applied = edit.apply(module, 0.6).state_dict()
    again = classifier(seed=1)
    again.load_state_dict(module.state_dict())
    assert all(torch.equal(v, applied[n]) for n, v in loaded.apply(again, 0.6).state_dict().items())
    with pytest.raises(StoreError, match="there is an edit in"):
        edit.save(tmp_path / "edit")


class Tied(Model):
    """Two layers with one weight."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        super().__init__(nn.Sequential(first, nn.Tanh(), second).double(), F.cross_entropy)


class Images(Model):
    """Convolutions with their weights in another order of memory."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3)]
        super().__init__(nn.Sequential(*layers).to(memory_format=torch.channels_last), F.cross_entropy)


class Half(Model):
    def __init__(self) -> None:
        super().__init__(classifier().network.bfloat16(), F.cross_entropy)


@pytest.mark.parametrize(("kind", "dtype"), [(Tied, torch.float64), (Images, torch.float32), (Half, torch.bfloat16)])
def test_weights_of_every_kind_go_to_disk_and_back(tmp_path: Path, kind, dtype):
    module = kind()
    method = GeneralizedInfluenceFunction(TargetParameters.everything(module), MatrixFree("ggn"), damping=0.5)
    edit = ModelEdit.from_removal(module, loader(X.to(dtype), LABELS), IDS, method)
    loaded = ModelEdit.load(edit.save(tmp_path / "edit"))
    edited, applied = loaded.apply(module), edit.apply(module)
    assert {p.dtype for p in edited.parameters()} == {dtype}
    assert [p.stride() for p in edited.parameters()] == [p.stride() for p in module.parameters()]
    assert len(list(edited.parameters())) == len(edit.path)  # tied ones still are
    for name, value in applied.state_dict().items():
        assert torch.equal(edited.state_dict()[name], value)
        assert torch.equal(loaded.undo(edited).state_dict()[name], module.state_dict()[name])
    assert not torch.equal(next(edited.parameters()), next(module.parameters()))


def test_damaged_files(tmp_path: Path):
    _, _, edit = edit_of()
    for number, (name, spoil) in enumerate(
        [
            ("edit.safetensors", lambda data: data[:-8]),
            ("edit.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
            ("edit.json", lambda data: data[: len(data) // 2]),
            ("edit.json", lambda data: b'{"version": 1}'),
            ("edit.json", lambda data: data.replace(b'"version": 2', b'"version": 9')),
            ("edit.json", lambda data: data.replace(b'"seed"', b'"seek"')),
            ("edit.json", lambda data: data.replace(b'"residual"', b'"rest"')),
            ("edit.json", lambda data: b"[1, 2]"),
            ("edit.json", lambda data: b"\xff\xfe"),
        ]
    ):
        folder = edit.save(tmp_path / str(number))
        (folder / name).write_bytes(spoil((folder / name).read_bytes()))
        with pytest.raises(StoreError, match=name):
            ModelEdit.load(folder)
    with pytest.raises(StoreError, match="there is no edit"):
        ModelEdit.load(tmp_path / "nowhere")


def test_the_record_tells_how_it_was_made():
    module, _, edit = edit_of(seed=5, batch_size=3)
    assert (edit.record["seed"], edit.record["batch_size"]) == (5, 3)
    assert edit_of()[2].record["batch_size"] == 7  # the loader's
    assert edit.record["steps"][0]["damping"] == 0.05
    relative = InfluenceFunction(EKFAC(), damping=Relative(0.1))
    told = ModelEdit.from_removal(module, loader(X, LABELS), IDS, relative).record["steps"][0]["damping"]
    assert told["network.0.weight"] == told["network.0.bias"] != told["network.2.weight"]
    labels = {1: 2, 3: torch.tensor(0)}
    method = InfluenceFunction(Dense("ggn"), damping=0.1)
    records = [
        ModelEdit.from_relabelling(module, loader(X, LABELS), new, method).record
        for new in (labels, {3: 0, 1: 2}, {1: 2, 3: 1})
    ]
    assert records[0]["labels_sha256"] == records[1]["labels_sha256"] != records[2]["labels_sha256"]
    assert "labels_sha256" not in edit.record and json.loads(json.dumps(records[0])) == records[0]


# Line search


def mine(module: Any, batch: Any) -> Tensor:
    """Half the loss of each sample."""
    return F.cross_entropy(module.network(batch[0]), batch[1], reduction="none") / 2


def test_line_search_takes_the_loss_of_the_edit(tmp_path: Path):
    module, _, edit = edit_of(per_sample_loss=mine)
    held_out = loader(X + 0.1, LABELS)
    found = edit.line_search(module, held_out, steps=(0.0, 1.0))
    assert found.value == -standing(edit.apply(module, found.step), held_out, mine).loss
    loaded = ModelEdit.load(edit.save(tmp_path / "edit"))
    with pytest.raises(QueryError, match="made with a per_sample_loss, which is not saved"):
        loaded.line_search(module, held_out)
    assert loaded.line_search(module, held_out, steps=(0.0, 1.0), per_sample_loss=mine) == found
    loaded.line_search(module, criterion=lambda model: 1.0)


def test_a_step_is_not_picked_on_a_part_of_the_training_set():
    module, _, edit = edit_of()
    training = loader(X, LABELS).dataset
    new = TensorDataset(X + 0.1, LABELS)
    both = ConcatDataset([training, new])
    for part in (
        Subset(training, [3, 4]),
        Subset(Subset(training, [3, 4, 5]), [1]),
        both,
        Subset(both, [N + 3, 2]),
    ):
        with pytest.raises(QueryError, match="samples of it"):
            edit.line_search(module, DataLoader(part, batch_size=4))
    for part in (Subset(both, range(N, 2 * N)), Subset(new, [1])):
        edit.line_search(module, DataLoader(part, batch_size=4), steps=(0.0,))
    method = InfluenceFunction(Dense("ggn"), damping=0.1)
    edit = ModelEdit.from_removal(module, DataLoader(both, batch_size=7), IDS, method)
    with pytest.raises(QueryError, match="samples of it"):
        edit.line_search(module, DataLoader(Subset(new, [1]), batch_size=4))
    halves = Subset(new, range(0, N, 2)), Subset(new, range(1, N, 2))
    edit = ModelEdit.from_removal(module, DataLoader(halves[0], batch_size=7), [1], method)
    edit.line_search(module, DataLoader(halves[1], batch_size=7), steps=(0.0,))  # of one larger set


def test_line_search_takes_the_best_step():
    module, _, edit = edit_of()
    start = module.network[0].weight.detach().clone()
    whole = float((edit.apply(module).network[0].weight.detach() - start).norm())

    def criterion(model: Any) -> float:
        return -abs(float((model.network[0].weight.detach() - start).norm()) / whole - 1.3)

    found = edit.line_search(module, criterion=criterion)
    assert abs(found.step - 1.3) < 0.1 and found.value == max(value for _, value in found.curve)
    assert edit.line_search(module, criterion=lambda model: 1.0).step == 0.0  # of equal ones the smallest


def test_line_search_on_held_out_samples():
    module, _, edit = edit_of()
    held_out = loader(X + 0.1, LABELS)
    by_loss = edit.line_search(module, held_out, steps=(0.0, 1.0))
    assert by_loss.value == -standing(edit.apply(module, by_loss.step), held_out).loss
    by_f1 = edit.line_search(module, held_out, loader(X[:5] + 0.2, LABELS[:5]), steps=(0.0, 1.0))
    assert 0 <= by_f1.value <= 1
    with pytest.raises(QueryError, match="held out of training"):
        edit.line_search(module, loader(X, LABELS))
    with pytest.raises(QueryError, match="something to judge by"):
        edit.line_search(module)
    with pytest.raises(QueryError, match="could be judged"):
        edit.line_search(module, criterion=lambda model: float("nan"))


def test_standing_is_loss_and_accuracy():
    module = classifier()
    z = module.network(X).detach()
    truth = Standing(float(F.cross_entropy(z, LABELS)), float((z.argmax(1) == LABELS).double().mean()))
    found = standing(module, loader(X, LABELS))
    assert abs(found.loss - truth.loss) < 1e-6 and found.accuracy == truth.accuracy
    assert standing(fitted(), loader()).accuracy is None


# Bad input


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "nothing to edit"),
        (list(range(N)), "all training samples"),
        ([0, N], "not in the training set"),
        ([3, 3], "nothing to edit"),
        (torch.ones(N, dtype=torch.bool), "no sample ids"),
        ([0.5], "no sample ids"),
    ],
    ids=["empty", "whole", "outside", "twice", "mask", "fraction"],
)
def test_sample_ids(ids, message):
    module = fitted()
    with pytest.raises(QueryError, match=message):
        ModelEdit.from_removal(module, loader(), ids, methods(module)["GIF"])


def test_labels_that_are_none():
    module = fitted()
    with pytest.raises(QueryError, match="by sample"):
        ModelEdit.from_relabelling(module, loader(), [1, 2], methods(module)["GIF"])
    with pytest.raises(QueryError, match="nothing to edit"):
        ModelEdit.from_relabelling(module, loader(), {3: Y[3]}, methods(module)["GIF"])


class Pairs(Dataset[Any]):
    """Samples in the form that `make` gives them."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return self.make(X[i], LABELS[i])


class OfDictionaries(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["label"]), batch_idx)


def test_labels_are_found_in_tuples_and_dictionaries():
    module = classifier()
    method = InfluenceFunction(Dense("hessian"), damping=0.05)
    labels = {i: int((LABELS[i] + 1) % 3) for i in IDS}
    expected = ModelEdit.from_relabelling(module, loader(X, LABELS), labels, method).change()
    named = OfDictionaries(module.network, F.cross_entropy)
    for model, make in (
        (module, lambda x, y: (x, y)),
        (module, lambda x, y: (x, int(y))),
        (named, lambda x, y: {"x": x, "label": y}),
    ):
        data = DataLoader(Pairs(make), batch_size=7)
        found = ModelEdit.from_relabelling(model, data, labels, method).change()
        for name, change in expected.items():
            torch.testing.assert_close(found[name], change)
    odd = DataLoader(Pairs(lambda x, y: torch.cat([x, y[None]])), batch_size=7)
    with pytest.raises(Exception, match="label of a training sample cannot be found"):
        ModelEdit.from_relabelling(module, odd, labels, method)


@pytest.mark.parametrize("wrong", [3, -1, 17])
@pytest.mark.parametrize("single", [True, False])
def test_a_label_of_no_class_is_named(wrong, single):
    module = classifier()
    data = DataLoader(Pairs(lambda x, y: (x, int(y))), batch_size=7) if single else loader(X, LABELS)
    labels = {0: 1, 12: wrong, 20: 2}
    with pytest.raises(QueryError, match=f"training sample 12 cannot have the label {wrong}"):
        ModelEdit.from_relabelling(module, data, labels, InfluenceFunction(Dense("ggn"), damping=0.1))


class Broken(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise IndexError("mine")


def test_errors_that_labels_have_no_part_in_stay_as_they_are():
    module = Broken(classifier().network, F.cross_entropy)
    with pytest.raises(IndexError, match="mine"):
        ModelEdit.from_relabelling(module, loader(X, LABELS), {0: 1}, InfluenceFunction(Dense("ggn"), damping=0.1))


class Either(Model):
    """Takes tuples and dictionaries."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["label"]) if isinstance(batch, dict) else batch, batch_idx)


def test_second_order_needs_one_form_of_batch():
    module = Either(classifier().network, F.cross_entropy)
    second = SecondOrderInfluenceFunction(Dense("ggn"), damping=0.1)
    tuples, dictionaries = Pairs(lambda x, y: (x, y)), Pairs(lambda x, y: {"x": x, "label": y})
    retained = DataLoader(tuples, batch_size=7)

    def to_dictionary(samples: Any) -> Any:
        return dict(zip(("x", "label"), default_collate(samples), strict=True))

    for forget in (
        DataLoader(dictionaries, batch_size=7),
        DataLoader(tuples, batch_size=7, collate_fn=to_dictionary),
        DataLoader(Pairs(lambda x, y: (x.float(), y)), batch_size=7),
        DataLoader(Pairs(lambda x, y: (x[:3], y)), batch_size=7),
    ):
        with pytest.raises(QueryError, match="batches of different forms"):
            ModelEdit.from_samples(module, forget, retained, second)
    for forget in (DataLoader(dictionaries, batch_size=7), DataLoader(tuples, batch_size=4)):
        first = ModelEdit.from_samples(module, forget, retained, InfluenceFunction(Dense("ggn"), damping=0.1))
        assert first.record["num_samples"] == 2 * N
    assert ModelEdit.from_samples(module, forget, retained, second).record["num_samples"] == 2 * N


class Dropped(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(F.dropout(self.network(batch[0]), 0.5, training=True), batch[1])


def test_noise_is_refused():
    module = Dropped(classifier().network)
    with pytest.raises(LossError, match="another one at every evaluation"):
        ModelEdit.from_removal(module, loader(X, LABELS), IDS, InfluenceFunction(Dense("hessian")))


@pytest.mark.parametrize("running", [True, False])
def test_batch_normalisation(running):
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=running), nn.Tanh(), nn.Linear(6, 3))
    module = Model(nn.Sequential(*layers).double(), F.cross_entropy)
    method = InfluenceFunction(Dense("ggn"), damping=0.1)
    if running:
        assert ModelEdit.from_removal(module, loader(X, LABELS), IDS, method).record["num_leaving"] == len(IDS)
        return
    with pytest.raises((LossError, ValueError), match=r"depends on the other samples|more than 1 value"):
        ModelEdit.from_removal(module, loader(X, LABELS), IDS, method)


def test_methods_that_are_none():
    module = classifier()
    with pytest.raises(QueryError, match="no change of the weights"):
        ModelEdit.from_removal(module, loader(X, LABELS), IDS, TracIn())  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="no store in which a damping was chosen"):
        ModelEdit.from_removal(module, loader(X, LABELS), IDS, InfluenceFunction(Dense("ggn"), damping="auto"))
    with pytest.raises(QueryError, match="already goes beyond"):
        ModelEdit.from_removal(module, loader(X, LABELS), IDS, SecondOrderInfluenceFunction(), How(steps=2))
    for wrong in (
        {"steps": 0}, {"steps": None}, {"hessian_samples": -1}, {"batch_size": True}, {"seed": 1.5}, {"seed": None},
        {"seed": -1},
    ):  # fmt: skip
        with pytest.raises(QueryError, match="must be a whole number"):
            How(**wrong)
    with pytest.raises(QueryError, match="no function"):
        How(per_sample_loss=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("statistics", [DataInf(), ProjectedGram(FactorProjection(2))])
def test_an_inverse_of_no_matrix_is_refused_before_anything_is_computed(statistics, monkeypatch):
    monkeypatch.setattr(Model, "training_step", None)
    with pytest.raises(CurvatureError, match="no edit can be made with"):
        ModelEdit.from_removal(classifier(), loader(X, LABELS), IDS, InfluenceFunction(statistics, damping=0.1))


@pytest.mark.parametrize("kind", [GeneralizedInfluenceFunction, FreezingInfluenceFunction, ProjectedInfluenceFunction])
def test_k_of_a_model_in_which_other_parameters_were_trained(kind, monkeypatch):
    module = classifier()
    target = TargetParameters.of(module, {"network.2.weight": torch.ones(3, 6, dtype=torch.bool)})
    module.network[0].weight.requires_grad_(False)
    frozen = TargetParameters.of(module, target.masks)
    monkeypatch.setattr(Model, "training_step", None)  # nothing is computed
    with pytest.raises(CaptureError, match=r"(?s)are trained now.*found: network\.0\.weight frozen.*choose K again"):
        ModelEdit.from_removal(module, loader(X, LABELS), IDS, kind(target, Dense("ggn"), damping=0.1))
    module.requires_grad_(True)
    with pytest.raises(CaptureError, match=r"(?s)are trained now.*found: network\.0\.weight trained"):
        ModelEdit.from_removal(module, loader(X, LABELS), IDS, kind(frozen, Dense("ggn"), damping=0.1))


def test_another_model_or_other_weights():
    module, _, edit = edit_of()
    with pytest.raises(StoreError, match="belongs to another model"):
        edit.apply(fitted())
    with pytest.raises(StoreError, match="not those that the edit was made at"):
        edit.apply(classifier(seed=5))
    with pytest.raises(CaptureError, match="weight"):
        method = GeneralizedInfluenceFunction(TargetParameters.everything(fitted()))
        ModelEdit.from_removal(module, loader(X, LABELS), IDS, method)


class Adam(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)


class NeedsTrainer(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1 / self.trainer.max_epochs)


@pytest.mark.parametrize("kind", [Adam, NeedsTrainer])
def test_a_weight_decay_that_is_not_known(kind):
    module = kind(classifier().network, F.cross_entropy)
    method = InfluenceFunction(Dense("hessian"), damping=0.05)
    with pytest.raises(QueryError, match="weight decay of the training is not known"):
        ModelEdit.from_removal(module, loader(X, LABELS), IDS, method)
    given = ModelEdit.from_removal(module, loader(X, LABELS), IDS, method, How(weight_decay=DECAY))
    read = ModelEdit.from_removal(classifier(), loader(X, LABELS), IDS, method)
    torch.testing.assert_close(given.change()["network.0.weight"], read.change()["network.0.weight"])


def test_samples_with_nan_are_named():
    module, spoilt = fitted(), X.clone()
    spoilt[20] = float("nan")
    with pytest.raises(QueryError, match="NaN or infinite, in samples"):
        ModelEdit.from_removal(module, loader(spoilt, Y), IDS, methods(module)["GIF"])
