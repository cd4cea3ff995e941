"""Diagonal and dense curvatures against sums over samples and labels; what products and inverses have in common."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.curvature import EKFAC, KFAC, Absolute, BlockDiagonal, Dense, Diagonal
from lightning_influence.errors import CaptureError, CurvatureError
from lightning_influence.gradients import Dense as DenseGradients
from lightning_influence.gradients import Factored, Rows
from tests import reference
from tests.curvature.settings import (
    classified,
    draws,
    every_label,
    evidence,
    eye,
    flat,
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
from tests.curvature.test_kronecker import Words, texts


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))


DATA = classified(draws(10, 3))
FIRST, LAST = ["network.0.weight", "network.0.bias"], ["network.3.weight", "network.3.bias"]
STATISTICS = [Dense("fisher"), Dense("ggn"), Dense("hessian"), Diagonal(), KFAC(), EKFAC()]
NAMES = [s.name for s in STATISTICS]
EVERY = pytest.mark.parametrize("statistics", STATISTICS, ids=NAMES)


def collected(statistics: Any, module: Any = None, dataset: Any = DATA, parameters: Any = "all", **options: Any) -> Any:
    settings = {"labels": "exact", **options}
    return statistics.collect(evidence(module or model(network), dataset, parameters, **settings))


# What they are


@pytest.mark.parametrize(("labels", "terms"), [("exact", every_label), ("observed", given_label)])
@pytest.mark.parametrize("batch_size", [3, 10])
def test_the_dense_fisher_information_is_a_sum_over_samples_and_labels(labels, terms, batch_size):
    module = model(network)
    names = [name for name, _ in module.named_parameters()]
    truth = reference.fisher(module, terms, singles(DATA), names).mean(0)
    dense = collected(Dense("fisher"), module, labels=labels, batch_size=batch_size)
    same(matrix_of(dense, shapes_of(module, names)), truth)
    diagonal = collected(Diagonal(), module, labels=labels, batch_size=batch_size)
    same(matrix_of(diagonal, shapes_of(module, names)), torch.diag(truth.diagonal()))


def test_of_look_ups():
    module = model(Words)
    names = [name for name, _ in module.named_parameters()]
    truth = reference.fisher(module, every_label, singles(texts()), names).mean(0)
    shapes = shapes_of(module, names)
    same(matrix_of(collected(Dense("fisher"), module, texts()), shapes), truth)
    same(matrix_of(collected(Diagonal(), module, texts()), shapes), torch.diag(truth.diagonal()))


def test_the_dense_hessian_is_that_of_the_mean_loss():
    module = model(network)
    names = [name for name, _ in module.named_parameters()]
    start = tuple(dict(module.named_parameters())[name].detach() for name in names)

    def loss(*values: Tensor) -> Tensor:
        z = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (DATA.tensors[0],))
        return F.cross_entropy(z, DATA.tensors[1])

    parts = torch.autograd.functional.hessian(loss, start)
    rows = [
        [b.reshape(p.numel(), q.numel()) for b, q in zip(row, start, strict=True)]
        for row, p in zip(parts, start, strict=True)
    ]
    truth = torch.cat([torch.cat(row, 1) for row in rows])
    same(matrix_of(collected(Dense("hessian"), module, batch_size=4), shapes_of(module, names)), truth)
    assert float(torch.linalg.eigvalsh(truth).min()) < 0  # indefinite, as a Hessian may be


def test_only_the_parameters_that_are_selected():
    module = model(network)
    truth = reference.fisher(module, every_label, singles(DATA), LAST).mean(0)
    for statistics in (Dense("fisher"), Dense("ggn")):
        dense = collected(statistics, module, parameters="last_layer")
        assert dense.parameters == tuple(LAST)
        same(matrix_of(dense, shapes_of(module, LAST)), truth)


def test_too_many_parameters_are_refused_with_their_price():
    with pytest.raises(CurvatureError, match="does not fit") as caught:
        collected(Dense("fisher", at_most=20))
    assert "at most 20" in str(caught.value) and "39 parameters" in str(caught.value)
    with pytest.raises(CurvatureError, match="unknown matrix"):
        Dense("gauss")  # type: ignore[arg-type]


# What products and inverses have in common


@EVERY
def test_solve_undoes_the_damped_product(statistics):
    module = model(network)
    curvature = collected(statistics, module)
    shapes = shapes_of(module, curvature.parameters)
    v = vectors(shapes)
    for damping in (0.3, 2.0):
        product = flat(curvature.matvec(v), shapes) + damping * flat(v, shapes)
        found = flat(curvature.solve(laid_out(product, shapes), Absolute(damping)), shapes)
        torch.testing.assert_close(found, flat(v, shapes), rtol=1e-10, atol=1e-10)
        matrix = matrix_of(curvature, shapes)
        truth = torch.linalg.solve(matrix + damping * eye(len(matrix)), flat(v, shapes).T).T
        torch.testing.assert_close(flat(curvature.solve(v, Absolute(damping)), shapes), truth, rtol=1e-9, atol=1e-9)


@EVERY
def test_a_question_has_the_same_answer_however_often_it_is_asked(statistics):
    """Damping in place, on cached eigenvalues, would grow from one call to the next."""
    module = model(network)
    curvature = collected(statistics, module)
    shapes = shapes_of(module, curvature.parameters)
    v = vectors(shapes)
    before = {name: tensor.clone() for name, tensor in curvature.state()[0].items()}
    kept = copy.deepcopy(v)
    answers = [flat(curvature.solve(v, Absolute(0.2)), shapes) for _ in range(3)]
    curvature.solve(v, Absolute(3.0)), curvature.matvec(v), curvature.decayed(dict.fromkeys(shapes, 0.5))
    answers.append(flat(curvature.solve(v, Absolute(0.2)), shapes))
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    after = curvature.state()[0]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(v[name].values, kept[name].values) for name in v)


@EVERY
def test_weight_decay_lies_on_the_diagonal(statistics):
    module = model(network)
    curvature = collected(statistics, module)
    shapes = shapes_of(module, curvature.parameters)
    plain = matrix_of(curvature, shapes)
    decayed = curvature.decayed(dict.fromkeys(shapes, 0.25)).decayed(dict.fromkeys(shapes, 0.5))
    same(matrix_of(decayed, shapes), plain + 0.75 * eye(len(plain)))
    same(matrix_of(curvature, shapes), plain)
    v = vectors(shapes)
    truth = torch.linalg.solve(plain + (0.75 + 0.5) * eye(len(plain)), flat(v, shapes).T).T
    torch.testing.assert_close(flat(decayed.solve(v, Absolute(0.5)), shapes), truth, rtol=1e-9, atol=1e-9)
    for one, other in zip(curvature.blocks, decayed.blocks, strict=True):
        assert one.mean_eigenvalue == other.mean_eigenvalue  # by which a relative damping goes


def test_weight_decay_of_some_parameters():
    module = model(network)
    for statistics in (Dense("fisher"), Diagonal()):
        curvature = collected(statistics, module)
        shapes = shapes_of(module, curvature.parameters)
        found = matrix_of(curvature.decayed({"network.3.weight": 0.5}), shapes) - matrix_of(curvature, shapes)
        truth = torch.cat(
            [torch.full((torch.Size(s).numel(),), 0.5 * (n == "network.3.weight")) for n, s in shapes.items()]
        )
        same(found, torch.diag(truth.double()))


@EVERY
def test_the_mean_eigenvalue_is_a_share_of_the_trace(statistics):
    module = model(network)
    for block in collected(statistics, module).blocks:
        matrix = matrix_of(BlockDiagonal([block]), dict(block.shapes))
        assert block.mean_eigenvalue == pytest.approx(float(matrix.trace()) / len(matrix), rel=1e-10)


@EVERY
def test_vectors_in_any_form_and_precision(statistics):
    module = model(network)
    curvature = collected(statistics, module)
    shapes = shapes_of(module, curvature.parameters)
    v = vectors(shapes, 2)
    factored = Factored(draws(2, 5, 3, seed=7), draws(2, 5, 4, seed=8), shapes["network.0.weight"])
    mixed = {**v, "network.0.weight": factored}
    written = {**v, "network.0.weight": DenseGradients(factored.dense())}
    same(flat(curvature.solve(mixed, Absolute(0.1)), shapes), flat(curvature.solve(written, Absolute(0.1)), shapes))
    half = {name: block.to(dtype=torch.bfloat16) for name, block in v.items()}
    widened = {name: block.to(dtype=torch.float64) for name, block in half.items()}
    same(flat(curvature.solve(half, Absolute(0.1)), shapes), flat(curvature.solve(widened, Absolute(0.1)), shapes))


def test_rows_stay_rows_in_a_diagonal_and_are_written_out_in_a_matrix():
    module, name = model(Words), "network.embedding.weight"
    rows = Rows(torch.tensor([1, 2, 2, 5]), torch.tensor([0, 0, 1, 1]), draws(4, 3), 2, 7)
    shapes = shapes_of(module, [name])
    for statistics, kind in ((Diagonal(), Rows), (Dense("fisher"), DenseGradients)):
        curvature = collected(statistics, module, texts(), parameters="word_embeddings")
        for product in (curvature.matvec, lambda v, c=curvature: c.solve(v, Absolute(0.1))):
            found = product({name: rows})[name]
            assert type(found) is kind
            same(found.dense(), product(laid_out(rows.dense().flatten(1), shapes))[name].dense())


# Rows and columns


def test_some_columns_and_rows_of_a_matrix():
    module = model(network)
    curvature = collected(Dense("fisher"), module)
    shapes = shapes_of(module, curvature.parameters)
    matrix, v = matrix_of(curvature, shapes), vectors(shapes)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    at = dict(zip(shapes, torch.arange(len(matrix)).split(list(sizes.values())), strict=True))
    rows, columns = ("network.3.bias", "network.0.weight"), ("network.2.weight", "network.0.bias")
    found = curvature.matvec(v, rows, columns)
    assert tuple(found) == rows
    part = matrix[torch.cat([at[n] for n in rows])[:, None], torch.cat([at[n] for n in columns])]
    same(flat(found, rows), flat(v, columns) @ part.T)
    whole = curvature.matvec(v, columns=columns)
    assert set(whole) == set(columns)  # by default the rows are those of the columns
    same(flat(curvature.matvec(v, rows=tuple(shapes)), shapes), flat(v, shapes) @ matrix)


@pytest.mark.parametrize("statistics", [Diagonal(), KFAC(), EKFAC()], ids=["diagonal", "kfac", "ekfac"])
def test_blocks_that_do_not_meet_refuse_cross_rows_by_name(statistics):
    module = model(network)
    curvature = collected(statistics, module)
    v = vectors(shapes_of(module, curvature.parameters))
    with pytest.raises(CurvatureError, match=r"no entries between network\.3\.weight and network\.0\.weight") as caught:
        curvature.matvec(v, rows=["network.3.weight"], columns=["network.0.weight"])
    assert "Dense()" in caught.value.hint
    same(
        curvature.matvec(v, rows=["network.0.weight"])["network.0.weight"].dense(),
        curvature.matvec(v)["network.0.weight"].dense(),
    )


@pytest.mark.parametrize("statistics", [KFAC(), EKFAC()], ids=["kfac", "ekfac"])
def test_within_a_layer_weight_and_bias_meet(statistics):
    module = model(network)
    curvature = collected(statistics, module)
    shapes = shapes_of(module, FIRST)
    matrix, v = matrix_of(curvature, shapes), vectors(shapes)
    found = curvature.matvec(v, rows=["network.0.bias"], columns=["network.0.weight"])
    assert tuple(found) == ("network.0.bias",)
    same(found["network.0.bias"].dense(), flat(v, FIRST[:1]) @ matrix[:12, 12:])


@EVERY
def test_what_the_curvature_does_not_know_is_named(statistics):
    module = model(network)
    curvature = collected(statistics, module, parameters=LAST)
    v = vectors(shapes_of(module, [*FIRST, *LAST]))
    for ask in (
        lambda: curvature.matvec(v),
        lambda: curvature.solve(v, Absolute(1.0)),
        lambda: curvature.matvec(v, columns=LAST, rows=FIRST),
    ):
        with pytest.raises(CurvatureError, match=r"holds nothing for 'network\.0\.weight'") as caught:
            ask()
        assert "CurvatureSnapshot(parameters=...)" in caught.value.hint


def test_a_part_of_a_block_cannot_be_inverted():
    module = model(network)
    v = vectors(shapes_of(module, ["network.3.weight"]))
    for statistics in (KFAC(), EKFAC(), Dense("fisher")):
        curvature = collected(statistics, module, parameters=LAST)
        with pytest.raises(CurvatureError, match="only a part of it is asked for") as caught:
            curvature.solve(v, Absolute(1.0))
        assert "gradients of network.3.bias too" in str(caught.value)
        assert "network.3.weight" in curvature.matvec(v)  # a product takes it as zero
    collected(Diagonal(), module, parameters=LAST).solve(v, Absolute(1.0))


# Samples


def test_a_seeded_part_of_the_training_set():
    module = model(network)
    part = evidence(module, DATA, labels="exact", at_most=6, seed=4, batch_size=4)
    assert part.num_samples == 6
    matrix = matrix_of(Dense("fisher").collect(part), shapes_of(module, part.selection.names))
    of_each = reference.fisher(module, every_label, singles(DATA), list(part.selection.names))
    drawn = sorted(torch.randperm(10, generator=torch.Generator().manual_seed(4))[:6].tolist())
    same(matrix, of_each[drawn].mean(0))
    assert evidence(module, DATA, at_most=60).num_samples == 10


def test_a_sample_that_is_not_finite_is_named():
    inputs = draws(10, 3)
    inputs[6, 1] = torch.nan
    for statistics in (Diagonal(), EKFAC(), Dense("fisher")):
        with pytest.raises(CaptureError, match=r"NaN or infinite, in samples 4 to 7 of the training set") as caught:
            collected(statistics, dataset=classified(inputs))
        assert "places 2 of the batch" in str(caught.value)


@pytest.mark.parametrize("statistics", [Dense("fisher"), Diagonal(), KFAC(), EKFAC()], ids=lambda s: s.name)
def test_the_order_of_the_samples_does_not_matter(statistics):
    module = model(network)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    turned = torch.utils.data.TensorDataset(*(tensor[order] for tensor in DATA.tensors))
    shapes = shapes_of(module, [name for name, _ in module.named_parameters()])
    same(
        matrix_of(collected(statistics, module, turned, batch_size=3), shapes),
        matrix_of(collected(statistics, module), shapes),
    )


def test_single_precision_is_kept_and_summed_in_double():
    module = model(network).float()
    inputs, labels = draws(10, 3).float(), integers(3, 10, seed=9)
    for statistics in (Dense("fisher"), Diagonal(), KFAC(), EKFAC()):
        curvature = collected(statistics, module, torch.utils.data.TensorDataset(inputs, labels))
        exact = collected(statistics)
        shapes = shapes_of(module, exact.parameters)
        for name, tensor in curvature.state()[0].items():
            assert tensor.dtype == torch.float32, name
        error = matrix_of(curvature, shapes) - matrix_of(exact, shapes)
        assert float(error.norm()) < 1e-5 * float(matrix_of(exact, shapes).norm())


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_the_matrix_of_a_model_in_half_precision_is_held_in_single(matrix):
    module = model(network).bfloat16()
    inputs, labels = draws(10, 3).bfloat16(), integers(3, 10, seed=9)
    curvature = collected(Dense(matrix), module, torch.utils.data.TensorDataset(inputs, labels))
    assert {tensor.dtype for tensor in curvature.state()[0].values()} == {torch.float32}
