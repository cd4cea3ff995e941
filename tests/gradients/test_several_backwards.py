"""Several backward passes over one forward, each collected apart from the others."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_influence.errors import CaptureError
from lightning_influence.gradients import GradientBlock, GradientCapture, select

EXACT = {"rtol": 1e-10, "atol": 1e-12}
B, T, V, D, C = 4, 5, 7, 8, 3


class Pair(nn.Module):
    """Two outputs, one made of the other, by a layer that is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, D))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.sin(h * self.scale)
        return hidden, hidden * self.scale


class Net(nn.Module):
    """Look-up, attention, a layer used twice, one of two outputs, a function, and a head of C classes."""

    def __init__(self, checkpointing: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointing = checkpointing
        self.embed, self.pair = nn.Embedding(V, D), Pair()
        self.mix, self.again = nn.TransformerEncoderLayer(D, 2, 16, 0.0, batch_first=True), nn.Linear(D, D)
        self.head = nn.Linear(D, C, bias=False)
        self.double()

    def body(self, h: Tensor) -> Tensor:
        a, b = self.pair(self.again(torch.relu(self.again(self.mix(h)))))
        return a + b  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = self.body(h) if self.checkpointing is None else checkpoint(self.body, h, use_reentrant=self.checkpointing)
        return F.linear(h.mean(1), self.head.weight)  # (B, C)


def tokens() -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))


def same(found: dict[str, GradientBlock], expected: dict[str, GradientBlock]) -> None:
    assert list(found) == list(expected)
    for name, block in expected.items():
        assert type(found[name]) is type(block), name
        torch.testing.assert_close(found[name].dense(), block.dense(), **EXACT)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_every_backward_gives_what_a_run_of_its_own_gives(factored: bool, checkpointing: bool | None) -> None:
    module = Net(checkpointing)
    capture = GradientCapture(select(module, "all"), factored=factored)
    with capture:
        apart = []
        for c in range(C):
            capture.begin(B)
            capture.backward(module(tokens())[:, c].sum())
            apart.append(capture.collect())
        capture.begin(B)
        outputs = module(tokens())
        hooked = len(capture.outputs)
        for c in range(C):
            capture.backward(outputs[:, c].sum(), retain_graph=c < C - 1)
            assert len(capture.outputs) == hooked  # what checkpointing recomputes does not pile up
            same(capture.collect(), apart[c])
            hooked = len(capture.outputs)
    assert capture.outputs == [] and all(parameter.grad is None for parameter in module.parameters())


def test_without_a_collect_in_between_they_add_up() -> None:
    module = Net()
    with GradientCapture(select(module, "all")) as capture:
        capture.begin(B)
        capture.backward(module(tokens()).sum())
        whole = capture.collect()
        capture.begin(B)
        outputs = module(tokens())
        for c in range(C):
            capture.backward(outputs[:, c].sum(), retain_graph=True)
        found = capture.collect()
    for name, block in whole.items():
        torch.testing.assert_close(found[name].dense(), block.dense(), **EXACT)


def test_a_refused_collect_does_not_stop_the_next_backward() -> None:
    module = Net()
    with GradientCapture(select(module, "all")) as capture:
        capture.begin(B)
        outputs = module(tokens())
        capture.backward(outputs.sum() * float("nan"), retain_graph=True)
        with pytest.raises(CaptureError, match="NaN or infinite"):
            capture.collect()
        capture.backward(outputs.sum())
        assert set(capture.collect()) == set(capture.selection.names)


def test_without_retain_graph_there_is_no_second_backward() -> None:
    module = Net()
    with GradientCapture(select(module, "all")) as capture:
        capture.begin(B)
        total = module(tokens()).sum()
        capture.backward(total)
        capture.collect()
        capture.backward(total)  # reaches nothing: the outputs were let go
        with pytest.raises(CaptureError, match="was captured"):
            capture.collect()


@pytest.mark.parametrize("last", ["backward", "begin", "detach"])
def test_a_retained_graph_is_let_go(last: str) -> None:
    module = Net()
    seen: list[weakref.ref[Any]] = []
    module.again.register_forward_pre_hook(lambda layer, args: seen.append(weakref.ref(args[0])))
    with GradientCapture(select(module, "word_embeddings")) as capture:
        capture.begin(B)
        total = module(tokens()).sum()
        capture.backward(total, retain_graph=True)
        capture.collect()
        gc.collect()
        assert seen[0]() is not None
        if last == "backward":
            capture.backward(total)
            capture.collect()
        elif last == "begin":
            capture.begin(B)
        else:
            capture.detach()
        del total
        gc.collect()
        assert seen[0]() is None
