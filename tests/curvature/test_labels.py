"""Labels: whichever are taken, the outer products of a sample's columns are the curvature of its own loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, Poisson
from torch.utils.data import TensorDataset

from lightning_influence.curvature import Dense, TrainingEvidence
from lightning_influence.errors import LossError
from lightning_influence.objective.counted_random import normals, uniforms
from tests import reference
from tests.curvature.settings import Model, draws, evidence, flat, given_label, integers, model, same, singles
from tests.stores import quiet

WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
Loss = Callable[[Tensor, Tensor], Tensor]  # predictions of the network and targets, to a scalar


class Judged(Model):
    """A network under any loss; `predicted` turns its outputs into what the loss is given."""

    def __init__(self, network: nn.Module, loss: Loss, predicted: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__(network)
        self.loss, self.predicted = loss, predicted

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.predicted(self(batch[0])), batch[1])


def judged(
    loss: Loss, predicted: Callable[[Tensor], Tensor] = lambda z: z, outputs: int = 3, kind: Any = Judged
) -> Any:
    """Four inputs, three parameters more than one output would need."""
    return model(lambda: kind(nn.Linear(2, outputs), loss, predicted))


def cross_entropy(**options: Any) -> Loss:
    return lambda z, y: F.cross_entropy(z, y, **options)


def by_token(**options: Any) -> Loss:
    return lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), **options)


def classes_second(**options: Any) -> Loss:
    return lambda z, y: F.cross_entropy(z.transpose(1, 2), y, **options)


POINT, TEXT = draws(5, 2), draws(5, 4, 2)
LABEL, TOKENS = integers(3, 5, seed=1), integers(3, 5, 4, seed=1)
TOKENS[0, 2:], TOKENS[2, 1:] = -100, -100
SOFT = draws(5, 3, seed=2).softmax(1)
BITS = integers(2, 5, 3, seed=3).double()
VALUES = draws(5, 3, seed=4)

SOFTMAX: dict[str, tuple[Loss, Tensor, Tensor]] = {
    "hard": (cross_entropy(), POINT, LABEL),
    "sum": (cross_entropy(reduction="sum"), POINT, LABEL),
    "ignored": (cross_entropy(ignore_index=1), POINT, LABEL),
    "weights": (cross_entropy(weight=WEIGHTS), POINT, LABEL),
    "weights, sum": (cross_entropy(weight=WEIGHTS, reduction="sum"), POINT, LABEL),
    "smoothing": (cross_entropy(label_smoothing=0.3), POINT, LABEL),
    "smoothing, weights, sum": (cross_entropy(weight=WEIGHTS, label_smoothing=0.3, reduction="sum"), POINT, LABEL),
    "smoothing, weights": (cross_entropy(weight=WEIGHTS, label_smoothing=0.3), POINT, LABEL),
    "soft": (cross_entropy(), POINT, SOFT),
    "soft, weights": (cross_entropy(weight=WEIGHTS), POINT, SOFT),
    "soft, weights, smoothing": (cross_entropy(weight=WEIGHTS, label_smoothing=0.2), POINT, SOFT),
    "tokens": (by_token(), TEXT, TOKENS),
    "tokens, sum": (by_token(reduction="sum"), TEXT, TOKENS),
    "tokens, weights": (by_token(weight=WEIGHTS, label_smoothing=0.1), TEXT, TOKENS),
    "classes second": (classes_second(), TEXT, TOKENS),
    "classes second, sum": (classes_second(reduction="sum", ignore_index=0), TEXT, TOKENS.clamp_min(0)),
}
ELEMENTWISE: dict[str, tuple[Loss, Tensor, Tensor]] = {
    "bce": (F.binary_cross_entropy_with_logits, POINT, BITS),
    "bce, pos_weight": (
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=2 * WEIGHTS, weight=WEIGHTS),
        POINT,
        BITS,
    ),
    "bce, sum": (lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum"), POINT, BITS),
    "mse": (F.mse_loss, POINT, VALUES),
    "mse, sum": (lambda z, y: F.mse_loss(z, y, reduction="sum"), POINT, VALUES),
    "mse of sequences": (F.mse_loss, TEXT, draws(5, 4, 3, seed=5)),
    "huber": (lambda z, y: F.huber_loss(z, y, delta=0.7), POINT, VALUES),
    "smooth l1": (lambda z, y: F.smooth_l1_loss(z, y, beta=0.4), POINT, VALUES),
}
EVERY = SOFTMAX | ELEMENTWISE


def columns(found: TrainingEvidence, draw: int = 0) -> Tensor:
    """The gradients of all columns, (K, N, P), in dataset order."""
    batches: list[Tensor] = []
    names = found.selection.names
    found.visit(draw, lambda batch: batches.append(torch.stack([flat(column, names) for column in batch])))
    return torch.cat(batches, 1)


def squared(found: TrainingEvidence, draw: int = 0) -> Tensor:
    """Outer products summed over the columns, (N, P, P)."""
    rows = columns(found, draw)
    return torch.einsum("knp,knq->npq", rows, rows)


def own_curvature(module: Any, dataset: TensorDataset) -> Tensor:
    """J_nᵀ H_z J_n of the loss of each sample collated alone, (N, P, P)."""
    names = [name for name, _ in module.named_parameters()]

    def loss(z: Tensor, sample: Any) -> Tensor:
        return module.loss(module.predicted(z), sample[1])

    return reference.gauss_newton(module, lambda m, sample: m(sample[0]), loss, singles(dataset), names)


def reduction_of(name: str) -> Any:
    return "sum" if "sum" in name else "mean"


# All labels


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("batch_size", [2, 5])
def test_exact_columns_make_the_curvature_of_each_sample_alone(name, batch_size):
    loss, inputs, targets = EVERY[name]
    module, dataset = judged(loss), TensorDataset(inputs, targets)
    found = evidence(module, dataset, batch_size=batch_size, labels="exact", reduction=reduction_of(name))
    truth = own_curvature(module, dataset)
    if name == "ignored":  # a sample of which nothing counts; torch says 0/0 of it
        assert not bool(
            torch.isfinite(F.cross_entropy(POINT[:1].new_zeros(1, 3), LABEL[LABEL == 1][:1], ignore_index=1))
        )
        truth[LABEL == 1] = 0
    same(squared(found), truth)


def test_log_probabilities_have_the_curvature_of_the_logits_behind_them():
    dataset = TensorDataset(POINT, LABEL)
    for options in ({}, {"weight": WEIGHTS, "reduction": "sum"}, {"ignore_index": 0, "reduction": "sum"}):
        through = judged(lambda p, y, o=options: F.nll_loss(p, y, **o), lambda z: z.log_softmax(1))
        reduction = options.get("reduction", "mean")
        found = evidence(through, dataset, labels="exact", reduction=reduction)
        same(squared(found), own_curvature(judged(cross_entropy(**options)), dataset))


@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_probabilities_of_bits_have_the_curvature_of_the_logits_behind_them(weight):
    dataset = TensorDataset(POINT, BITS)
    through = judged(lambda p, y: F.binary_cross_entropy(p, y, weight=weight), torch.sigmoid)
    truth = own_curvature(judged(lambda z, y: F.binary_cross_entropy_with_logits(z, y, weight=weight)), dataset)
    same(squared(evidence(through, dataset, labels="exact")), truth)


def test_a_batch_wholly_on_the_straight_part_of_huber_has_no_curvature_and_no_error():
    far = TensorDataset(POINT, VALUES + 100)
    assert float(squared(evidence(judged(F.huber_loss), far, labels="exact")).abs().max()) == 0


class Predicting(Judged):
    """Says its distribution itself."""

    def __init__(self, network: nn.Module, loss: Loss, predicted: Any) -> None:
        super().__init__(network, loss)
        self.distribution: Callable[[Tensor], Distribution] = predicted

    def predictive_distribution(self, batch: Any) -> Distribution:
        return self.distribution(self(batch[0]))


def own_loss(z: Tensor, y: Tensor) -> Tensor:
    """A loss that no watched function computes."""
    return -z.log_softmax(1).gather(1, y[:, None]).mean()


def test_a_distribution_of_the_users_own():
    classes = judged(own_loss, lambda z: Categorical(logits=z), kind=Predicting)
    dataset = TensorDataset(POINT, LABEL)
    same(squared(evidence(classes, dataset)), own_curvature(judged(cross_entropy()), dataset))
    bit = judged(lambda z, y: F.softplus(-z * y).mean(), lambda z: Bernoulli(logits=z.squeeze(1)), 1, Predicting)
    found = evidence(bit, TensorDataset(POINT, BITS[:, :1]))
    truth = own_curvature(judged(F.binary_cross_entropy_with_logits, outputs=1), TensorDataset(POINT, BITS[:, :1]))
    same(squared(found), truth)
    assert found.labels == "exact"


def test_the_fisher_information_with_all_labels_is_the_gauss_newton_matrix():
    for name in ("weights", "tokens", "bce, pos_weight", "mse"):
        loss, inputs, targets = EVERY[name]
        module, dataset = judged(loss), TensorDataset(inputs, targets)
        matrices = [Dense(which).collect(evidence(module, dataset, labels="exact")) for which in ("fisher", "ggn")]
        fisher, ggn = (matrix.blocks[0].matrix for matrix in matrices)
        same(fisher, ggn)
        same(fisher, own_curvature(module, dataset).mean(0))


# The given labels


@pytest.mark.parametrize("name", ["hard", "tokens", "mse", "sum"])
def test_observed_labels_make_the_empirical_fisher_information(name):
    loss, inputs, targets = EVERY[name]
    module, dataset = judged(loss), TensorDataset(inputs, targets)
    found = evidence(module, dataset, labels="observed", reduction=reduction_of(name), batch_size=2)
    names = [n for n, _ in module.named_parameters()]
    same(squared(found), reference.fisher(module, given_label, singles(dataset), names))


# Sampled labels

MANY = 4000


@pytest.mark.parametrize("name", [*EVERY, "nll", "probabilities"])
def test_sampled_labels_make_it_on_average(name):
    """The same sample four thousand times, each time with a label of its own."""
    if name == "nll":
        module = judged(F.nll_loss, lambda z: z.log_softmax(1))
        truth, inputs, targets = own_curvature(judged(cross_entropy()), TensorDataset(POINT, LABEL))[3], POINT, LABEL
    elif name == "probabilities":
        module, inputs, targets = judged(F.binary_cross_entropy, torch.sigmoid), POINT, BITS
        logits = judged(F.binary_cross_entropy_with_logits)
        truth = own_curvature(logits, TensorDataset(POINT, BITS))[3]
    else:
        loss, inputs, targets = EVERY[name]
        module = judged(loss)
        truth = own_curvature(module, TensorDataset(inputs, targets))[3]
    again = TensorDataset(inputs[3:4].expand(MANY, *inputs.shape[1:]), targets[3:4].expand(MANY, *targets.shape[1:]))
    found = evidence(module, again, labels="sampled", batch_size=MANY, reduction=reduction_of(name))
    rows = columns(found)
    assert len(rows) == 1
    error = torch.einsum("np,nq->pq", rows[0], rows[0]) / MANY - truth
    assert float(error.norm()) < 0.1 * float(truth.norm()) + 1e-12
    if not name.startswith(("tokens", "mse", "nll", "prob", "classes")) and truth.any():
        towards = rows[0].mean(0)  # the mean gradient over the model's own labels is zero
        assert float(towards.norm()) < 0.1 * float(rows[0].norm(dim=1).mean())


@pytest.mark.parametrize(
    "distribution",
    [
        lambda z: Categorical(logits=z),
        lambda z: Bernoulli(logits=z),
        lambda z: Independent(Bernoulli(logits=z), 1),
        lambda z: Normal(z, torch.full_like(z, 0.5)),
        lambda z: Poisson(z.exp()),
    ],
    ids=["categorical", "bernoulli", "independent", "normal", "poisson"],
)
def test_labels_of_the_users_own_distribution_are_sampled_from_it(distribution):
    information = {
        "Categorical": lambda z: torch.diag(z.softmax(0)) - torch.outer(z.softmax(0), z.softmax(0)),
        "Bernoulli": lambda z: torch.diag(z.sigmoid() * (1 - z.sigmoid())),
        "Independent": lambda z: torch.diag(z.sigmoid() * (1 - z.sigmoid())),
        "Normal": lambda z: 4 * torch.eye(3, dtype=torch.float64),
        "Poisson": lambda z: torch.diag(z.exp()),
    }[type(distribution(torch.zeros(1, 3))).__name__]
    module = judged(own_loss, distribution, kind=Predicting)
    again = TensorDataset(POINT[3:4].expand(MANY, 2), LABEL[3:4].expand(MANY))
    (rows,) = columns(evidence(module, again, labels="sampled", batch_size=MANY))
    at_bias = rows[:, 6:]  # J = 1 there
    truth = information(module(POINT[3]).detach())
    assert float((at_bias.T @ at_bias / MANY - truth).norm()) < 0.1 * float(truth.norm())


SAMPLED = {name: EVERY[name] for name in ("hard", "tokens", "classes second", "bce, pos_weight", "mse")}


@pytest.mark.parametrize("name", [*SAMPLED, "categorical", "normal"])
def test_sampled_labels_belong_to_the_sample_whatever_its_batch_order_or_process(name, monkeypatch):
    if name in SAMPLED:
        loss, inputs, targets = SAMPLED[name]
        module = judged(loss)
    else:
        kinds = {"categorical": lambda z: Categorical(logits=z), "normal": lambda z: Normal(z, 1.0)}
        module, inputs, targets = judged(own_loss, kinds[name], kind=Predicting), POINT, LABEL
    dataset = TensorDataset(inputs, targets)
    options: dict[str, Any] = {"labels": "sampled", "seed": 3}
    whole = columns(evidence(module, dataset, batch_size=5, **options))
    for batch_size in (1, 2, 3):
        torch.testing.assert_close(columns(evidence(module, dataset, batch_size=batch_size, **options)), whole)
    # Two processes, of batches of one: the first takes samples 0, 2, 4.
    trainer = quiet()
    monkeypatch.setattr(Trainer, "world_size", property(lambda self: 2))
    for rank in (0, 1):
        monkeypatch.setattr(Trainer, "global_rank", property(lambda self, rank=rank: rank))
        part = columns(evidence(module, dataset, batch_size=1, trainer=trainer, **options))
        torch.testing.assert_close(part, whole[:, rank::2])


def test_other_passes_and_seeds_draw_other_labels():
    module, dataset = judged(cross_entropy()), TensorDataset(draws(40, 2), integers(3, 40))
    found = evidence(module, dataset, labels="sampled")
    first = columns(found)
    assert torch.equal(first, columns(found))
    for other in (columns(found, 1), columns(evidence(module, dataset, labels="sampled", seed=1))):
        unlike = (first - other).abs().sum((0, 2)) > 1e-9
        assert 10 < int(unlike.sum()) < 40  # some samples draw the same class again


def test_a_padded_text_draws_the_labels_of_the_text_alone():
    module = judged(by_token())
    longer = F.pad(TOKENS, (0, 3), value=-100), F.pad(TEXT, (0, 0, 0, 3))
    found = columns(evidence(module, TensorDataset(TEXT, TOKENS), labels="sampled"))
    padded = columns(evidence(module, TensorDataset(longer[1], longer[0]), labels="sampled"))
    torch.testing.assert_close(padded, found)


def test_nothing_random_of_the_run_is_touched():
    module = judged(own_loss, lambda z: Poisson(z.exp()), kind=Predicting)
    before = torch.get_rng_state()
    columns(evidence(module, TensorDataset(POINT, LABEL), labels="sampled"))
    assert torch.equal(before, torch.get_rng_state())


# Numbers that belong to a sample


def test_counted_numbers_look_uniform_and_unrelated():
    u = uniforms(0, 0, torch.arange(2000), 50)
    assert u.dtype == torch.float64 and float(u.min()) > 0 and float(u.max()) < 1
    assert u.unique().numel() == u.numel()
    expected = (torch.arange(u.numel(), dtype=torch.float64) + 0.5) / u.numel()
    assert float((u.flatten().sort().values - expected).abs().max()) < 1.63 / u.numel() ** 0.5  # Kolmogorov–Smirnov, 1%
    centred = (u - 0.5) * 12**0.5
    others = {
        "the next sample": centred[1:] * centred[:-1],
        "the next place": centred[:, 1:] * centred[:, :-1],
        "the next pass": centred * (uniforms(0, 1, torch.arange(2000), 50) - 0.5) * 12**0.5,
        "the next seed": centred * (uniforms(1, 0, torch.arange(2000), 50) - 0.5) * 12**0.5,
    }
    for what, products in others.items():
        assert abs(float(products.mean())) < 4 / products.numel() ** 0.5, what
    for bit in range(1, 9):  # of each number
        share = float(((u * 2**bit).long() % 2).double().mean())
        assert abs(share - 0.5) < 2 / u.numel() ** 0.5, bit


def test_counted_numbers_are_a_function_of_the_sample_alone():
    u = uniforms(7, 1, torch.arange(10), 6)
    assert torch.equal(u[[3, 8]], uniforms(7, 1, torch.tensor([3, 8]), 6))
    assert torch.equal(u[:, :4], uniforms(7, 1, torch.arange(10), 4))
    wide = uniforms(2**32 - 1, 1, torch.tensor([0, 2**40]), 3)
    assert torch.isfinite(wide).all() and wide.unique().numel() == 6


def test_counted_normals():
    x = normals(0, 0, torch.arange(4000), 25)
    assert torch.isfinite(x).all()
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert abs(float(x.pow(power).mean()) - moment) < 0.05


# Which are taken when nobody says


def taken(module: Any, inputs: Tensor, targets: Tensor, **options: Any) -> str:
    found = evidence(module, TensorDataset(inputs, targets), **options)
    columns(found)
    return str(found.labels)


def test_the_choice_is_exact_for_few_classes_and_outputs():
    assert taken(judged(cross_entropy()), POINT, LABEL) == "exact"
    assert taken(judged(cross_entropy(), outputs=32), POINT, LABEL) == "exact"
    assert taken(judged(cross_entropy(), outputs=33), POINT, LABEL) == "sampled"
    assert taken(judged(cross_entropy()), POINT, SOFT) == "exact"
    assert taken(judged(F.mse_loss, outputs=32), POINT, draws(5, 32)) == "exact"
    assert taken(judged(F.mse_loss, outputs=33), POINT, draws(5, 33)) == "sampled"
    assert taken(judged(own_loss), POINT, LABEL) == "observed"
    assert taken(judged(lambda z, y: 2 * F.cross_entropy(z, y)), POINT, LABEL) == "observed"
    bits = judged(own_loss, lambda z: Independent(Bernoulli(logits=z), 1), kind=Predicting)
    assert taken(bits, POINT, LABEL) == "sampled"


@pytest.mark.parametrize("loss", [by_token(), classes_second()], ids=["flattened", "classes second"])
@pytest.mark.parametrize("length", [2, 4])
def test_of_a_class_for_every_token_labels_are_sampled_however_short_the_texts(loss, length):
    assert taken(judged(loss), TEXT[:, :length], TOKENS[:, :length].clamp_min(0)) == "sampled"
    assert taken(judged(classes_second()), TEXT[:, :1], TOKENS[:, :1].clamp_min(0)) == "sampled"


@pytest.mark.parametrize(("mine", "theirs", "agreed"), [("exact", 1, "sampled"), ("sampled", 0, "sampled")])
def test_processes_agree_on_the_choice(mine, theirs, agreed, monkeypatch):
    """A process whose first batch happens to have texts of one token goes with the others."""
    length = 1 if mine == "exact" else 2
    dataset = TensorDataset(TEXT[:, :length], TOKENS[:, :length].clamp_min(0))
    found = evidence(judged(by_token()), dataset)
    votes = []

    def reduce(tensor: Tensor) -> Tensor:
        votes.append(tensor.clone())
        tensor[theirs] += 1
        return tensor

    monkeypatch.setattr(found, "reduce", reduce)
    rows = columns(found)
    assert found.labels == agreed and len(rows) == 1
    assert len(votes) == 1 and int(votes[0].argmax()) == ["exact", "sampled"].index(mine)
    columns(found, 1)
    assert len(votes) == 1  # the choice is kept


# What is refused


@pytest.mark.parametrize("labels", ["exact", "sampled"])
def test_an_absolute_error_has_no_curvature(labels):
    with pytest.raises(LossError, match="l1_loss has no curvature") as caught:
        columns(evidence(judged(F.l1_loss), TensorDataset(POINT, VALUES), labels=labels))
    assert "observed" in caught.value.hint
    assert taken(judged(F.l1_loss), POINT, VALUES, labels="observed") == "observed"


@pytest.mark.parametrize("labels", ["exact", "sampled"])
@pytest.mark.parametrize(
    "loss",
    [own_loss, lambda z, y: F.cross_entropy(z, y) + F.cross_entropy(-z, y), lambda z, y: 3 * F.cross_entropy(z, y)],
    ids=["its own", "of two calls", "with a factor"],
)
def test_a_loss_that_tells_no_distribution(loss, labels):
    with pytest.raises(LossError, match=f'labels="{labels}" needs the model\'s predictive distribution') as caught:
        columns(evidence(judged(loss), TensorDataset(POINT, LABEL), labels=labels))
    assert "predictive_distribution(batch)" in caught.value.hint
    assert "samples 0 to 3" in caught.value.what


def test_exact_labels_of_a_distribution_with_too_many_values():
    module = judged(own_loss, lambda z: Normal(z, 1.0), kind=Predicting)
    with pytest.raises(LossError, match="few values"):
        columns(evidence(module, TensorDataset(POINT, LABEL), labels="exact"))


def test_the_module_is_left_as_it_was():
    module = judged(cross_entropy())
    module.train()
    before = copy.deepcopy(module.state_dict())
    columns(evidence(module, TensorDataset(POINT, LABEL)))
    assert module.training and all(p.grad is None for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
