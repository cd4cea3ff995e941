"""Target parameters K: budgets by hand, whole rows first, masks that fit their own model only, shares in words."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_influence.errors import CaptureError
from lightning_influence.gradients import Dense, Factored, LayerShare, TargetParameters, chosen_units
from lightning_influence.gradients.target import unit_layers


class Small(nn.Module):
    """An embedding, a Linear, a convolution without a bias, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv = nn.Embedding(5, 3), nn.Conv2d(2, 3, (1, 2), bias=False)
        self.hidden, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)


def falling(*order: int) -> Tensor:
    """Importance that puts the units in this order."""
    values = torch.zeros(len(order))
    values[torch.tensor(order)] = torch.arange(len(order), 0, -1).float()
    return values


def test_budgets_by_hand() -> None:
    target = chosen_units(Small(), 0.4, {"hidden": falling(2, 0, 1, 3), "conv": falling(1, 2, 0)}, {"rule": "mine"})
    # Linear: 16 entries, rows of 3 + 1, so 6 entries: row 2 with its bias and two weights of row 0.
    assert target.masks["hidden.weight"].int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert target.masks["hidden.bias"].int().tolist() == [0, 0, 1, 0]
    # Convolution: 12 entries, rows of 2 x 1 x 2, so 4 entries: row 1.
    assert target.masks["conv.weight"].int().tolist() == [
        [[[0, 0]], [[0, 0]]],
        [[[1, 1]], [[1, 1]]],
        [[[0, 0]], [[0, 0]]],
    ]
    assert target.names == ("conv.weight", "hidden.weight", "hidden.bias")  # as the module has them
    assert (target.size, target.total) == (10, 15 + 12 + 16 + 8) and target.ratio == 10 / 51
    assert target.origin == {"rule": "mine"}
    assert target.shares() == [LayerShare("conv", 4, 12, 1, 3), LayerShare("hidden", 6, 16, 1, 4)]
    assert str(target).splitlines() == [
        "target parameters: 10 of 51 (19.61%), mine",
        "  layer   selected / total  whole rows",
        "  conv              4 / 12       1 / 3",
        "  hidden            6 / 16       1 / 4",
    ]


def test_less_than_a_row_goes_to_its_first_weights() -> None:
    target = chosen_units(nn.Sequential(nn.Conv1d(2, 2, 2)), 0.2, lambda layer: falling(1, 0), {})
    assert target.names == ("0.weight",)  # 2 of 10
    assert target.masks["0.weight"].int().tolist() == [[[0, 0], [0, 0]], [[1, 1], [0, 0]]]


def test_equals_go_by_index() -> None:
    target = chosen_units(nn.Sequential(nn.Linear(1, 5, bias=False)), 0.6, {"0": torch.tensor([1.0, 2, 1, 2, 1])}, {})
    assert target.masks["0.weight"].flatten().tolist() == [True, True, False, True, False]


def test_the_ratio_is_the_decimal_number_that_was_written() -> None:
    assert int(0.29 * 100) == 28
    target = chosen_units(nn.Sequential(nn.Linear(10, 10, bias=False)), 0.29, lambda layer: torch.ones(10), {})
    assert target.size == 29


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 7),
    bias=st.booleans(),
    kernel=st.none() | st.integers(1, 3),
    ratio=st.decimals("0.001", "0.999", places=3),
    seed=st.integers(0, 99),
)
def test_budgets(inputs: int, outputs: int, bias: bool, kernel: int | None, ratio: Decimal, seed: int) -> None:
    layer = nn.Linear(inputs, outputs, bias) if kernel is None else nn.Conv1d(inputs, outputs, kernel, bias=bias)
    importance = torch.randint(0, 4, (outputs,), generator=torch.Generator().manual_seed(seed))
    size = sum(p.numel() for p in layer.parameters())
    budget = int(ratio * size)
    if budget == 0:
        with pytest.raises(CaptureError, match="selects nothing in layer '0'") as caught:
            chosen_units(nn.Sequential(layer), float(ratio), {"0": importance}, {})
        if least := re.search(r"pass ratio=([\d.e-]+) or more", str(caught.value)):
            assert chosen_units(nn.Sequential(layer), float(least[1]), {"0": importance}, {}).size == 1
        else:
            assert size == 1
        return
    target = chosen_units(nn.Sequential(layer), float(ratio), {"0": importance}, {})
    rows = [torch.zeros(outputs, p[0].numel(), dtype=torch.bool) for p in layer.parameters()]
    for name, mask in target.masks.items():
        rows[name != "0.weight"] = mask.reshape(outputs, -1)
    entries = torch.cat(rows, 1).tolist()  # each row's weights, then its bias: taken from the left, best row first
    expected, left = {}, budget
    for unit in sorted(range(outputs), key=lambda unit: (-int(importance[unit]), unit)):
        taken = min(left, len(entries[0]))
        expected[unit], left = [True] * taken + [False] * (len(entries[0]) - taken), left - taken
    assert entries == [expected[unit] for unit in range(outputs)]
    assert target.size == budget == target.shares()[0].selected
    assert target.shares()[0].whole_rows == budget // len(entries[0])
    assert 0 < target.size < target.total


def test_which_layers_have_units() -> None:
    model = Small()
    assert list(unit_layers(model)) == ["conv", "hidden"]
    model.hidden.bias.requires_grad_(False)
    assert list(unit_layers(model)["hidden"]) == ["hidden.weight"]
    half = chosen_units(model, 0.5, lambda layer: torch.ones(len(model.get_parameter(f"{layer}.weight"))), {})
    assert half.masks["hidden.weight"].int().sum() == 6 and "hidden.bias" not in half.shapes
    assert half.shares()[1] == LayerShare("hidden", 6, 12, 2, 4)
    model.hidden.requires_grad_(False)
    assert list(unit_layers(model)) == ["conv"]

    class Own(nn.Linear):
        pass

    tied = nn.Sequential(nn.Embedding(3, 4), Own(4, 3), Own(4, 3), nn.ConvTranspose1d(3, 3, 1))
    tied[1].weight = tied[0].weight
    tied[2].weight = tied[0].weight
    assert {layer: list(own) for layer, own in unit_layers(tied).items()} == {"1": ["0.weight", "1.bias"]}
    target = chosen_units(tied, 0.4, {"1": falling(2, 1, 0)}, {})  # 6 of 15
    assert target.masks["0.weight"].int().tolist() == [[0] * 4, [1, 0, 0, 0], [1] * 4]
    assert target.masks["1.bias"].int().tolist() == [0, 0, 1]


def random_masks(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.rand(p.shape, generator=draw) < 0.4 for name, p in model.named_parameters()}


def test_explicit_masks() -> None:
    model = Small()
    masks = {**random_masks(model), "norm.bias": torch.zeros(4, dtype=torch.bool)}
    target = TargetParameters.of(model, dict(reversed(masks.items())))
    names = [name for name, _ in model.named_parameters() if name != "norm.bias"]
    assert target.names == tuple(names) and target.origin == {"rule": "masks"}
    assert all(torch.equal(target.masks[name], masks[name]) for name in names)
    first = masks[names[0]].clone()
    masks[names[0]].logical_not_()
    assert torch.equal(target.masks[names[0]], first)  # its own
    words = next(share for share in target.shares() if share.layer == "words")
    assert words == LayerShare("words", int(target.masks["words.weight"].sum()), 15, int(first.all(1).sum()), 5)


def test_everything() -> None:
    model = Small()
    model.words.requires_grad_(False)
    target = TargetParameters.everything(model)
    assert target.names == tuple(name for name, p in model.named_parameters() if p.requires_grad)
    assert target.size == target.total == 36 and target.ratio == 1.0
    assert all(share.selected == share.total and share.whole_rows == share.rows for share in target.shares())
    alone = TargetParameters.everything(nn.Linear(2, 1))
    assert alone.shares() == [LayerShare("", 3, 3, 1, 1)] and "(the model)" in str(alone)


def test_shares_of_scalars_and_parameters_of_other_lengths() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.rows = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(3, 2))

    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.scale = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(()))

    assert TargetParameters.everything(Odd()).shares() == [LayerShare("", 7, 7, 1, 1)]
    assert TargetParameters.everything(Even()).shares() == [LayerShare("", 7, 7, 3, 3)]


def test_gradients_are_restricted() -> None:
    model = Small()
    masks = random_masks(model)
    del masks["words.weight"]
    target = TargetParameters.of(model, masks)
    draw = torch.Generator().manual_seed(1)
    dense = {n: torch.randn(2, *p.shape, generator=draw, dtype=torch.float64) for n, p in model.named_parameters()}
    gradients: dict[str, Any] = {name: Dense(value) for name, value in dense.items()}
    factored = Factored(torch.ones(2, 1, 3).double(), torch.randn(2, 1, 4, generator=draw).double())
    gradients["hidden.weight"], dense["hidden.weight"] = factored, factored.dense()
    found = target.restricted(gradients)
    assert tuple(found) == target.names and "words.weight" not in found
    for name, block in found.items():
        assert isinstance(block, Dense) and torch.equal(block.values, torch.where(masks[name], dense[name], 0.0))
    del gradients["norm.bias"]
    with pytest.raises(CaptureError, match=r"(?s)do not fit these gradients.*'norm.bias'.*no such parameter"):
        target.restricted(gradients)


def test_laid_flat_in_any_order() -> None:
    model = Small()
    masks = random_masks(model)
    masks["hidden.bias"] = torch.zeros(4, dtype=torch.bool)
    target = TargetParameters.of(model, masks)
    shapes = dict(reversed(target.shapes.items()))
    flat = target.flat(shapes)
    assert torch.equal(flat, torch.cat([masks[name].flatten() for name in shapes]))
    assert flat.shape == (target.total,) and int(flat.sum()) == target.size
    with pytest.raises(CaptureError, match=r"(?s)do not fit this layout.*'words.weight'.*\(5, 3\).*no such parameter"):
        target.flat({name: shape for name, shape in shapes.items() if name != "words.weight"})
    assert "hidden.bias" not in target.names
    assert target.flat({name: shape for name, shape in shapes.items() if name != "hidden.bias"}).sum() == target.size


def test_what_is_trained_now_is_compared_both_ways() -> None:
    model = Small()
    target = TargetParameters.of(model, {"hidden.bias": torch.ones(4, dtype=torch.bool)})
    target.check_trained(list(target.shapes))
    with pytest.raises(CaptureError, match=r"(?s)found: words\.weight, norm\.bias frozen and other trained.*choose K"):
        target.check_trained([name for name in target.shapes if name not in ("words.weight", "norm.bias")] + ["other"])


def test_another_model_is_recognised() -> None:
    target = chosen_units(Small(), 0.5, lambda layer: torch.arange(4 if layer == "hidden" else 3), {})
    shapes = {name: tuple(p.shape) for name, p in Small().named_parameters()}
    target.check({**shapes, "frozen": (3,)})
    with pytest.raises(CaptureError, match=r"(?s)'norm.weight' differs.*shape \(4,\).*shape \(5,\).*HINT"):
        target.check({**shapes, "norm.weight": (5,)})
    del shapes["words.weight"]
    with pytest.raises(CaptureError, match=r"(?s)'words.weight' differs.*shape \(5, 3\).*no such parameter.*HINT"):
        target.check(shapes)


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        ({"hidden.wieght": torch.ones(4, 3).bool()}, "'hidden.wieght' differs.*no such parameter"),
        ({"words.weight": torch.ones(5, 3).bool()}, "'words.weight' differs.*no such parameter"),  # frozen
        ({"hidden.weight": torch.ones(3, 4).bool()}, r"'hidden.weight' differs.*shape \(3, 4\).*shape \(4, 3\)"),
        ({"hidden.weight": torch.ones(4, 3)}, "'hidden.weight'.*bool.*float32"),
        ({"hidden.weight": [[True] * 3] * 4}, "'hidden.weight'.*bool.*list"),
        ({"hidden.bias": torch.zeros(4).bool()}, "no target parameters.*at least one entry.*none"),
        ({}, "no target parameters"),
    ],
)
def test_masks_that_are_refused(masks: Any, match: str) -> None:
    model = Small()
    model.words.requires_grad_(False)
    with pytest.raises(CaptureError, match=f"(?s){match}.*HINT"):
        TargetParameters.of(model, masks)


@pytest.mark.parametrize("ratio", [0, 1, 1.0, -0.1, 1.5, float("nan"), True, "0.5", None])
def test_ratios_that_are_refused(ratio: Any) -> None:
    with pytest.raises(CaptureError, match=r"(?s)ratio.*HINT.*TargetParameters.everything\(module\)"):
        chosen_units(Small(), ratio, lambda layer: torch.ones(3), {})


@pytest.mark.parametrize(
    ("importance", "match"),
    [
        ({"conv": torch.ones(3)}, "'hidden'.*not one number for each.*4 numbers.*nothing"),
        ({"conv": torch.ones(4), "hidden": torch.ones(4)}, r"'conv'.*3 numbers.*shape \(4,\)"),
        ({"conv": torch.ones(3, 1), "hidden": torch.ones(4)}, r"'conv'.*shape \(3, 1\)"),
        ({"conv": torch.tensor([1.0, float("nan"), 2]), "hidden": torch.ones(4)}, "'conv' is NaN"),
    ],
)
def test_importance_that_is_refused(importance: dict[str, Tensor], match: str) -> None:
    with pytest.raises(CaptureError, match=f"(?s){match}.*HINT"):
        chosen_units(Small(), 0.5, importance, {})


def test_models_without_units_are_refused() -> None:
    for model in (nn.ReLU(), nn.Embedding(3, 3), nn.Linear(3, 3).requires_grad_(False), nn.ConvTranspose2d(2, 2, 2)):
        with pytest.raises(CaptureError, match=r"(?s)no layer whose units.*HINT"):
            chosen_units(model, 0.5, {}, {})
    with pytest.raises(CaptureError, match=r"(?s)no target parameters.*without trained parameters"):
        TargetParameters.everything(nn.Linear(3, 3).requires_grad_(False))


def test_a_budget_of_nothing_names_the_smallest_layer() -> None:
    with pytest.raises(CaptureError, match=r"(?s)nothing in layer 'conv'.*0.05 of 12.*ratio=0.0834 or more.*freeze"):
        chosen_units(Small(), 0.05, lambda layer: torch.ones(4 if layer == "hidden" else 3), {})
    with pytest.raises(CaptureError, match=r"(?s)nothing in layer '0'.*1 entry.*HINT: freeze the layer"):
        chosen_units(nn.Sequential(nn.Linear(1, 1, bias=False)), 0.9, lambda layer: torch.ones(1), {})


def test_choosing_leaves_no_trace() -> None:
    model = Small()
    before, random = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    target = chosen_units(model, 0.5, lambda layer: torch.ones(4 if layer == "hidden" else 3), {})
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(mask.dtype == torch.bool and mask.device.type == "cpu" for mask in target.masks.values())
