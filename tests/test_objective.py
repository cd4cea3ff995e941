"""Losses and measurements read off a training_step, against plain formulas in float64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_influence.errors import LossError
from lightning_influence.objective import LossWatch, batch_scale, query_objective, step_objective, training_objective
from lightning_influence.replay import isolated

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
N, C, T = 5, 4, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int) -> Tensor:
    return torch.randint(0, C, shape, generator=torch.Generator().manual_seed(1))


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
PADDED = classes(N, T).clone()
PADDED[0, 1:], PADDED[3, 2:] = -100, -100
HALF_PADDED = classes(N)
HALF_PADDED[2] = -1
PROBABILITIES = drawn(N, C, seed=3).softmax(1)
Loss = Any  # (scores, target, reduction) -> Tensor

CALLS: dict[str, tuple[tuple[int, ...], Tensor, Loss]] = {
    "cross_entropy": ((N, C), classes(N), lambda z, y, **r: F.cross_entropy(z, y, **r)),
    "weighted": ((N, C), classes(N), lambda z, y, **r: F.cross_entropy(z, y, WEIGHT, **r)),
    "smoothed": ((N, C), classes(N), lambda z, y, **r: F.cross_entropy(z, y, WEIGHT, label_smoothing=0.2, **r)),
    "tokens": ((N, C, T), PADDED, lambda z, y, **r: F.cross_entropy(z, y, **r)),
    "flat tokens": (
        (N, T, C),
        PADDED,
        lambda z, y, **r: F.cross_entropy(z.flatten(0, 1), y.flatten(), WEIGHT, **r),
    ),
    "ignored label": ((N, C), HALF_PADDED, lambda z, y, **r: F.cross_entropy(z, y, WEIGHT, ignore_index=-1, **r)),
    "large ignore_index": (
        (N, C),
        HALF_PADDED.where(HALF_PADDED >= 0, 255),
        lambda z, y, **r: F.cross_entropy(z, y, WEIGHT, ignore_index=255, **r),
    ),
    "class probabilities": ((N, C), PROBABILITIES, lambda z, y, **r: F.cross_entropy(z, y, WEIGHT, **r)),
    "token probabilities": (
        (N, C, T),
        PROBABILITIES[:, :, None].expand(N, C, T),
        lambda z, y, **r: F.cross_entropy(z, y, **r),
    ),
    "nll": ((N, C), classes(N), lambda z, y, **r: F.nll_loss(z.log_softmax(1), y, WEIGHT, **r)),
    "bce": (
        (N, C),
        (PROBABILITIES > 0.3).double(),
        lambda z, y, **r: F.binary_cross_entropy_with_logits(z, y, WEIGHT, pos_weight=WEIGHT, **r),
    ),
    "bce of probabilities": (
        (N, C),
        (PROBABILITIES > 0.3).double(),
        lambda z, y, **r: F.binary_cross_entropy(z.sigmoid(), y, WEIGHT, **r),
    ),
    "mse": ((N, C), PROBABILITIES, lambda z, y, **r: F.mse_loss(z, y, **r)),
    "l1": ((N, C), PROBABILITIES, lambda z, y, **r: F.l1_loss(z, y, **r)),
    "smooth l1": ((N, C), PROBABILITIES, lambda z, y, **r: F.smooth_l1_loss(z, y, beta=0.3, **r)),
    "huber": ((N, C), PROBABILITIES, lambda z, y, **r: F.huber_loss(z, y, delta=0.3, **r)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CALLS)
def test_losses_and_scales_are_those_of_single_samples(name: str, reduction: str) -> None:
    shape, target, loss = CALLS[name]
    z = drawn(*shape).requires_grad_()
    with LossWatch() as watch:
        total = loss(z, target, reduction=reduction)
    assert watch.only is not None and watch.only.reduction == reduction
    alone = [loss(z[i : i + 1], target[i : i + 1], reduction=reduction) for i in range(N)]
    expected = torch.stack([value.nan_to_num() for value in alone])
    torch.testing.assert_close(watch.only.losses(N), expected, **CLOSE)
    (share,) = torch.autograd.grad(total, z)
    scale = watch.only.scale(N)
    for i, value in enumerate(alone):
        (own,) = torch.autograd.grad(value, z) if value.isfinite() else (torch.zeros_like(z),)
        torch.testing.assert_close(share[i] * scale[i], own[i], **CLOSE)


def test_weighted_regression() -> None:
    z, y, weight = drawn(N, C).requires_grad_(), PROBABILITIES, drawn(N, C, seed=8).abs()
    with LossWatch() as watch:
        try:
            total = F.mse_loss(z, y, weight=weight)
        except TypeError:
            pytest.skip("this torch has no weight in mse_loss")
    (share,) = torch.autograd.grad(total, z)
    assert watch.only is not None
    for i, scale in enumerate(watch.only.scale(N)):
        (own,) = torch.autograd.grad(F.mse_loss(z[i], y[i], weight=weight[i]), z)
        torch.testing.assert_close(share[i] * scale, own[i], **CLOSE)


def test_legacy_flags_and_modules() -> None:
    z, y = drawn(N, C).requires_grad_(), classes(N)
    flags: list[tuple[dict[str, Any], str]] = [
        ({"size_average": False}, "sum"),
        ({"size_average": True}, "mean"),
        ({"reduce": False}, "none"),
        ({"reduce": True, "size_average": False}, "sum"),
    ]
    for options, reduction in flags:
        with warnings.catch_warnings(), LossWatch() as watch:
            warnings.simplefilter("ignore")
            found = F.cross_entropy(z, y, **options)
        assert watch.only is not None and watch.only.reduction == reduction
        torch.testing.assert_close(found, F.cross_entropy(z, y, reduction=reduction))
    with LossWatch() as watch:
        nn.CrossEntropyLoss(weight=WEIGHT)(z, y)
        F.mse_loss(z.detach(), z.detach())  # a metric: nothing can be learnt from it
    assert [call.name for call in watch.calls] == ["cross_entropy"]


def test_small_dtypes_are_counted_in_float32() -> None:
    z = torch.zeros(300, 2, dtype=torch.bfloat16, requires_grad=True)
    with LossWatch() as watch:
        F.cross_entropy(z, torch.zeros(300, dtype=torch.long))
    assert watch.only is not None
    assert watch.only.scale(300).tolist() == [300.0] * 300  # bfloat16 would say 300.0 ± 2
    assert watch.only.losses(300).dtype == torch.float32


def test_several_calls() -> None:
    z, y = drawn(N, C).requires_grad_(), classes(N)
    with LossWatch() as watch:
        F.cross_entropy(z, y)
        F.mse_loss(z, torch.zeros_like(z))
    assert watch.only is None
    torch.testing.assert_close(batch_scale(watch.calls, N), torch.full((N,), float(N), dtype=torch.float64))
    with LossWatch() as uneven:
        F.cross_entropy(z, y)
        F.cross_entropy(z, y, WEIGHT)
    with pytest.raises(LossError, match="several losses"):
        batch_scale(uneven.calls, N)
    assert batch_scale(watch.calls, N, "sum").tolist() == [1.0] * N
    with LossWatch() as weighted:
        F.cross_entropy(z, y, WEIGHT)
    torch.testing.assert_close(batch_scale(weighted.calls, N, "sum") * N, batch_scale(weighted.calls, N), **CLOSE)


def test_which_calls_can_weigh() -> None:
    """The call decides, not the weights that this batch happens to have."""
    z, y, tokens = drawn(N, C).requires_grad_(), classes(N), drawn(N, C, T).requires_grad_()
    even = torch.ones(C, dtype=torch.float64)
    for calls, expected in (
        (lambda: F.cross_entropy(z, y), False),
        (lambda: F.cross_entropy(z, y, even), True),
        (lambda: F.cross_entropy(z, y, even, reduction="sum"), False),
        (lambda: F.cross_entropy(z, y, ignore_index=-1), True),
        (lambda: F.cross_entropy(tokens, classes(N, T)), True),
        (lambda: F.cross_entropy(tokens.transpose(1, 2).flatten(0, 1), classes(N * T)), True),
        (lambda: F.cross_entropy(z, PROBABILITIES, even), False),
        (lambda: F.nll_loss(z.log_softmax(1), y, even), True),
        (lambda: F.binary_cross_entropy_with_logits(z, PROBABILITIES, even), False),
        (lambda: F.mse_loss(z, PROBABILITIES), False),
    ):
        with LossWatch() as watch:
            calls()
        assert watch.only is not None and watch.only.can_weigh(N) is expected


class Model(LightningModule):
    """Logits are a linear map; the loss is chosen by name."""

    def __init__(self, kind: str = "cross_entropy") -> None:
        super().__init__()
        self.kind = kind
        self.map = nn.Linear(3, 1 if kind == "binary" else C, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(drawn(*p.shape, seed=p.numel()))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        z, y = self.map(batch["x"]), batch["y"]
        match self.kind:
            case "cross_entropy":
                return {"loss": F.cross_entropy(z, y)}
            case "nll":
                return F.nll_loss(z.log_softmax(1), y)
            case "binary":
                return F.binary_cross_entropy_with_logits(z.squeeze(1), (y > 1).double())
            case "regression":
                return F.mse_loss(z[:, 0], y.double())
            case "nothing":
                return None
            case "two":
                return F.cross_entropy(z, y) + F.cross_entropy(2 * z, y)
        return z

    def predict_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.map(batch["x"]).softmax(1)


def batch(labels: bool = True) -> dict[str, Tensor]:
    return {"x": drawn(N, 3, seed=6), **({"y": classes(N)} if labels else {})}


def formula(kind: str, z: Tensor, y: int) -> Tensor:
    p = z.softmax(0)
    others = torch.cat([z[:y], z[y + 1 :]])
    match kind:
        case "loss":
            return -p[y].log()
        case "margin":
            return others.max() - z[y]
        case "log_odds":
            return -(p[y] / (1 - p[y])).log()
        case "probability":
            return -p[y]
    return -p[int(z.argmax())].log()


@pytest.mark.parametrize("kind", ["cross_entropy", "nll", "binary"])
@pytest.mark.parametrize("measurement", ["loss", "margin", "log_odds", "probability", "predicted_class"])
def test_measurements_against_their_formulas(kind: str, measurement: Any) -> None:
    module, data = Model(kind), batch()
    objective = query_objective(module, data, N, measurement)
    z = module.map(data["x"])
    y = data["y"]
    if kind == "binary":
        z, y = torch.cat([torch.zeros_like(z), z], 1), (y > 1).long()
    expected = torch.stack([formula(measurement, z[i], int(y[i])) for i in range(N)])
    parameter = module.map.weight
    for i in range(N):
        (own,) = torch.autograd.grad(expected[i], parameter, retain_graph=True)
        share = query_objective(module, {k: v[i : i + 1] for k, v in data.items()}, 1, measurement)
        (found,) = torch.autograd.grad(share.total, parameter)
        torch.testing.assert_close(found, own, **CLOSE)
    (together,) = torch.autograd.grad(objective.total * objective.scale.mean(), parameter, retain_graph=True)
    (whole,) = torch.autograd.grad(expected.sum(), parameter, retain_graph=True)
    torch.testing.assert_close(together, whole, **CLOSE)


@pytest.mark.parametrize("how", ["predict_step", "logits", "distribution", "object"])
def test_predicted_class_without_labels(how: str) -> None:
    module, data = Model(), batch(labels=False)
    z = module.map(data["x"])
    if how == "logits":
        module.predict_step = lambda batch, batch_idx: {"logits": module.map(batch["x"])}  # type: ignore
    if how == "object":
        module.predict_step = lambda batch, batch_idx: torch.distributions.Categorical(logits=module.map(batch["x"]))  # type: ignore
    if how == "distribution":
        module.predictive_distribution = lambda b: torch.distributions.Categorical(logits=module.map(b["x"]))  # type: ignore
    found = query_objective(module, data, N, "predicted_class")
    torch.testing.assert_close(found.total, -z.log_softmax(1).amax(1).sum(), **CLOSE)


def test_predicted_class_keeps_padding() -> None:
    class Tokens(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(drawn(N, T, C))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.scores.flatten(0, 1), batch.flatten())

    module = Tokens()
    found = query_objective(module, PADDED, N, "predicted_class")
    real = PADDED != -100
    best = -module.scores.log_softmax(2).amax(2)
    torch.testing.assert_close(found.total, ((best * real).sum(1) / real.sum(1)).sum(), **CLOSE)
    nothing = query_objective(module, torch.full_like(PADDED, -100), N, "predicted_class")
    torch.testing.assert_close(nothing.total, best.mean(1).sum(), **CLOSE)


def test_own_measurements() -> None:
    module, data = Model(), batch()
    given = query_objective(module, data, N, lambda m, b: m.map(b["x"])[:, 0])
    torch.testing.assert_close(given.total, module.map(data["x"])[:, 0].sum())
    module.measurement = lambda b: module.map(b["x"])[:, 1]  # type: ignore
    own = query_objective(module, data, N, None)
    torch.testing.assert_close(own.total, module.map(data["x"])[:, 1].sum())
    assert not torch.equal(query_objective(module, data, N, "loss").total, own.total)
    with pytest.raises(LossError, match="one value per sample"):
        query_objective(module, data, N, lambda m, b: m.map(b["x"]).mean())


@pytest.mark.parametrize(
    ("kind", "measurement", "match"),
    [
        ("regression", "margin", "one classification loss"),
        ("regression", "predicted_class", "needs a classifier"),
        ("two", "probability", "one classification loss"),
        ("cross_entropy", "entropy", "unknown measurement"),
        ("nothing", "loss", "no loss"),
        ("scores", "loss", "no loss"),
    ],
)
def test_measurements_that_have_no_meaning(kind: str, measurement: Any, match: str) -> None:
    with pytest.raises(LossError, match=match):
        query_objective(Model(kind), batch(), N, measurement)


def test_margin_of_an_unlabelled_query() -> None:
    data = batch()
    data["y"] = data["y"].clone()
    data["y"][2] = -100
    with pytest.raises(LossError, match=r"(?s)label of every query.*\[2\].*predicted_class"):
        query_objective(Model(), data, N, "margin")


def test_training_dynamics() -> None:
    module, data = Model(), batch()
    record = training_objective(module, data, N).dynamics()
    z = module.map(data["x"]).detach()
    for i in range(N):
        y = int(data["y"][i])
        assert float(record["loss"][i]) == pytest.approx(float(formula("loss", z[i], y)), rel=1e-6)
        assert float(record["margin"][i]) == pytest.approx(-float(formula("margin", z[i], y)), rel=1e-5)
        assert float(record["probability"][i]) == pytest.approx(-float(formula("probability", z[i], y)), rel=1e-6)
    data["y"] = data["y"].where(torch.arange(N) != 1, -100)
    partly = training_objective(module, data, N).dynamics()
    assert partly["margin"].isnan().tolist() == [i == 1 for i in range(N)]
    assert set(training_objective(Model("regression"), data, N).dynamics()) == {"loss"}
    own = training_objective(module, data, N, per_sample_loss=lambda m, b: m.map(b["x"]).square().sum(1))
    torch.testing.assert_close(own.dynamics()["loss"], z.square().sum(1).float())
    assert training_objective(Model("two"), batch(), N).dynamics() == {}


def test_training_step_signatures() -> None:
    for step in (lambda batch: Model().training_step(batch, 0), lambda *args: Model().training_step(*args)):
        module = Model()
        module.training_step = step  # type: ignore
        assert training_objective(module, batch(), N).total.requires_grad


def test_losses_of_manual_optimization() -> None:
    class Manual(Model):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            z = self.map(batch["x"])
            self.manual_backward(drawn(3).requires_grad_().sum())
            self.manual_backward(F.cross_entropy(z, batch["y"]))

    module, data = Manual(), batch()
    with isolated(module) as losses:
        with pytest.raises(LossError, match="several times"):
            training_objective(module, data, N, manual_losses=losses)
        meant = step_objective(module, data, N, manual_losses=losses, meant=lambda loss: loss is losses[1])
        torch.testing.assert_close(meant.total, F.cross_entropy(module.map(data["x"]), data["y"]))
        with pytest.raises(LossError, match="reaches the selected"):
            step_objective(module, data, N, manual_losses=losses, meant=lambda loss: False)
