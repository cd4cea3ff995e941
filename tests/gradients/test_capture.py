"""GradientCapture on whole models: what passes through a forward and a backward is captured, nothing is disturbed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_influence.errors import CaptureError
from lightning_influence.gradients import GradientBlock, GradientCapture, Gradients, Rows, cat, select
from tests.reference import per_sample_gradients

EXACT = {"rtol": 1e-10, "atol": 1e-12}
V, D, T, B, CLASSES = 13, 8, 6, 5, 3


def batch(size: int = B, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, V, (size, T), generator=source)
    tokens[0, T - 2 :] = 0  # padding
    return tokens, torch.randint(0, CLASSES, (size,), generator=source)


def loss(module: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    tokens, labels = data
    return F.cross_entropy(module(tokens), labels, reduction="sum")


class Text(nn.Module):
    """A small classifier of padded token sequences; ``body`` says what lies between look-up and head."""

    def __init__(self, body: Callable[[Text, Tensor, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D, padding_idx=0)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head = nn.Linear(D, CLASSES)
        self.body = body
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self, self.embed(tokens), tokens == 0).mean(1))  # type: ignore[no-any-return]


def capture_of(
    module: nn.Module, data: Any, parameters: str = "*", functional: bool = True
) -> dict[str, GradientBlock]:
    with GradientCapture(select(module, parameters), functional=functional) as capture:
        capture.begin(len(data[0]))
        capture.backward(loss(module, data))
        return capture.collect()


def truth_of(module: nn.Module, data: Any, names: Any = None) -> dict[str, Tensor]:
    singles = [(data[0][n : n + 1], data[1][n : n + 1]) for n in range(len(data[0]))]
    return per_sample_gradients(module, loss, singles, names)


def check(module: nn.Module, parameters: str = "*", data: Any = None) -> dict[str, GradientBlock]:
    data = data or batch()
    found = capture_of(module, data, parameters)
    truth = truth_of(module, data, list(found))
    for name, expected in truth.items():
        torch.testing.assert_close(found[name].dense(), expected, **EXACT)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    return found


def twice(self: Text, h: Tensor, padding: Tensor) -> Tensor:
    return self.mix(torch.relu(self.mix(h)))  # type: ignore[operator]


def in_place(self: Text, h: Tensor, padding: Tensor) -> Tensor:
    return F.relu_(self.mix(h))  # type: ignore[operator]


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True, **options)


def encoded(self: Text, h: Tensor, padding: Tensor) -> Tensor:
    return self.mix(h, src_key_padding_mask=padding)  # type: ignore[operator]


MODELS: dict[str, Callable[[], Text]] = {
    "plain": lambda: Text(lambda self, h, padding: h),
    "in-place ReLU after a Linear on 3-D input": lambda: Text(in_place, mix=nn.Linear(D, D)),
    "module called twice": lambda: Text(twice, mix=nn.Linear(D, D)),
    "in-place module after LayerNorm": lambda: Text(
        lambda self, h, padding: self.mix(h), mix=nn.Sequential(nn.LayerNorm(D), nn.ReLU(inplace=True), nn.Linear(D, D))
    ),
    "convolution": lambda: Text(
        lambda self, h, padding: self.mix(h.transpose(1, 2)).transpose(1, 2), mix=nn.Conv1d(D, D, 3, padding="same")
    ),
    "encoder layer": lambda: Text(encoded, mix=encoder()),
    "encoder layer, norm first, gelu": lambda: Text(encoded, mix=encoder(norm_first=True, activation="gelu")),
    "encoder": lambda: Text(encoded, mix=nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=False)),
    "encoder with nested tensors": lambda: Text(encoded, mix=nn.TransformerEncoder(encoder(), 2)),
    "LSTM": lambda: Text(lambda self, h, padding: self.mix(h)[0], mix=nn.LSTM(D, D, batch_first=True)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_the_gradient_of_its_own_sample(name: str, training: bool) -> None:
    check(MODELS[name]().train(training))


@pytest.mark.parametrize("name", MODELS)
def test_frozen_models_are_captured_too(name: str) -> None:
    for training in (True, False):  # in eval mode with everything frozen the encoder would take its fused path
        module = MODELS[name]().train(training).requires_grad_(False)
        found = check(module, "word_embeddings")
        assert list(found) == ["embed.weight"] and isinstance(found["embed.weight"], Rows)
        assert not module.embed.weight.requires_grad
        check(module)


def test_a_frozen_layer_in_the_middle() -> None:
    module = MODELS["encoder layer"]()
    module.mix.requires_grad_(False)
    check(module)
    assert set(capture_of(module, batch(), "all")) == {"embed.weight", "head.weight", "head.bias"}


@pytest.mark.parametrize("size", [1, 4, 8])
def test_batch_size_changes_nothing(size: int) -> None:
    module, data = MODELS["encoder layer"](), batch(11)
    whole: Gradients = capture_of(module, data)
    parts = [capture_of(module, (data[0][s : s + size], data[1][s : s + size])) for s in range(0, 11, size)]
    joined = cat(parts)  # the last part is shorter
    for name, block in whole.items():
        assert joined[name].num_samples == 11
        torch.testing.assert_close(joined[name].dense(), block.dense(), **EXACT)


def test_the_users_own_backward_serves_as_well_and_training_is_bit_identical() -> None:
    def train(capturing: bool) -> tuple[list[Tensor], list[Gradients]]:
        module, rows = MODELS["encoder layer"](), []
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        capture = GradientCapture(select(module, "*"))
        for step in range(3):
            if capturing:
                capture.attach()
                capture.begin(B)
            optimizer.zero_grad()
            loss(module, batch(seed=step)).backward()
            optimizer.step()
            if capturing:
                rows.append(capture.collect())
                capture.detach()
            else:
                rows.append({})
        return [parameter.detach() for parameter in module.parameters()], rows

    with_capture, rows = train(True)
    without, _ = train(False)
    assert all(torch.equal(a, b) for a, b in zip(with_capture, without, strict=True))
    truth = truth_of(MODELS["encoder layer"](), batch(seed=0))
    for name, expected in truth.items():
        torch.testing.assert_close(rows[0][name].dense(), expected, **EXACT)


def test_existing_gradients_are_left_as_they_are() -> None:
    module = MODELS["encoder layer"]()
    loss(module, batch(seed=3)).backward()
    before = {name: (parameter.grad, parameter.grad.clone()) for name, parameter in module.named_parameters()}  # type: ignore[union-attr]
    capture_of(module, batch())
    for name, parameter in module.named_parameters():
        assert parameter.grad is before[name][0] and torch.equal(parameter.grad, before[name][1])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("own_backward", [True, False])
def test_activation_checkpointing(reentrant: bool, own_backward: bool) -> None:
    def body(self: Text, h: Tensor, padding: Tensor) -> Tensor:
        return checkpoint(self.mix, h, use_reentrant=reentrant)  # type: ignore[no-any-return]

    module = Text(body, mix=nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True), nn.LayerNorm(D)))
    data = batch()
    truth = truth_of(module, data)
    kept = torch.ones_like(module.head.weight)
    module.head.weight.grad = kept
    with GradientCapture(select(module, "*")) as capture:
        capture.begin(B)
        total = loss(module, data)
        if own_backward:
            total.backward()
        else:
            capture.backward(total)
        found = capture.collect()
    for name, expected in truth.items():
        torch.testing.assert_close(found[name].dense(), expected, **EXACT)
    if not own_backward:
        assert module.head.weight.grad is kept and torch.equal(kept, torch.ones_like(kept))
        assert all(p.grad is None for name, p in module.named_parameters() if name != "head.weight")


class Tied(nn.Module):
    """A language model whose head is its embedding, as a module or as a function."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.embed, self.mix = way, nn.Embedding(V, D), nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)
        if way == "module":
            self.head.weight = self.embed.weight
        else:
            del self.head
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(tokens)))
        if self.way == "module":
            logits = self.head(h)
        elif self.way == "function":
            logits = F.linear(h, self.embed.weight)
        else:
            logits = h @ self.embed.weight.T
        return logits.mean(1)[:, :CLASSES]  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["module", "function"])
def test_a_tied_head_adds_to_the_embeddings_gradient(way: str) -> None:
    module = Tied(way)
    check(module)
    assert not isinstance(capture_of(module, batch())["embed.weight"], Rows)


@pytest.mark.parametrize("way", ["module", "function", "product"])
def test_word_embeddings_take_the_look_ups_only_and_say_so(way: str) -> None:
    module, data = Tied(way), batch()
    selection = select(module, "word_embeddings")
    assert selection.names == ("embed.weight",) and selection.input_only == {"embed.weight"}
    with GradientCapture(selection) as capture:
        capture.begin(B)
        capture.backward(loss(module, data))
        rows = capture.collect()["embed.weight"]
        assert capture.left_out == {"embed.weight": {"T" if way == "product" else "linear"}}
    assert isinstance(rows, Rows)

    def apart(copied: Tied, sample: tuple[Tensor, Tensor]) -> Tensor:
        h = torch.tanh(copied.mix(copied.embed(sample[0])))
        return F.cross_entropy((h @ copied.embed.weight.detach().T).mean(1)[:, :CLASSES], sample[1])

    singles = [(data[0][n : n + 1], data[1][n : n + 1]) for n in range(B)]
    truth = per_sample_gradients(module, apart, singles, ["embed.weight"])["embed.weight"]
    torch.testing.assert_close(rows.dense(), truth, **EXACT)
    again = select(module, list(selection.names), input_only=selection.input_only)
    assert again.input_only == selection.input_only and list(again.layers) == list(selection.layers)


def test_a_use_out_of_reach_is_reported() -> None:
    module = Tied("product")
    with GradientCapture(select(module, "all")) as capture:
        capture.begin(B)
        assert module.embed.weight.shape == (V, D)  # looking at a parameter is no use of it
        capture.backward(loss(module, batch()))
        capture.collect()
        assert capture.left_out == {"embed.weight": {"T"}}


def test_without_the_function_mode_functional_uses_are_missed() -> None:
    module = Tied("function")
    found = capture_of(module, batch(), functional=False)["embed.weight"]
    assert isinstance(found, Rows)
    assert (found.dense() - truth_of(module, batch())["embed.weight"]).abs().max() > 1e-3


class Functional(nn.Module):
    """Every parameter used by a function, none by a module's call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(V, D))
        self.bank = nn.Conv1d(D, D, 3, dilation=2)
        self.weight, self.bias = nn.Parameter(torch.randn(CLASSES, D)), nn.Parameter(torch.randn(CLASSES))
        self.double()

    def step(self, tokens: Tensor) -> Tensor:
        h = F.embedding(tokens, self.table, padding_idx=0).transpose(1, 2)
        h = torch.tanh(F.conv1d(h, self.bank.weight, bias=self.bank.bias, padding="same", dilation=2))
        return F.linear(h.mean(2), self.weight, bias=self.bias)


def test_functions_with_bare_parameters() -> None:
    module, data = Functional(), batch()

    def step_loss(m: Any, sample: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m.step(sample[0]), sample[1], reduction="sum")

    with GradientCapture(select(module, "all")) as capture:
        capture.begin(B)
        capture.backward(step_loss(module, data))
        found = capture.collect()
        assert capture.left_out == {}
    truth = per_sample_gradients(module, step_loss, [(data[0][n : n + 1], data[1][n : n + 1]) for n in range(B)])
    assert set(found) == set(truth)
    for name, expected in truth.items():
        torch.testing.assert_close(found[name].dense(), expected, **EXACT)
    assert isinstance(found["table"], Rows)


def test_a_subclass_of_embedding_is_captured_by_its_look_up() -> None:
    class Scaled(nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) * 3.0

    module = MODELS["plain"]()
    module.embed = Scaled(V, D, padding_idx=0).double()
    assert isinstance(check(module)["embed.weight"], Rows)


def test_outputs_are_captured_when_one_is_made_of_another() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, D))

        def forward(self, h: Tensor) -> dict[str, Any]:
            hidden = torch.sin(h * self.scale)
            return {"hidden": hidden, "pooled": hidden[:, 0] * self.scale, "again": hidden, "number": 3}

    def body(self: Text, h: Tensor, padding: Tensor) -> Tensor:
        out = self.mix(h)  # type: ignore[operator]
        return out["hidden"] + out["pooled"][:, None] + out["again"] ** 2  # type: ignore[no-any-return]

    check(Text(body, mix=Pooled()))


def test_nan_and_infinity_are_refused_by_name() -> None:
    for value in (float("nan"), float("inf")):
        module, (tokens, labels) = MODELS["plain"](), batch()
        tokens[1:] = tokens[1:].clamp_max(V - 2)
        tokens[0, 0] = V - 1
        with torch.no_grad():
            module.embed.weight[V - 1] = value
        with pytest.raises(CaptureError, match=r"'(embed|head)\.weight' is NaN or infinite") as caught:
            capture_of(module, (tokens, labels))
        assert "places 0 of the batch" in str(caught.value)


def test_a_layer_that_never_fired_is_refused() -> None:
    unused = Text(lambda self, h, padding: h, mix=nn.Linear(D, D))
    with pytest.raises(CaptureError, match=r"'mix\.weight' was captured \(nor of 1 more\)") as caught:
        capture_of(unused, batch())
    assert "never called" in str(caught.value)
    idle = Text(lambda self, h, padding: h + 0 * self.mix(h).detach(), mix=nn.Linear(D, D))
    with pytest.raises(CaptureError, match="does not depend on that call"):
        capture_of(idle, batch())
    with GradientCapture(select(idle, "*")) as capture:
        capture.begin(B)
        capture.backward(loss(idle, batch()))
        assert set(capture.collect(require_all=False)) == {"embed.weight", "head.weight", "head.bias"}


def test_a_loss_without_a_graph_is_refused() -> None:
    module = MODELS["plain"]()
    with GradientCapture(select(module, "*")) as capture:
        capture.begin(B)
        with torch.no_grad():
            total = loss(module, batch())
        with pytest.raises(CaptureError, match="does not depend on anything"):
            capture.backward(total)


def test_an_input_that_is_changed_in_place_later_is_refused() -> None:
    def body(self: Text, h: Tensor, padding: Tensor) -> Tensor:
        h = h * 1.0
        out = self.mix(h)  # type: ignore[operator]
        h.mul_(2.0)  # legal for autograd: the frozen layer has not kept its input
        return out + h  # type: ignore[no-any-return]

    module = Text(body, mix=nn.Linear(D, D).requires_grad_(False))
    with pytest.raises(CaptureError, match=r"'mix\.bias', 'mix\.weight' was changed in place"):
        capture_of(module, batch())


def test_hooks_are_gone_after_an_exception_in_the_users_forward() -> None:
    def body(self: Text, h: Tensor, padding: Tensor) -> Tensor:
        raise ZeroDivisionError("user")

    module = Text(body, mix=nn.Linear(D, D))
    with pytest.raises(ZeroDivisionError), GradientCapture(select(module, "*")) as capture:
        capture.begin(B)
        module(batch()[0])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    assert torch.overrides._get_current_function_mode_stack() == []
    capture.detach()  # a second time does no harm


def test_an_exception_inside_a_layer_does_not_confuse_the_next_forward() -> None:
    module, fail = Tied("function"), [True]

    def maybe_fail(layer: nn.Module, args: Any) -> None:
        if fail[0]:
            raise ZeroDivisionError

    module.mix.register_forward_pre_hook(maybe_fail)
    with GradientCapture(select(module, "*")) as capture:
        capture.begin(B)
        with pytest.raises(ZeroDivisionError):
            module(batch()[0])
        fail[0] = False
        capture.begin(B)
        capture.backward(loss(module, batch()))
        found = capture.collect()
    torch.testing.assert_close(found["embed.weight"].dense(), truth_of(module, batch())["embed.weight"], **EXACT)


def test_nothing_is_hooked_outside_a_batch_or_without_gradients() -> None:
    module = MODELS["plain"]()
    with GradientCapture(select(module, "*")) as capture:
        module(batch()[0])
        assert capture.outputs == []
        capture.begin(B)
        with torch.no_grad():
            module(batch()[0])
        assert capture.outputs == []


def test_several_backward_passes_add_up_and_discard_drops_them() -> None:
    module, data = MODELS["encoder layer"](), batch()
    truth = truth_of(module, data)
    with GradientCapture(select(module, "*")) as capture:
        capture.begin(B)
        total = loss(module, data)
        total.backward(retain_graph=True)
        capture.discard()
        (2 * total).backward(retain_graph=True)
        total.backward(retain_graph=True)
        first = capture.collect()
        total.backward()
        second = capture.collect()
    for name, expected in truth.items():
        torch.testing.assert_close(first[name].dense(), 3 * expected, **EXACT)
        torch.testing.assert_close(second[name].dense(), expected, **EXACT)


def test_a_batch_that_was_given_up_leaves_nothing_behind() -> None:
    module = MODELS["encoder layer"]()
    with GradientCapture(select(module, "*")) as capture:
        capture.begin(B)
        stale = loss(module, batch(seed=1))
        capture.begin(B)
        total = loss(module, batch())
        stale.backward()
        capture.backward(total)
        found = capture.collect()
    torch.testing.assert_close(found["head.weight"].dense(), truth_of(module, batch())["head.weight"], **EXACT)


def test_activations_are_let_go_with_the_users_graph() -> None:
    module = Text(in_place, mix=nn.Linear(D, D))
    seen: list[weakref.ref[Tensor]] = []
    module.mix.register_forward_pre_hook(lambda layer, args: seen.append(weakref.ref(args[0])))
    with GradientCapture(select(module, "word_embeddings")) as capture:
        capture.begin(B)
        total = loss(module, batch())
        capture.backward(total)
        capture.collect()
        del total
        gc.collect()
        assert seen[0]() is None


def test_copying_and_saving_a_module_after_capture_works() -> None:
    module = MODELS["encoder layer"]()
    expected = set(module.state_dict())
    capture_of(module, batch())
    assert set(module.state_dict()) == expected
