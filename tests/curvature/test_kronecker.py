"""K-FAC and EK-FAC against their formulas, layer by layer, and against the Fisher information where they equal it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence.curvature import EKFAC, KFAC, Absolute, Diagonal
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Rows
from tests import reference
from tests.curvature.settings import (
    Model,
    classified,
    draws,
    every_label,
    evidence,
    given_label,
    integers,
    laid_out,
    matrix_of,
    model,
    same,
    shapes_of,
    singles,
    vectors,
)

BOTH = pytest.mark.parametrize("statistics", [KFAC(), EKFAC()], ids=["kfac", "ekfac"])


def curvature_of(statistics, module, dataset, parameters="all", labels="exact", **options):
    return statistics.collect(evidence(module, dataset, parameters, labels=labels, **options))


def formula(
    statistics: Any,
    module: nn.Module,
    samples: list[Any],
    names: list[str],
    *,
    layers: list[str] | None = None,
    terms: Any = every_label,
    transposed: bool = False,
) -> Tensor:
    """The matrix of a weight, and of the bias that is named after it."""
    parameters = dict(module.named_parameters())
    used_by = [names[0].rpartition(".")[0]] if layers is None else layers
    a, g = reference.kronecker_factors(module, used_by, terms, samples, bias=len(names) > 1)
    gradients = reference.label_gradients(module, terms, samples, names) if isinstance(statistics, EKFAC) else None
    return reference.kronecker_matrix(a, g, parameters[names[0]], gradients, transposed=transposed)


def checked(
    statistics: Any,
    module: Any,
    dataset: TensorDataset,
    blocks: list[list[str]],
    truth: Any = None,
    **options: Any,
) -> None:
    """Every block of the curvature equals the formula, and other blocks there are none."""
    truth = module if truth is None else truth
    curvature = curvature_of(statistics, module, dataset, **options)
    assert {block.names for block in curvature.blocks} >= {tuple(names) for names in blocks}
    for names in blocks:
        found = matrix_of(curvature, shapes_of(module, names))
        same(found, formula(statistics, truth, singles(dataset), names))
        same(found, found.T)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


POINTS = classified(draws(11, 4))


@BOTH
@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_of_a_perceptron(statistics, batch_size):
    blocks = [["network.0.weight", "network.0.bias"], ["network.2.weight", "network.2.bias"]]
    checked(statistics, model(mlp), POINTS, blocks, batch_size=batch_size)


@BOTH
def test_of_sequences_inputs_are_averaged_over_tokens_and_gradients_belong_to_whole_samples(statistics):
    dataset = classified(draws(7, 5, 4), 3, 5)
    module = model(mlp)
    checked(statistics, module, dataset, [["network.0.weight", "network.0.bias"]])
    checked(statistics, module, dataset, [["network.2.weight", "network.2.bias"]], batch_size=3)


@BOTH
def test_over_the_observed_labels(statistics):
    module = model(mlp)
    curvature = curvature_of(statistics, module, POINTS, labels="observed")
    names = ["network.2.weight", "network.2.bias"]
    truth = formula(statistics, module, singles(POINTS), names, terms=given_label)
    same(matrix_of(curvature, shapes_of(module, names)), truth)


@BOTH
def test_without_a_bias_and_of_some_of_the_parameters(statistics):
    module = model(lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)))
    checked(statistics, module, POINTS, [["network.0.weight"], ["network.2.weight", "network.2.bias"]])
    checked(statistics, module, POINTS, [["network.2.weight"]], parameters=["network.2.weight"])
    bias = curvature_of(statistics, module, POINTS, ["network.2.bias"])
    truth = reference.fisher(module, every_label, singles(POINTS), ["network.2.bias"]).mean(0)
    same(matrix_of(bias, shapes_of(module, ["network.2.bias"])), truth)


class Images(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 2, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


@BOTH
@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 2, "stride": 2}, {"padding": 1, "dilation": 2, "bias": False}, {"groups": 4, "padding": 1}],
    ids=str,
)
def test_of_convolutions_in_groups_with_strides(statistics, options):
    module = model(lambda: Images(**options))
    conv = ["conv.weight"] if options.get("bias") is False else ["conv.weight", "conv.bias"]
    blocks = [[f"network.{name}" for name in conv], ["network.head.weight", "network.head.bias"]]
    checked(statistics, module, classified(draws(6, 4, 4, 5)), blocks)


class Words(nn.Module):
    """Mean over the words of a text, padding (0) apart, of their embeddings."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3, padding_idx=padding_idx)
        self.hidden = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        present = (tokens != 0).unsqueeze(-1)
        return self.head((torch.tanh(self.hidden(self.embedding(tokens))) * present).sum(1) / present.sum(1))


def texts(longest: int = 6) -> TensorDataset:
    tokens = integers(6, 8, 4, low=1)
    tokens[3, 2:], tokens[4, 1:] = 0, 0
    return classified(F.pad(tokens, (0, longest - 4)))


@BOTH
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("longest", [4, 6])
def test_of_look_ups_and_padding_does_not_count(statistics, padding_idx, longest):
    module = model(lambda: Words(padding_idx))
    with torch.no_grad():
        module.network.embedding.weight[0] = 5.0  # what padding shows to the hidden layer
    dataset = texts(longest)
    name = "network.embedding.weight"
    curvature = curvature_of(statistics, module, dataset)
    rows = reference.label_gradients(module, every_label, singles(dataset), [name])
    truth = reference.look_up_matrix(rows, 7, 3, corrected=isinstance(statistics, EKFAC))
    same(matrix_of(curvature, shapes_of(module, [name])), truth)
    hidden = ["network.hidden.weight", "network.hidden.bias"]
    found = matrix_of(curvature, shapes_of(module, hidden))
    same(found, formula(statistics, module, singles(texts(4)), hidden))


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 3, mode=mode, padding_idx=0)
        self.head = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens))


@BOTH
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_of_bags_of_words(statistics, mode):
    module, name = model(lambda: Bag(mode)), "network.bag.weight"
    rows = reference.label_gradients(module, every_label, singles(texts()), [name])
    truth = reference.look_up_matrix(rows, 7, 3, corrected=isinstance(statistics, EKFAC))
    same(matrix_of(curvature_of(statistics, module, texts()), shapes_of(module, [name])), truth)


@BOTH
def test_normalisation_is_exact_where_it_is_small_and_else_diagonal(statistics):
    module = model(lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)))
    names = ["network.1.weight", "network.1.bias"]
    truth = reference.fisher(module, every_label, singles(POINTS), names).mean(0)
    same(matrix_of(curvature_of(statistics, module, POINTS), shapes_of(module, names)), truth)
    small = curvature_of(type(statistics)(exact_up_to=5), module, POINTS)
    same(matrix_of(small, shapes_of(module, names)), torch.diag(truth.diagonal()))
    exact = curvature_of(type(statistics)(exact_up_to=6), module, POINTS)
    same(matrix_of(exact, shapes_of(module, names)), truth)


class Attention(nn.Module):
    """Self-attention, its mean over places, and a head; `explicit` with a Linear for each of its four products."""

    def __init__(self, explicit: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, bias=bias)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Products(nn.Module):
    """A MultiheadAttention as four Linear layers."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.batch_first = packed.num_heads, True
        self.parts = nn.ModuleList(nn.Linear(4, 4, packed.in_proj_bias is not None) for _ in range(3))
        self.out_proj = packed.out_proj
        with torch.no_grad():
            for k, part in enumerate(self.parts):
                part.weight = nn.Parameter(packed.in_proj_weight[4 * k : 4 * k + 4].clone())
                if packed.in_proj_bias is not None:
                    part.bias = nn.Parameter(packed.in_proj_bias[4 * k : 4 * k + 4].clone())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        parts = [
            part(x).unflatten(2, (self.heads, -1)) for part, x in zip(self.parts, (query, key, value), strict=True)
        ]
        q, k, v = (part.transpose(1, 2) for part in parts)
        shares = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out_proj((shares @ v).transpose(1, 2).flatten(2)), None


@BOTH
@pytest.mark.parametrize("bias", [True, False])
def test_of_attention_whose_packed_projection_is_three_groups(statistics, bias):
    module = model(lambda: Attention(bias=bias))
    dataset = classified(draws(6, 3, 4))
    taken_apart = model(lambda: Attention(bias=bias))
    taken_apart.network.attention = Products(module.network.attention)
    samples = singles(dataset)
    torch.testing.assert_close(taken_apart(samples[0][0]), module(samples[0][0]))
    curvature = curvature_of(statistics, module, dataset)

    def both(layer: str) -> list[str]:
        return [f"network.{layer}.weight", f"network.{layer}.bias"][: 1 + bias]

    out = both("attention.out_proj")
    same(matrix_of(curvature, shapes_of(module, out)), formula(statistics, taken_apart, samples, out))
    packed = ["network.attention.in_proj_weight", "network.attention.in_proj_bias"][: 1 + bias]
    found = matrix_of(curvature, shapes_of(module, packed))
    truth = torch.zeros_like(found)
    for k in range(3):
        at = torch.cat([torch.arange(16) + 16 * k, 48 + torch.arange(4) + 4 * k][: 1 + bias])
        truth[at[:, None], at] = formula(statistics, taken_apart, samples, both(f"attention.parts.{k}"))
    same(found, truth)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


@BOTH
def test_of_a_transformer_layer(statistics):
    module, taken_apart = model(Encoder), model(Encoder)
    taken_apart.network.layer.self_attn = Products(module.network.layer.self_attn)
    dataset = classified(draws(6, 3, 4))
    curvature = curvature_of(statistics, module, dataset)
    assert len(curvature.parameters) == len(list(module.parameters()))
    for layer in ("linear1", "linear2", "self_attn.out_proj"):
        names = [f"network.layer.{layer}.weight", f"network.layer.{layer}.bias"]
        truth = formula(statistics, taken_apart, singles(dataset), names)
        same(matrix_of(curvature, shapes_of(module, names)), truth)
    norm = ["network.layer.norm1.weight", "network.layer.norm1.bias"]
    truth = reference.fisher(module, every_label, singles(dataset), norm).mean(0)
    same(matrix_of(curvature, shapes_of(module, norm)), truth)


class Gpt2(Model):
    def __init__(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(vocab_size=6, n_positions=5, n_embd=4, n_layer=1, n_head=2, n_inner=5, **options)
        super().__init__(GPT2LMHeadModel(config))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network(tokens, use_cache=False).logits


@BOTH
def test_of_gpt2_whose_weights_are_kept_the_other_way_round(statistics):
    module, dataset = model(Gpt2), classified(integers(6, 4, 5), 6, 5)
    curvature = curvature_of(statistics, module, dataset, parameters=["*.mlp.c_*", "*.attn.c_*", "*.ln_?.*"])
    block = "network.transformer.h.0."
    for layer in ("attn.c_attn", "mlp.c_fc"):
        names = [f"{block}{layer}.weight", f"{block}{layer}.bias"]
        truth = formula(statistics, module, singles(dataset), names, transposed=True)
        same(matrix_of(curvature, shapes_of(module, names)), truth)


def test_the_tied_table_of_gpt2_is_written_out_or_refused():
    module, dataset = model(Gpt2), classified(integers(6, 4, 5), 6, 5)
    tied = ["network.transformer.wte.weight"]
    with pytest.raises(CurvatureError, match=r"no form for network\.transformer\.wte\.weight"):
        curvature_of(EKFAC(exact_up_to=23), module, dataset, tied)
    truth = reference.fisher(module, every_label, singles(dataset), tied).mean(0)
    same(matrix_of(curvature_of(EKFAC(), module, dataset, tied), shapes_of(module, tied)), truth)


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Shared(nn.Module):
    """A weight that two layers share, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@BOTH
def test_of_a_layer_that_is_called_twice(statistics):
    checked(statistics, model(Twice), POINTS, [["network.inner.weight", "network.inner.bias"]])


@BOTH
def test_of_a_weight_that_two_layers_share(statistics):
    module = model(Shared)
    curvature = curvature_of(statistics, module, POINTS)
    weight = ["network.first.weight"]
    truth = formula(statistics, module, singles(POINTS), weight, layers=["network.first", "network.second"])
    same(matrix_of(curvature, shapes_of(module, weight)), truth)
    for bias in (["network.first.bias"], ["network.second.bias"]):
        truth = reference.fisher(module, every_label, singles(POINTS), bias).mean(0)
        same(matrix_of(curvature, shapes_of(module, bias)), truth)


@BOTH
def test_of_a_bias_that_two_layers_share(statistics):
    def make() -> nn.Module:
        network = Shared()
        network.second.weight = nn.Parameter(network.first.weight.detach() * 2)
        network.second.bias = network.first.bias
        return network

    module, bias = model(make), ["network.first.bias"]
    curvature = curvature_of(statistics, module, POINTS)
    truth = reference.fisher(module, every_label, singles(POINTS), bias).mean(0)
    same(matrix_of(curvature, shapes_of(module, bias)), truth)
    weight = ["network.second.weight"]
    same(matrix_of(curvature, shapes_of(module, weight)), formula(statistics, module, singles(POINTS), weight))


# Where they are exact, and how good they are elsewhere


class Regression(Model):
    """One linear layer and its mean squared error: the second derivative is the same for every sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


def squares(module: Any, batch: Any) -> Any:
    """H_z = 2/K of each of K outputs."""
    z = module(batch[0]).flatten()
    for value in z:
        yield 2 / len(z), value


@BOTH
@pytest.mark.parametrize("outputs", [1, 3])
def test_one_linear_layer_under_a_squared_error_is_a_kronecker_product(statistics, outputs):
    module = model(lambda: Regression(nn.Linear(4, outputs)))
    dataset = TensorDataset(draws(9, 4), draws(9, outputs, seed=1))
    names = ["network.weight", "network.bias"]
    found = matrix_of(curvature_of(statistics, module, dataset), shapes_of(module, names))
    same(found, reference.fisher(module, squares, singles(dataset), names).mean(0))


class Binary(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]).squeeze(1), batch[1].double())


def binary(module: Any, batch: Any) -> Any:
    z = module(batch[0]).flatten()[0]
    p = z.detach().sigmoid()
    yield p, F.softplus(-z)
    yield 1 - p, F.softplus(z)


def test_ekfac_is_the_fisher_information_of_one_hot_inputs():
    """Classes of inputs do not meet, so the eigenbasis of the inputs is the right one; K-FAC is wrong even here."""
    module = model(lambda: Binary(nn.Linear(4, 1, bias=False)))
    inputs = F.one_hot(integers(4, 12), 4).double()
    inputs = torch.cat([inputs, inputs[:3]])
    dataset = classified(inputs, 2)
    truth = reference.fisher(module, binary, singles(dataset), ["network.weight"]).mean(0)
    shapes = shapes_of(module, ["network.weight"])
    same(matrix_of(curvature_of(EKFAC(), module, dataset), shapes), truth)
    kfac = matrix_of(curvature_of(KFAC(), module, dataset), shapes)
    assert float((kfac - truth).norm()) > 1e-3 * float(truth.norm())


def test_one_output_makes_ekfac_the_diagonal_in_the_basis_of_the_inputs():
    module = model(lambda: Binary(nn.Linear(4, 1)))
    dataset = classified(draws(20, 4), 2)
    names = ["network.weight", "network.bias"]
    truth = reference.fisher(module, binary, singles(dataset), names).mean(0)
    a = torch.cat([dataset.tensors[0], torch.ones(20, 1)], 1)
    _, basis = torch.linalg.eigh(a.T @ a)
    found = matrix_of(curvature_of(EKFAC(), module, dataset), shapes_of(module, names))
    same(found, basis @ torch.diag((basis.T @ truth @ basis).diagonal()) @ basis.T)


@pytest.mark.parametrize("seed", range(3))
def test_corrected_eigenvalues_are_never_further_from_the_truth(seed):
    """Λ is the diagonal of the truth in the basis, which is the best there is (George et al. 2018, theorem 2)."""
    module = model(mlp, seed)
    dataset = classified(draws(15, 4, seed=seed))
    names = ["network.0.weight", "network.0.bias"]
    truth = reference.fisher(module, every_label, singles(dataset), names).mean(0)
    shapes = shapes_of(module, names)
    errors = [
        float((matrix_of(curvature_of(statistics, module, dataset), shapes) - truth).norm())
        for statistics in (EKFAC(), KFAC())
    ]
    assert errors[0] < errors[1] < float(truth.norm())
    ekfac = matrix_of(curvature_of(EKFAC(), module, dataset), shapes)
    assert float(ekfac.trace()) == pytest.approx(float(truth.trace()), rel=1e-12)


# Batches, order, processes


@BOTH
@pytest.mark.parametrize("labels", ["exact", "sampled"])
def test_batches_and_their_order_change_nothing(statistics, labels):
    module = model(Words)
    whole = curvature_of(statistics, module, texts(), labels=labels, batch_size=8)
    shapes = shapes_of(module, whole.parameters)
    truth = matrix_of(whole, shapes)
    for batch_size in (1, 3, 5):
        same(matrix_of(curvature_of(statistics, module, texts(4), labels=labels, batch_size=batch_size), shapes), truth)
    if labels == "exact":
        order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
        turned = TensorDataset(*(tensor[order] for tensor in texts().tensors))
        same(matrix_of(curvature_of(statistics, module, turned), shapes), truth)


def test_the_eigenvalues_of_sampled_labels_are_measured_with_fresh_ones():
    module, drawn = model(mlp), []
    found = evidence(module, POINTS, labels="sampled")
    visit = found.visit
    found.visit = lambda draw, batch: drawn.append(draw) or visit(draw, batch)  # type: ignore[method-assign]
    EKFAC().collect(found)
    assert drawn == [0, 1]

    def columns(draw: int) -> Tensor:
        rows = []
        found.visit(draw, lambda batch: rows.extend(c["network.2.bias"].dense() for c in batch))
        return torch.cat(rows)

    assert torch.equal(columns(0), columns(0))
    assert not torch.equal(columns(0), columns(1))


# Rows


@BOTH
def test_rows_stay_rows_and_equal_their_dense_form(statistics):
    module, name = model(Words), "network.embedding.weight"
    curvature = curvature_of(statistics, module, texts()).decayed({name: 0.01})
    words, owners = torch.tensor([1, 2, 2, 5]), torch.tensor([0, 0, 1, 1])
    rows = Rows(words, owners, draws(4, 3), 2, 7)
    written_out = laid_out(rows.dense().flatten(1), shapes_of(module, [name]))
    for product in (curvature.matvec, lambda v: curvature.solve(v, Absolute(0.1))):
        found = product({name: rows})[name]
        assert isinstance(found, Rows)
        assert torch.equal(found.words, words) and torch.equal(found.owners, owners)
        same(found.dense(), product(written_out)[name].dense())


def test_the_damping_of_look_ups_leaves_out_words_that_never_occurred():
    module, name = model(Words), "network.embedding.weight"
    (block,) = [b for b in curvature_of(EKFAC(), module, texts()).blocks if b.names == (name,)]
    occurred = block.eigenvalues.sum(1) > 0
    assert occurred.tolist() == [False, *[True] * 5, False]
    assert block.mean_eigenvalue == pytest.approx(float(block.eigenvalues[1:6].mean()))


# What is refused


class Custom(nn.Module):
    """Parameters that multiply in a way of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.rand(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.scales.square()


@BOTH
def test_a_layer_without_a_form_is_named(statistics):
    module = model(Custom)
    names = ["network.scales"]
    truth = reference.fisher(module, every_label, singles(POINTS), names).mean(0)
    same(matrix_of(curvature_of(statistics, module, POINTS), shapes_of(module, names)), truth)
    few = type(statistics)(exact_up_to=11)
    with pytest.raises(CurvatureError, match=rf"{type(statistics).__name__} has no form for network\.scales") as caught:
        curvature_of(few, module, POINTS)
    assert "Diagonal()" in caught.value.hint
    diagonal = matrix_of(curvature_of(Diagonal(), module, POINTS), shapes_of(module, names))
    same(diagonal, torch.diag(truth.diagonal()))


def test_a_weight_of_two_forms_is_refused_by_name():
    """One table that is looked up and multiplied is Dense: it is no product of two factors."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.table(tokens).mean(1), self.table.weight)

    module = model(Tied)
    with pytest.raises(CurvatureError, match=r"network\.table\.weight"):
        curvature_of(EKFAC(exact_up_to=16), module, classified(integers(7, 6, 3), 7))


def test_solve_is_the_inverse_in_every_form():
    module = model(Encoder)
    curvature = curvature_of(EKFAC(), module, classified(draws(6, 3, 4)))
    v = vectors(shapes_of(module, curvature.parameters))
    for name, block in curvature.solve(curvature_plus(curvature, v, 0.05), Absolute(0.05)).items():
        torch.testing.assert_close(block.dense(), v[name].dense(), rtol=1e-9, atol=1e-9)


def curvature_plus(curvature: Any, v: Any, shift: float) -> Any:
    product = curvature.matvec(v)
    return {name: type(v[name])(product[name].dense() + shift * v[name].dense()) for name in v}
