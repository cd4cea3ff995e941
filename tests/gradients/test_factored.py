"""Factors: groups of them in one block, and a capture that keeps them whatever they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.gradients import (
    Dense,
    Factored,
    GradientBlock,
    GradientCapture,
    LayerCall,
    cat,
    gradient_rule,
    pack,
    select,
    unpack,
)
from lightning_influence.gradients import blocks as blocks_room
from lightning_influence.gradients.rules import call as registry
from tests.reference import per_sample_gradients

EXACT = {"rtol": 1e-10, "atol": 1e-12}
B = 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape) + seed))


def grouped(samples: int = 3, length: int = 4, groups: int = 2, *, seed: int = 0) -> Factored:
    """A block of a parameter (6, 5, 2) of any number of groups that divides 6."""
    inputs, grads = normal(samples, length, groups * 10, seed=seed), normal(samples, length, 6, seed=seed + 1)
    return Factored(inputs, grads, (6, 5, 2), groups)


# groups


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_every_group_is_a_weight_of_its_own(groups: int) -> None:
    block, high = grouped(groups=groups), 6 // groups
    dense = block.dense()
    for g in range(groups):
        mine = slice(g * high, (g + 1) * high)
        for n in range(block.num_samples):
            expected = sum(
                torch.outer(block.output_grads[n, t, mine], block.inputs[n, t, g * 10 : (g + 1) * 10]) for t in range(4)
            )
            torch.testing.assert_close(dense[n, mine].flatten(1), expected, **EXACT)
    torch.testing.assert_close(block.sum(), dense.sum(0), **EXACT)
    assert block.shape == (6, 5, 2) and block.groups == groups


def test_groups_stay_through_every_operation() -> None:
    block = grouped()
    kept: dict[str, GradientBlock] = {
        "select": block.select(torch.tensor([2, 0])),
        "scaled": block.scaled(torch.tensor([1.0, 2.0, 3.0])),
        "to": block.to(dtype=torch.float32),
        "plus": block.plus(grouped(length=2, seed=5)),
        "cat": cat([{"w": block}, {"w": grouped(length=7)}])["w"],
        "unpack": unpack(pack({"w": block}))["w"],
    }
    for name, found in kept.items():
        assert isinstance(found, Factored) and found.groups == 2, name
    assert kept["plus"].inputs.shape[1] == 6  # type: ignore[attr-defined]


def test_blocks_of_different_groups_meet_in_dense_form() -> None:
    a, b = grouped(groups=2), grouped(groups=3, seed=5)
    flat_a, flat_b = a.dense().flatten(1), b.dense().flatten(1)
    together, joined = a.plus(b), cat([{"w": a}, {"w": b}])["w"]
    assert isinstance(together, Dense) and isinstance(joined, Dense)
    torch.testing.assert_close(together.dense(), a.dense() + b.dense(), **EXACT)
    torch.testing.assert_close(joined.dense(), torch.cat([a.dense(), b.dense()]), **EXACT)
    torch.testing.assert_close(a.inner(b), flat_b @ flat_a.T, **EXACT)
    torch.testing.assert_close(a.pairwise(b), (flat_a * flat_b).sum(1), **EXACT)


def test_products_of_groups_are_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = grouped(7), grouped(7, length=3, seed=5)
    flat_a, flat_b = a.dense().flatten(1), b.dense().flatten(1)
    monkeypatch.setattr(blocks_room, "CHUNK_ELEMENTS", 130)  # two samples at a time
    torch.testing.assert_close(a.inner(b), flat_b @ flat_a.T, **EXACT)
    torch.testing.assert_close(a.pairwise(b), (flat_a * flat_b).sum(1), **EXACT)
    torch.testing.assert_close(a.norm(), flat_a.norm(dim=1), **EXACT)


def test_stores_without_groups_are_read_and_written_as_before() -> None:
    plain = Factored(normal(2, 3, 4), normal(2, 3, 5))
    assert set(plain.tensors()) == {"inputs", "output_grads", "shape"}
    back = Factored.from_tensors(plain.tensors())
    assert back.groups == 1 and torch.equal(back.dense(), plain.dense())
    again = Factored.from_tensors(grouped().tensors())
    assert again.groups == 2 and torch.equal(again.dense(), grouped().dense())


def test_the_smaller_form_counts_what_is_outside_of_the_groups() -> None:
    # (6, 10) per sample is 60 numbers; one position holds 2·10 + 6 = 26
    assert isinstance(grouped(length=2).compact(), Factored)
    assert isinstance(grouped(length=3).compact(), Dense)
    torch.testing.assert_close(grouped(length=3).compact().dense(), grouped(length=3).dense(), **EXACT)
    dense = Dense(normal(2, 3))
    assert dense.compact() is dense


@pytest.mark.parametrize(
    ("width", "height", "shape", "groups"),
    [(5, 4, None, 2), (4, 5, None, 2), (4, 4, (4, 4), 2), (4, 4, (2, 2), 2), (4, 4, None, 0)],
)
def test_factors_that_do_not_fall_into_groups_are_refused(
    width: int, height: int, shape: tuple[int, ...] | None, groups: int
) -> None:
    with pytest.raises(ValueError, match="group"):
        Factored(normal(2, 3, width), normal(2, 3, height), shape, groups)


# a capture that keeps the factors


def capture_of(module: nn.Module, *args: Tensor, factored: bool) -> dict[str, GradientBlock]:
    with GradientCapture(select(module, "*"), factored=factored) as capture:
        capture.begin(len(args[0]))
        capture.backward(torch.sin(module(*args)).sum())
        return capture.collect()


def check(module: nn.Module, *args: Tensor) -> dict[str, GradientBlock]:
    """With factors and without: the truth of one sample at a time."""
    module = module.double()
    samples = [tuple(a[n : n + 1] for a in args) for n in range(len(args[0]))]
    truth = per_sample_gradients(module, lambda m, s: torch.sin(m(*s)).sum(), samples)
    for factored in (False, True):
        found = capture_of(module, *args, factored=factored)
        for name, expected in truth.items():
            torch.testing.assert_close(found[name].dense(), expected, **EXACT)
    return found


def is_factored(block: GradientBlock, positions: int, groups: int = 1) -> bool:
    return isinstance(block, Factored) and block.inputs.shape[1] == positions and block.groups == groups


def test_linear_keeps_its_factors() -> None:
    found = check(nn.Linear(3, 2), normal(B, 9, 3))
    assert is_factored(found["weight"], 9) and isinstance(found["bias"], Dense)
    assert isinstance(capture_of(nn.Linear(3, 2).double(), normal(B, 9, 3), factored=False)["weight"], Dense)
    assert is_factored(check(nn.Linear(3, 2), normal(B, 3))["weight"], 1)


def test_the_transposed_linear_of_transformers_keeps_its_factors() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    found = check(conv1d(2, 3), normal(B, 9, 3))["weight"]
    assert is_factored(found, 9) and found.output_grads.shape[2] == 3  # type: ignore[attr-defined]


CONVOLUTIONS: list[tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = [
    (lambda: nn.Conv1d(4, 6, 3), (4, 9), 7, 1),
    (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2, bias=False), (4, 8), 5, 2),
    (lambda: nn.Conv1d(4, 8, 3, groups=4, padding="same", padding_mode="circular"), (4, 6), 6, 4),
    (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 2), dilation=(2, 1)), (4, 7, 6), 45, 1),
    (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), (4, 5, 6), 30, 2),
    (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=(2, 1), padding=1), (4, 5, 6), 18, 4),
    (lambda: nn.Conv2d(4, 4, 5, groups=4, bias=False), (4, 6, 5), 2, 4),
    (lambda: nn.Conv3d(2, 4, (2, 1, 3), groups=2, padding="same", padding_mode="replicate"), (2, 3, 4, 3), 36, 2),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=range(len(CONVOLUTIONS)))
def test_convolutions_keep_their_windows(
    case: tuple[Callable[[], nn.Module], tuple[int, ...], int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape, positions, groups = case
    assert is_factored(check(make(), normal(B, *shape))["weight"], positions, groups)
    if groups > 1:
        assert isinstance(capture_of(make().double(), normal(B, *shape), factored=False)["weight"], Dense)


def test_a_convolution_never_lays_out_all_its_windows_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_room, "CHUNK_ELEMENTS", 64)  # a few samples at a time
    made: list[int] = []
    bmm = torch.bmm

    def counting(a: Tensor, b: Tensor) -> Tensor:
        made.append(b.numel())
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", counting)
    layer, x = nn.Conv1d(2, 2, 3, bias=False).double(), normal(B, 2, 9)
    capture_of(layer, x, factored=False)
    assert len(made) == B and max(made) <= 64
    assert is_factored(capture_of(layer, x, factored=True)["weight"], 7)
    assert len(made) == B


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer(x)
        return self.layer(torch.relu(first[:, :4] if x.dim() == 3 else first))  # type: ignore[no-any-return]


def test_a_layer_that_is_called_twice_has_the_positions_of_both_calls() -> None:
    assert is_factored(check(Twice(nn.Linear(3, 3)), normal(B, 9, 3))["layer.weight"], 9 + 4)
    depthwise = nn.Conv1d(4, 4, 3, padding="same", groups=4)
    assert is_factored(check(Twice(depthwise), normal(B, 4, 6))["layer.weight"], 12, 4)
    compacted = capture_of(Twice(nn.Linear(8, 8)).double(), normal(B, 3, 8), factored=False)["layer.weight"]
    assert isinstance(compacted, Dense)  # 3 positions would stay in factors, 3 + 3 do not


def test_functional_uses_keep_their_factors_and_a_tied_look_up_does_not() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(7, 3), nn.Linear(3, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(F.linear(self.embed(tokens), self.mix.weight, self.mix.bias), self.embed.weight)

    tokens = torch.randint(0, 7, (B, 4), generator=torch.Generator().manual_seed(0))
    found = check(Tied(), tokens)
    assert is_factored(found["mix.weight"], 4) and isinstance(found["embed.weight"], Dense)


def test_a_rule_of_the_users_own_is_told_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) / 2

    told: list[bool] = []
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))

    @gradient_rule(Half)
    def half(call: LayerCall) -> dict[str, Any]:
        told.append(call.factored)
        return {"weight": Factored(call.input, call.output_grad / 2)}

    found = check(Half(3, 2, bias=False), normal(B, 9, 3))
    assert told == [False, True] and is_factored(found["weight"], 9)


def test_a_backward_inside_autocast_gives_what_one_outside_gives() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(8, 8), normal(B, 6, 8).float()
    found = []
    for inside in (False, True):
        with GradientCapture(select(module, "*")) as capture:
            capture.begin(B)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                total = module(x).float().square().sum()
                if inside:
                    capture.backward(total)
            if not inside:
                capture.backward(total)
            found.append(capture.collect()["weight"].dense())
    assert torch.equal(found[0], found[1])
