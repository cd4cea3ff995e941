"""The rule for MultiheadAttention against the layer run again one sample at a time, in float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.errors import CaptureError
from lightning_influence.gradients import Dense, Factored, GradientBlock, GradientCapture, select
from lightning_influence.gradients.rules import call as registry
from lightning_influence.gradients.rules.attention import attention_by_sample
from lightning_influence.gradients.rules.fallback import run_again
from tests.reference import per_sample_gradients

attention = importlib.import_module("lightning_influence.gradients.rules.attention")

EXACT = {"rtol": 1e-10, "atol": 1e-12}
B, E, H, T, S = 5, 8, 2, 4, 6
PACKED = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape) + seed))


class Wrapped(nn.Module):
    """A layer whose every output, the attention weights too, counts in the loss."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.layer(*args, **kwargs)
        parts = output if isinstance(output, tuple) else (output,)
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            if part is not None:
                scale = torch.linspace(0.5, 1.5, part[0].numel(), dtype=part.dtype)
                total = total + (torch.sin(3 * part.flatten(1)) * scale).sum()
        return total


def captured(module: nn.Module, args: tuple[Any, ...], **options: Any) -> dict[str, GradientBlock]:
    kwargs = options.pop("kwargs", {})
    with GradientCapture(select(module, options.pop("parameters", "*")), **options) as capture:
        capture.begin(len(args[0]))
        capture.backward(module(*args, **kwargs))
        return {name.removeprefix("layer."): block for name, block in capture.collect().items()}


def by(rule: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], **kwargs: Any) -> dict[str, GradientBlock]:
    """What another rule for the attention finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._RULES, "torch.nn.modules.activation.MultiheadAttention", rule)
        return captured(module, args, kwargs=kwargs)


def check(layer: nn.Module, *args: Any, oracle: Callable[..., Any] = attention_by_sample, **kwargs: Any) -> Any:
    """Both forms of the rule agree with the oracle, and neither runs the layer sample by sample."""
    module = Wrapped(layer).double()
    expected = by(oracle, module, args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "by_sample", None)
        found = [captured(module, args, kwargs=kwargs, factored=factored) for factored in (False, True)]
    for gradients in found:
        assert list(gradients) == list(expected)
        for name, block in expected.items():
            torch.testing.assert_close(gradients[name].dense(), block.dense(), **EXACT)
    assert all(parameter.grad is None for parameter in module.parameters())
    return found[1]


def padding(length: int, *, floating: bool = False) -> Tensor:
    mask = torch.zeros(B, length, dtype=torch.bool)
    mask[1, 3:], mask[2, length - 1 :] = True, True
    return torch.zeros(B, length, dtype=torch.float64).masked_fill(mask, -3.0) if floating else mask


def causal(rows: int, columns: int) -> Tensor:
    return torch.triu(torch.ones(rows, columns, dtype=torch.bool), 1)


MASKS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "none": lambda t, s: {},
    "padding": lambda t, s: {"key_padding_mask": padding(s)},
    "float padding": lambda t, s: {"key_padding_mask": padding(s, floating=True)},
    "shared": lambda t, s: {"attn_mask": causal(t, s)},
    "float shared": lambda t, s: {"attn_mask": normal(t, s)},
    "per head": lambda t, s: {"attn_mask": causal(t, s).expand(B * H, t, s)},
    "float per head": lambda t, s: {"attn_mask": normal(B * H, t, s)},
    "causal": lambda t, s: {"attn_mask": causal(t, s), "is_causal": True},
    "padding and shared": lambda t, s: {"key_padding_mask": padding(s), "attn_mask": causal(t, s)},
    "padding and causal": lambda t, s: {
        "key_padding_mask": padding(s),
        "attn_mask": causal(t, s),
        "is_causal": True,
    },
    "float padding and per head": lambda t, s: {
        "key_padding_mask": padding(s, floating=True),
        "attn_mask": normal(B * H, t, s),
    },
}
RETURNED: dict[str, dict[str, Any]] = {
    "nothing": {"need_weights": False},
    "mean weights": {"need_weights": True},
    "weights of heads": {"need_weights": True, "average_attn_weights": False},
}


def make(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(E, H, batch_first=True, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)  # its biases start at zero
    return layer


@pytest.mark.parametrize("returned", RETURNED)
@pytest.mark.parametrize("mask", MASKS)
def test_self_attention(mask: str, returned: str) -> None:
    x = normal(B, T, E)
    found = check(make(), x, x, x, **MASKS[mask](T, T), **RETURNED[returned])
    assert list(found) == PACKED


@pytest.mark.parametrize("returned", RETURNED)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(T, S), (S, T)])
def test_attention_to_others(mask: str, returned: str, lengths: tuple[int, int]) -> None:
    t, s = lengths
    query, memory = normal(B, t, E), normal(B, s, E, seed=1)
    check(make(), query, memory, memory, **MASKS[mask](t, s), **RETURNED[returned])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bias", [True, False])
def test_keys_and_values_of_their_own_widths(mask: str, bias: bool) -> None:
    layer = make(kdim=5, vdim=3, bias=bias)
    found = check(layer, normal(B, T, E), normal(B, S, 5), normal(B, S, 3), **MASKS[mask](T, S))
    factors = {name: block for name, block in found.items() if isinstance(block, Factored)}
    assert {name: block.inputs.shape[1] for name, block in factors.items()} == {
        "q_proj_weight": T,
        "k_proj_weight": S,
        "v_proj_weight": S,
        "out_proj.weight": T,
    }
    assert {name for name, block in found.items() if isinstance(block, Dense)} == (set(PACKED[1::2]) if bias else set())


def test_the_plain_fallback_agrees_too() -> None:
    x, memory = normal(B, T, E), normal(B, S, E)
    check(make(bias=False), x, memory, memory, oracle=run_again)
    check(make(), x, x, x, padding(T), False, oracle=run_again)


def test_rows_are_the_gradients_of_single_samples() -> None:
    module = Wrapped(make()).double()
    query, memory, masked = normal(B, T, E), normal(B, S, E), padding(S)
    samples = [(query[n : n + 1], memory[n : n + 1], masked[n : n + 1]) for n in range(B)]
    truth = per_sample_gradients(module, lambda m, s: m(s[0], s[1], s[1], s[2]), samples)
    found = captured(module, (query, memory, memory, masked), factored=True)
    for name, block in found.items():
        torch.testing.assert_close(block.dense(), truth[f"layer.{name}"], **EXACT)


def test_the_packed_projections_are_three_groups_filled_up_with_zeros() -> None:
    layer, query, memory = make().double(), normal(B, T, E), normal(B, S, E)
    block = check(layer, query, memory, memory)["in_proj_weight"]
    assert isinstance(block, Factored) and block.groups == 3 and block.inputs.shape == (B, S, 3 * E)
    torch.testing.assert_close(block.inputs[:, :T, :E], query, **EXACT)
    torch.testing.assert_close(block.inputs[..., E:], torch.cat([memory, memory], 2), **EXACT)
    assert not block.inputs[:, T:, :E].any() and not block.output_grads[:, T:, :E].any()


@pytest.mark.parametrize("wanted", [["layer.in_proj_bias"], ["layer.out_proj.*"], ["layer.in_proj_weight"]])
def test_only_what_is_wanted_is_returned(wanted: list[str]) -> None:
    module, x = Wrapped(make()).double(), normal(B, T, E)
    found, everything = captured(module, (x, x, x), parameters=wanted), captured(module, (x, x, x))
    names = [name for name in everything if any(f"layer.{name}".startswith(want.rstrip("*")) for want in wanted)]
    assert list(found) == names
    for name in names:
        torch.testing.assert_close(found[name].dense(), everything[name].dense(), **EXACT)


@pytest.mark.parametrize("used", [0, 1])
def test_a_loss_of_one_output_alone(used: int) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make()

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.layer(x, x, x)[used]).sum()  # type: ignore[no-any-return]

    module, x = One().double(), normal(B, T, E)
    found, expected = captured(module, (x,)), by(attention_by_sample, module, (x,))
    for name, block in expected.items():
        torch.testing.assert_close(found[name].dense(), block.dense(), **EXACT)
    assert used == 0 or not found["out_proj.weight"].dense().any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_inside_encoder_and_decoder_layers(training: bool, norm_first: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    encoder = nn.TransformerEncoderLayer(E, H, 16, **options)
    decoder = nn.TransformerDecoderLayer(E, H, 16, **options)
    for layer in (encoder, decoder):
        layer.train(training).requires_grad_(not frozen)
    x, memory = normal(B, T, E), normal(B, S, E)
    if not (frozen and not training):  # frozen and in eval mode the encoder takes its fused path: no layer is called
        found = check(encoder, x, src_key_padding_mask=padding(T))
        assert isinstance(found["self_attn.in_proj_weight"], Factored)
        check(encoder, x, src_mask=causal(T, T), is_causal=True)
    check(decoder, x, memory, tgt_mask=causal(T, T), memory_key_padding_mask=padding(S), tgt_is_causal=True)


def test_without_factors_the_smaller_form_is_kept() -> None:
    module, short, long = Wrapped(make()).double(), normal(B, 1, E), normal(B, 20, E)
    found = captured(module, (short, short, short))
    assert isinstance(found["in_proj_weight"], Factored) and isinstance(found["out_proj.weight"], Factored)
    found = captured(module, (long, long, long))
    assert all(isinstance(block, Dense) for block in found.values())


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_positions_that_no_input_has_go_by_sample(options: dict[str, Any]) -> None:
    module, x = Wrapped(make(**options)).double(), normal(B, T, E)
    found, expected = captured(module, (x, x, x), factored=True), by(attention_by_sample, module, (x, x, x))
    assert all(isinstance(block, Dense) for block in found.values())
    for name, block in expected.items():
        assert torch.equal(found[name].dense(), block.dense())


def test_a_layer_that_does_something_else_is_refused() -> None:
    module, x = Wrapped(make()).double(), normal(B, T, E)
    module.layer.register_forward_hook(lambda layer, args, output: (output[0] * 1.1, output[1]))
    with pytest.raises(CaptureError, match="another output when it was run again"):
        captured(module, (x, x, x))


def test_weights_that_changed_between_forward_and_backward_are_refused() -> None:
    module, x = Wrapped(make()).double(), normal(B, T, E)
    with GradientCapture(select(module, "*")) as capture:
        capture.begin(B)
        total = module(x, x, x)
        module.layer.in_proj_weight.data.mul_(1.5)
        capture.backward(total)
        with pytest.raises(CaptureError, match="another output"):
            capture.collect()


def test_dropout_is_refused_in_training_and_fine_in_eval_mode() -> None:
    layer, x = make(dropout=0.1), normal(B, T, E)
    with pytest.raises(CaptureError, match=r"dropout of 0\.1"):
        captured(Wrapped(layer).double(), (x, x, x))
    check(layer.eval(), x, x, x)


@pytest.mark.parametrize("shape", [(B, E), (1, T, E)])
def test_what_is_not_a_batch_of_samples_is_refused(shape: tuple[int, ...]) -> None:
    module, x = Wrapped(make()).double(), normal(*shape)
    with GradientCapture(select(module, "*")) as capture:
        capture.begin(B)
        capture.backward(module(x, x, x))
        with pytest.raises(CaptureError, match=r"samples in its first|another output|run again one sample"):
            capture.collect()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [True, False])
def test_under_autocast_as_close_as_one_sample_at_a_time(dtype: torch.dtype, need_weights: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make()

        def forward(self, x: Tensor, masked: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype, enabled=x.dtype == torch.float32):
                return self.layer(x, x, x, masked, need_weights)[0].sin().sum()  # type: ignore[no-any-return]

    module, x, masked = Net(), normal(B, T, E).float(), padding(T)
    samples = [(x[n : n + 1], masked[n : n + 1]) for n in range(B)]
    truth = per_sample_gradients(module, lambda m, s: m(*s), samples)
    found, old = captured(module, (x, masked)), by(attention_by_sample, module, (x, masked))
    for name, block in found.items():
        expected = truth[f"layer.{name}"]
        assert block.dtype == torch.float32
        errors = [float((part.dense() - expected).norm() / expected.norm()) for part in (block, old[name])]
        assert errors[0] < max(1.5 * errors[1], 1e-3) and errors[0] < 5e-2, (name, errors)


def test_a_module_in_half_precision_gives_single() -> None:
    module, x = Wrapped(make()).to(torch.bfloat16), normal(B, T, E).bfloat16()
    found = captured(module, (x, x, x), factored=True)
    assert {block.dtype for block in found.values()} == {torch.float32}


def test_capture_inside_autocast_leaves_no_weight_without_a_graph_behind() -> None:
    module, x = make(), normal(B, T, E).float()
    with GradientCapture(select(module, "*")) as capture:
        capture.begin(B)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = module(x, x, x)[0].float().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            capture.backward(total)
            capture.collect()
            module(x, x, x)[0].float().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
