"""Layers without a rule: run again one sample at a time, vmapped where torch can, in a loop where it
cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_influence.errors import CaptureError
from lightning_influence.gradients.blocks import Dense
from lightning_influence.gradients.rules.call import (
    BATCH_FIRST_HINT,
    LayerCall,
    LayerGradients,
    gradient_rule,
    rule_for,
)

Parameters: TypeAlias = dict[str, Tensor]


def apply_rule(call: LayerCall) -> LayerGradients:
    """The per-sample gradients of the wanted parameters from one call: by the layer's own rule, else by the
    fallback.

    Errors:
        CaptureError: an output does not have the samples first, or the layer has no gradient per sample.
    """
    rule = rule_for(type(call.layer)) or run_again
    if rule is not recurrent:
        call.check_leading_dimension()
    with torch.no_grad():
        return rule(call)


def run_again(call: LayerCall) -> LayerGradients:
    """vmap(vjp) of the layer over its samples, each as a batch of one; exact for any layer that treats
    samples apart.

    Tensors among the arguments whose first dimension is the number of samples are taken apart, all others are
    shared. The outputs of the second run must equal the first one's, so that randomness and state are errors.
    """
    leaves, spec = tree_flatten((call.args, dict(call.kwargs)))
    axes = [
        0 if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == call.num_samples else None
        for leaf in leaves
    ]
    return by_sample(call, leaves, axes, lambda parts: tree_unflatten(parts, spec))


@gradient_rule(nn.RNN, nn.LSTM, nn.GRU, runs_again=True)
def recurrent(call: LayerCall) -> LayerGradients:
    """A loop over the samples; the hidden states, given and returned, have the samples in their second
    dimension."""
    layer = call.layer
    assert isinstance(layer, nn.RNNBase)
    inputs = call.args[0] if call.args else call.kwargs["input"]
    if (
        not layer.batch_first
        or not isinstance(inputs, Tensor)
        or inputs.dim() != 3
        or (inputs.shape[0] != call.num_samples)
    ):
        found = f"an input of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise CaptureError(
            f"{call.title} does not read a plain batch with the samples first",
            expected=f"batch_first=True and an input ({call.num_samples}, T, D)",
            found=f"batch_first={layer.batch_first} and {found}",
            hint=BATCH_FIRST_HINT + "; packed sequences are not taken apart: pad instead",
        )
    leaves, spec = tree_flatten((call.args, dict(call.kwargs)))
    axes = [0 if leaf is inputs else 1 if isinstance(leaf, Tensor) else None for leaf in leaves]
    out_axes = [0] + [1] * (len(call.output_grads) - 1)
    return by_sample(call, leaves, axes, lambda parts: tree_unflatten(parts, spec), out_axes=out_axes, loop=True)


def by_sample(
    call: LayerCall,
    leaves: list[Any],
    axes: list[int | None],
    rebuild: Callable[[list[Any]], Any],
    *,
    out_axes: list[int] | None = None,
    loop: bool = False,
) -> LayerGradients:
    """Run the layer again sample by sample and pull the output gradients back to the wanted parameters."""
    refuse_randomness(call)
    layer = call.layer
    out_axes = out_axes or [0] * len(call.output_grads)
    own = dict(layer.named_parameters())
    wanted: Parameters = {name: own[name].detach() for name in sorted(call.wanted)}

    def forward(parameters: Parameters, parts: list[Any]) -> tuple[Tensor, ...]:
        """The floating-point outputs of a batch of one, each with its axis of size one."""
        arguments, keywords = rebuild(parts)
        outputs = functional_call(layer, parameters, arguments, keywords)
        return tuple(leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point())

    def one(parts: list[Tensor], grads: list[Tensor]) -> tuple[Parameters, list[Tensor]]:
        """Gradients and outputs of one sample, whose parts have lost their sample axis."""
        whole = list(leaves)
        for place, part in zip(split, parts, strict=True):
            whole[place] = part.unsqueeze(axes[place] or 0)
        pulled = vjp(lambda parameters: forward(parameters, whole), wanted)
        outputs, pull = pulled[0], pulled[1]
        if len(outputs) != len(grads):
            raise RuntimeError("the layer returned another number of outputs when it was run again")
        shaped = tuple(
            grad.unsqueeze(axis).to(out.dtype) for out, grad, axis in zip(outputs, grads, out_axes, strict=True)
        )
        (gradients,) = pull(shaped)
        return gradients, [out.squeeze(axis) for out, axis in zip(outputs, out_axes, strict=True)]

    def in_turn(parts: list[Tensor], grads: list[Tensor]) -> tuple[Parameters, list[Tensor]]:
        """What vmap would give, from a loop."""
        rows = []
        for n in range(call.num_samples):
            own_parts = [part.select(axes[place] or 0, n) for place, part in zip(split, parts, strict=True)]
            rows.append(one(own_parts, [grad.select(axis, n) for grad, axis in zip(grads, out_axes, strict=True)]))
        gradients = {name: torch.stack([row[0][name] for row in rows]) for name in wanted}
        return gradients, [torch.stack([row[1][k] for row in rows]) for k in range(len(out_axes))]

    split = [place for place, axis in enumerate(axes) if axis is not None]
    in_dims = ([axes[place] for place in split], list(out_axes))
    parts, grads = [leaves[place] for place in split], list(call.output_grads)
    with as_first_run(call):
        try:
            gradients, outputs = (in_turn if loop else vmap(one, in_dims=in_dims))(parts, grads)
        except Exception as first:
            try:
                if loop:
                    raise
                gradients, outputs = in_turn(parts, grads)
            except Exception as error:
                raise CaptureError(
                    f"{call.title} cannot be run again one sample at a time: {error}",
                    expected="a layer with a rule, or one whose forward works on a batch of one",
                    found=type(layer).__name__,
                    hint="register a rule with @gradient_rule, or leave the layer out of the selection",
                ) from first
    check_repeated(call, [output.movedim(0, axis) for output, axis in zip(outputs, out_axes, strict=True)])
    return {name: Dense(values) for name, values in gradients.items()}


@contextlib.contextmanager
def as_first_run(call: LayerCall) -> Iterator[None]:
    """The first run's autocast, attention that vmap can see through, and the random state left as it was.

    The cache of autocast is left alone: older torch would hand a weight that was cast here, without a graph, to the
    next forward of a training that runs inside autocast as a whole.
    """
    device = call.output_grads[0].device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),  # recurrent layers keep what their backward needs only then
        torch.autocast(device.type, call.autocast, enabled=call.autocast is not None, cache_enabled=False),
    ):
        yield


def refuse_randomness(call: LayerCall) -> None:
    """CaptureError if the layer, in the mode it is in, would not do the same a second time."""
    for name, module in call.layer.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            found = "batch statistics"
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            found = f"dropout of {module.p}" if module.p > 0 else ""
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            found = f"dropout of {module.dropout}" if module.dropout > 0 else ""
        else:
            found = ""
        if found:
            raise CaptureError(
                f"{call.title} must be run a second time, and in training mode it would not do the same again",
                expected="a layer without randomness",
                found=f"{found} in {name or type(module).__name__}",
                hint="capture by replay (eval mode), or set the dropout to 0",
            )


def check_repeated(call: LayerCall, outputs: list[Tensor]) -> None:
    """CaptureError unless the second run's outputs are the first run's."""
    for first, second in zip(call.outputs, outputs, strict=True):
        narrow = first.dtype if call.autocast is None else call.autocast
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(narrow, 5e-2)
        if first.shape == second.shape and torch.dist(first.double(), second.double()) <= tolerance * (
            torch.linalg.vector_norm(first.double()) + 1e-12
        ):
            continue
        raise CaptureError(
            f"{call.title} gave another output when it was run again",
            expected=f"the same output of shape {tuple(first.shape)}",
            found=f"one of shape {tuple(second.shape)}" if first.shape != second.shape else "other values",
            hint="its samples depend on one another, on randomness, on state, or an argument shared by all samples "
            "happens to be as long as the batch: register a rule with @gradient_rule or leave the layer out",
        )
