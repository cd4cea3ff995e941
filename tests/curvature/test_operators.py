"""Products with the Hessian and the Gauss–Newton matrix against explicit ones in float64, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Laplace, Normal
from torch.utils.checkpoint import checkpoint

from lightning_influence.curvature import Dense, LossOperator
from lightning_influence.errors import CurvatureError, LossError
from tests.curvature.losses import (
    CASES,
    Case,
    Model,
    bags,
    class_weights,
    classifier,
    draws,
    integers,
    language_model,
    log_probabilities,
    mlp,
    multi_label,
    pairs,
    probabilities,
    regression,
    transformer,
)


def product(case: Case, matrix: Any, rows: Tensor, **options: Any) -> Tensor:
    return LossOperator(case.evidence(**options), matrix).matvec(rows)


def written_out(case: Case, matrix: Any, **options: Any) -> Tensor:
    return product(case, matrix, torch.eye(len(case.flat()), dtype=torch.float64), **options)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_hessian(name):
    case = CASES[name]()
    if name == "summed":
        case.loss_of_one = lambda z, batch: (z - batch["y"]).square().sum()
    expected, rows = case.hessian(), draws(3, len(case.flat()))
    close(product(case, "hessian", rows), rows @ expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "summed"])
def test_gauss_newton(name):
    case = CASES[name]()
    expected, rows = case.ggn(), draws(3, len(case.flat()))
    close(product(case, "ggn", rows), rows @ expected)
    assert float((rows @ expected * rows).sum(1).min()) > 0


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("make", [language_model, class_weights], ids=["lm", "class_weights"])
def test_batches_do_not_matter(make, matrix):
    case = make()
    rows = draws(2, len(case.flat()))
    expected = product(case, matrix, rows, batch_size=1)
    for size in (2, 3, 100):
        close(product(case, matrix, rows, batch_size=size), expected)


def test_rows_do_not_matter_to_each_other():
    case = classifier()
    rows = draws(3, len(case.flat()))
    together = product(case, "ggn", rows)
    for row, expected in zip(rows, together, strict=True):
        close(product(case, "ggn", row[None])[0], expected)
    assert product(case, "ggn", rows[:0]).shape == (0, rows.shape[1])


def test_a_part_of_the_samples():
    case = classifier()
    whole = written_out(case, "ggn")
    part = written_out(case, "ggn", at_most=4)
    drawn = sorted(torch.randperm(7, generator=torch.Generator().manual_seed(0))[:4].tolist())
    case.one = [case.one[k] for k in drawn]
    close(part, case.ggn())
    assert float((part - whole).abs().max()) > 1e-3


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_dense_statistics_are_the_matrix(matrix):
    case = classifier()
    curvature: Any = Dense(matrix).collect(case.evidence())
    close(curvature.blocks[0].matrix, case.hessian() if matrix == "hessian" else case.ggn())


@pytest.mark.parametrize(
    "make",
    [classifier, class_weights, regression, multi_label, language_model, log_probabilities, probabilities],
    ids=lambda make: make.__name__,
)
def test_gauss_newton_is_the_fisher_information_with_exact_labels(make):
    case = make()
    if make is multi_label:  # a weight on the positive label is no likelihood
        case.module.loss = F.binary_cross_entropy_with_logits
    fisher: Any = Dense("fisher").collect(case.evidence(labels="exact"))
    close(written_out(case, "ggn"), fisher.blocks[0].matrix, 1e-9)


def test_probabilities_and_logits_have_the_same_gauss_newton_matrix():
    logarithmic, logits = log_probabilities(), classifier()
    close(written_out(logarithmic, "ggn"), logits.ggn())
    sigmoid = probabilities()
    sigmoid.output_of_one = lambda p, batch: torch.logit(torch.func.functional_call(sigmoid.module, dict(p), (batch,)))
    sigmoid.loss_of_one = lambda z, batch: F.binary_cross_entropy_with_logits(z, batch["y"])
    close(written_out(sigmoid, "ggn"), sigmoid.ggn(), 1e-9)


def test_weighted_probabilities_with_padding():
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    case, plain = log_probabilities(), classifier()
    for each, function in ((case, F.nll_loss), (plain, F.cross_entropy)):
        for k in (1, 2):
            each.samples[k]["y"] = torch.tensor(-1)
        each.module.loss = lambda z, y, function=function: function(z, y, weight=weight, ignore_index=-1)
    close(written_out(case, "ggn"), written_out(plain, "ggn"))


class Regularised(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        penalty = sum(p.square().sum() for p in self.parameters())
        return super().training_step(batch, batch_idx) + 0.05 * penalty


def regularised(loss: Any = F.cross_entropy) -> Case:
    plain = classifier(loss)
    torch.manual_seed(0)
    return Case(
        Regularised(mlp(), loss),
        plain.samples,
        plain.loss_of_one,
        extra=lambda parameters: 0.05 * sum(p.square().sum() for p in parameters.values()),
    )


def test_a_penalty_inside_the_training_step_belongs_to_the_hessian():
    case = regularised()
    close(written_out(case, "hessian"), case.hessian())


def test_a_penalty_is_no_part_of_a_gauss_newton_matrix():
    with pytest.raises(LossError, match="other terms or factors"):
        written_out(regularised(), "ggn")


def test_shares_that_cannot_be_told():
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    with pytest.raises(LossError, match="losses of the samples of a batch cannot be told apart"):
        written_out(regularised(lambda z, y: F.cross_entropy(z, y, weight=weight)), "hessian")


def test_a_loss_of_its_own():
    case = classifier()
    case.module.loss = lambda z, y: (z.logsumexp(1) - z.gather(1, y[:, None]).squeeze(1)).mean()
    close(written_out(case, "hessian"), case.hessian())
    with pytest.raises(LossError, match=r"one call of a known function[\s\S]*samples 0 to 2[\s\S]*matrix=\"hessian\""):
        written_out(case, "ggn")


def test_several_loss_calls():
    case = classifier()
    case.module.loss = lambda z, y: F.cross_entropy(z, y) + F.mse_loss(z, torch.zeros_like(z))
    case.loss_of_one = lambda z, batch: F.cross_entropy(z, batch["y"]) + z.square().mean()
    close(written_out(case, "hessian"), case.hessian())
    with pytest.raises(LossError, match="several calls"):
        written_out(case, "ggn")


def test_absolute_differences_are_flat():
    case = regression(F.l1_loss)
    close(written_out(case, "hessian"), case.hessian())
    with pytest.raises(LossError, match="l1_loss has no curvature"):
        written_out(case, "ggn")


def test_losses_that_the_module_gives_by_sample():
    case = classifier()
    case.module.per_sample_loss = lambda batch: F.cross_entropy(case.module(batch), batch["y"], reduction="none")
    case.module.training_step = None
    close(written_out(case, "hessian"), case.hessian())
    close(written_out(case, "ggn"), case.ggn())
    case.module.per_sample_loss = lambda batch: 2 * F.cross_entropy(case.module(batch), batch["y"], reduction="none")
    close(written_out(case, "hessian"), 2 * case.hessian())
    with pytest.raises(LossError, match="other terms or factors"):
        written_out(case, "ggn")


@pytest.mark.parametrize(
    ("outputs", "distribution"),
    [
        (3, lambda z: Categorical(logits=z)),
        (3, lambda z: Categorical(probs=z.softmax(1))),
        (1, lambda z: Bernoulli(logits=z.squeeze(1))),
        (2, lambda z: Independent(Normal(z[:, :1], z[:, 1:].exp()), 1)),
    ],
)
def test_gauss_newton_of_a_predictive_distribution(outputs, distribution):
    torch.manual_seed(0)
    samples = pairs(draws(5, 3), integers(0, 2, 5))
    module = Model(mlp(outputs), lambda z, y: -distribution(z).log_prob(y[:, None] if outputs == 2 else y + 0.0).mean())
    case = Case(module, samples, lambda z, batch: module.loss(z, batch["y"]))
    module.predictive_distribution = lambda batch: distribution(module(batch))
    if outputs == 2:  # E ∇log p ∇log pᵀ in (loc, log scale) is diag(1/σ², 2)
        expected = case.ggn(lambda z, batch: torch.diag(torch.stack([(-2 * z[0, 1]).exp(), z.new_tensor(2.0)])))
    else:
        expected = case.ggn()
        fisher: Any = Dense("fisher").collect(case.evidence(labels="exact"))
        close(fisher.blocks[0].matrix, expected)
    close(written_out(case, "ggn"), expected)


def test_an_unknown_predictive_distribution():
    case = regression()
    case.module.predictive_distribution = lambda batch: Laplace(case.module(batch), 1.0)
    with pytest.raises(LossError, match=r"Laplace[\s\S]*samples|samples[\s\S]*Laplace"):
        written_out(case, "ggn")


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_frozen_parameters_and_some_of_them(matrix):
    case = classifier()
    expected = case.hessian() if matrix == "hessian" else case.ggn()
    names = [name for name, _ in case.module.named_parameters()]
    case.module.network[0].weight.requires_grad_(False)
    case.module.network[2].bias.requires_grad_(False)
    flags = [p.requires_grad for p in case.module.parameters()]
    close(written_out(case, matrix, parameters=names), expected)
    some = LossOperator(case.evidence(parameters=[names[0], names[3]]), matrix)  # both frozen
    kept = torch.cat([torch.arange(12), torch.arange(len(expected) - 3, len(expected))])
    close(some.matvec(torch.eye(15, dtype=torch.float64)), expected[kept][:, kept])
    assert [p.requires_grad for p in case.module.parameters()] == flags


def test_a_parameter_without_a_part_in_the_loss():
    case = classifier()
    expected = {"hessian": case.hessian(), "ggn": case.ggn()}
    case.module.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    assert next(name for name, _ in case.module.named_parameters()) == "unused"
    for matrix in ("hessian", "ggn"):
        found = written_out(case, matrix)
        assert not found[:2].any() and not found[:, :2].any()
        close(found[2:, 2:], expected[matrix])
        assert not written_out_of(case, matrix, ["unused"]).any()


def written_out_of(case: Case, matrix: Any, names: list[str]) -> Tensor:
    size = sum(p.numel() for name, p in case.module.named_parameters() if name in names)
    return LossOperator(case.evidence(parameters=names), matrix).matvec(torch.eye(size, dtype=torch.float64))


class Busy(Model):
    """Leaves every trace that a training step can: random numbers, counters, logs, running statistics."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)),
            F.cross_entropy,
        )
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        torch.rand(3)
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_the_model_is_left_as_it_was(matrix):
    torch.manual_seed(3)
    case = Case(Busy(), classifier().samples, lambda z, batch: F.cross_entropy(z, batch["y"]))
    module = case.module.train()
    next(module.parameters()).grad = torch.ones(4, 3, dtype=torch.float64)
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    found = written_out(case, matrix)
    assert torch.equal(torch.get_rng_state(), state) and module.steps == 0
    assert all(part.training for part in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    first, *others = module.parameters()
    assert torch.equal(first.grad, torch.ones(4, 3, dtype=torch.float64))
    assert all(p.grad is None and p.requires_grad for p in others)
    close(found, case.hessian() if matrix == "hessian" else case.ggn())


def test_flags_come_back_after_a_failure():
    case = regression(F.l1_loss)
    case.module.network[0].weight.requires_grad_(False)
    with pytest.raises(LossError):
        written_out(case, "ggn", parameters=[name for name, _ in case.module.named_parameters()])
    assert not case.module.network[0].weight.requires_grad and case.module.training


def test_inside_inference_mode():
    case = classifier()
    expected, rows = case.ggn(), draws(2, len(case.flat()))
    with torch.inference_mode():
        close(product(case, "ggn", rows * 1.0), rows @ expected)
    with torch.no_grad():
        close(product(case, "hessian", rows), rows @ case.hessian())


def test_float32_models_take_and_give_any_float():
    case = classifier()
    expected, rows = case.ggn(), draws(2, len(case.flat()))
    case.module.float()
    for sample in case.samples:
        sample["x"] = sample["x"].float()
    for kind in (torch.float32, torch.float64):
        found = product(case, "ggn", rows.to(kind))
        assert found.dtype == kind
        close(found.double(), rows @ expected, 1e-5)


def test_the_fast_path_of_the_stock_transformer_is_not_taken(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the fast path has no gradient")

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", refuse)
    case = transformer()
    for p in case.module.network.parameters():
        p.requires_grad_(False)
    names = ["network.encoder.layers.0.self_attn.in_proj_weight"]
    assert float(written_out_of(case, "hessian", names).abs().max()) > 0


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_an_embedding_bag_by_largest_value_is_refused(matrix):
    with pytest.raises(CurvatureError, match=r"cannot be differentiated twice[\s\S]*mode='max'"):
        written_out(bags("rows", "max"), matrix)


def test_an_embedding_bag_by_largest_value_that_is_not_asked_about():
    assert written_out_of(bags("rows", "max"), "ggn", ["network.head.weight"]).any()


def test_renormalised_look_ups():
    case = bags("rows", "sum", max_norm=0.5)
    before = case.module.network.bag.weight.clone()
    found = written_out(case, "ggn")
    assert torch.equal(case.module.network.bag.weight, before)
    with torch.no_grad():
        case.module.network.bag.weight.renorm_(2, 0, 0.5)
    close(found, case.ggn(), 1e-6)  # torch divides by the norm and 1e-7


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Hidden(torch.autograd.Function):
    """What a kernel written in another language looks like: nobody says that its backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (2 * ctx.saved_tensors[0] * grad).detach()


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("function", [Once, Hidden])
def test_functions_without_a_second_derivative_are_named(function, matrix):
    """torch passes both by: without the checks, the products would be wrong and nothing said."""
    case, layers = classifier(), list(classifier().module.network)
    case.module.forward = lambda batch: layers[2](function.apply(layers[0](batch["x"])))
    case.module.network = nn.Sequential(*layers).double()
    with pytest.raises(CurvatureError, match="cannot be differentiated twice"):
        written_out(case, matrix)


def test_a_once_differentiable_loss_is_named():
    case = classifier(lambda z, y: Once.apply(F.cross_entropy(z, y)))
    with pytest.raises(CurvatureError, match="hides how it came about"):
        written_out(case, "hessian")


def test_activation_checkpoints():
    case = classifier()
    network = case.module.network
    case.module.forward = lambda batch: network[2](
        checkpoint(network[:2], batch["x"].requires_grad_(), use_reentrant=True)
    )
    with pytest.raises(CurvatureError, match="cannot be differentiated twice"):
        written_out(case, "hessian")
    case.module.forward = lambda batch: network[2](checkpoint(network[:2], batch["x"], use_reentrant=False))
    close(written_out(case, "ggn"), classifier().ggn())


def test_infinite_second_derivatives_are_named():
    case = classifier()
    case.samples[4]["x"][:] = torch.inf
    with pytest.raises(CurvatureError, match="samples 3 to 5"):
        written_out(case, "hessian")


def test_what_does_not_fit():
    case = classifier()
    with pytest.raises(CurvatureError, match="does not fit"):
        product(case, "ggn", draws(2, 5))
    with pytest.raises(CurvatureError, match="no products"):
        LossOperator(case.evidence(), "fisher")
