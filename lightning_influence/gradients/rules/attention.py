"""The rule for MultiheadAttention: four products with a weight, around an attention that is computed once more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.errors import CaptureError
from lightning_influence.gradients.blocks import Dense, accumulation_dtype
from lightning_influence.gradients.factored import Factored
from lightning_influence.gradients.rules.call import (
    BATCH_FIRST_HINT,
    LayerCall,
    LayerGradients,
    gradient_rule,
)
from lightning_influence.gradients.rules.fallback import as_first_run, by_sample, check_repeated, refuse_randomness

_ARGUMENTS = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # where keys or values have a width of their own
_KNOWN = {"in_proj_weight", *_SEPARATE, "in_proj_bias", "out_proj.weight", "out_proj.bias"}


@gradient_rule(nn.MultiheadAttention, runs_again=True)
def multihead_attention(call: LayerCall) -> LayerGradients:
    """Projections, context and output once more; autograd carries the gradient from the context to the projections.

    A packed ``in_proj_weight`` is three weights of one gradient in groups. Where queries and keys differ in number,
    the shorter ones are filled up with positions of zeros.
    """
    layer = call.layer
    assert isinstance(layer, nn.MultiheadAttention)
    if not layer.batch_first:
        raise CaptureError(
            f"{call.title} has time in its first dimension",
            expected="batch_first=True",
            found="batch_first=False",
            hint=BATCH_FIRST_HINT,
        )
    arguments = dict(zip(_ARGUMENTS, call.args, strict=False)) | dict(call.kwargs)
    appended = layer.bias_k is not None or layer.add_zero_attn  # positions that no input has
    if appended or not call.wanted <= _KNOWN or arguments["query"].dim() != 3:
        return attention_by_sample(call)
    refuse_randomness(call)
    sources: list[Tensor] = [arguments[name] for name in ("query", "key", "value")]  # (N, T, E), (N, S, K), (N, S, V)
    weight, bias = layer.out_proj.weight, layer.out_proj.bias
    with as_first_run(call):
        projected = [part.requires_grad_() for part in _projected(layer, sources)]
        with torch.enable_grad():
            context, shares = _attended(layer, projected, arguments)  # (N, T, E) and (N, T, S), (N, H, T, S) or None
        results = [context] if shares is None else [context, shares]
        check_repeated(call, [F.linear(context, weight, bias), *results[1:]])
    at_output = call.output_grad.to(accumulation_dtype(call.output_grad))
    arrived = [at_output @ weight.to(at_output), *call.output_grads[1:]]
    arrived = [grad.to(result) for grad, result in zip(arrived, results, strict=True)]
    at_projected = torch.autograd.grad(results, projected, arrived)
    return _gradients(call.wanted, sources, at_projected, context.detach(), at_output)


def _projected(layer: nn.MultiheadAttention, sources: list[Tensor]) -> list[Tensor]:
    """Queries (N, T, E), keys and values (N, S, E)."""
    packed = layer.in_proj_weight
    weights = [getattr(layer, name) for name in _SEPARATE] if packed is None else packed.chunk(3)
    biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    return [F.linear(*factors) for factors in zip(sources, weights, biases, strict=True)]


def _attended(
    layer: nn.MultiheadAttention, projected: list[Tensor], arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The context (N, T, E) that ``out_proj`` reads, and the shares of attention, (N, T, S) or (N, H, T, S), if they
    are returned.
    """
    queries, keys, values = (torch.unflatten(part, 2, (layer.num_heads, -1)).transpose(1, 2) for part in projected)
    padding, shown = arguments.get("key_padding_mask"), arguments.get("need_weights", True)
    if arguments.get("is_causal", False) and padding is None and not shown:
        context = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)  # the hint replaces the mask
        return context.transpose(1, 2).flatten(2), None
    mask = _mask(arguments.get("attn_mask"), padding, queries, keys)
    if not shown:
        context = F.scaled_dot_product_attention(queries, keys, values, mask)
        return context.transpose(1, 2).flatten(2), None
    scores = (queries * math.sqrt(1 / queries.shape[-1])) @ keys.transpose(2, 3)  # (N, H, T, S)
    shares = torch.softmax(scores if mask is None else scores + mask, -1)
    context = (shares @ values).transpose(1, 2).flatten(2)
    return context, shares.mean(1) if arguments.get("average_attn_weights", True) else shares


def _mask(attention: Tensor | None, padding: Tensor | None, queries: Tensor, keys: Tensor) -> Tensor | None:
    """What is added to the scores (N, H, T, S), of a shape that broadcasts to them; boolean masks hide where they are
    true.
    """
    total: Tensor | None = None
    if attention is not None:  # (T, S), the same for all, or (N·H, T, S)
        total = _added(attention, queries)
        if total.dim() == 3:
            total = total.reshape(*queries.shape[:3], keys.shape[2])
    if padding is not None:  # (N, S)
        hidden = _added(padding, queries)[:, None, None]
        total = hidden if total is None else total + hidden
    return total


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(mask, -math.inf)


def _gradients(
    wanted: frozenset[str],
    sources: list[Tensor],
    at_projected: tuple[Tensor, ...],
    context: Tensor,
    at_output: Tensor,
) -> LayerGradients:
    """Blocks of the wanted parameters from what every weight read and the gradient at what it gave."""
    kind = accumulation_dtype(*sources, *at_projected, context, at_output)
    inputs = [source.to(kind) for source in sources]
    grads = [grad.to(kind) for grad in at_projected]
    gradients: LayerGradients = {}
    if "in_proj_weight" in wanted:
        longest = max(source.shape[1] for source in inputs)

        def filled(parts: list[Tensor]) -> Tensor:
            return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts], 2)  # (N, L, 3E)

        gradients["in_proj_weight"] = Factored(filled(inputs), filled(grads), groups=3)
    for name, source, grad in zip(_SEPARATE, inputs, grads, strict=True):
        if name in wanted:
            gradients[name] = Factored(source, grad)
    if "in_proj_bias" in wanted:
        gradients["in_proj_bias"] = Dense(torch.cat([grad.sum(1) for grad in grads], 1))
    if "out_proj.weight" in wanted:
        gradients["out_proj.weight"] = Factored(context.to(kind), at_output.to(kind))
    if "out_proj.bias" in wanted:
        gradients["out_proj.bias"] = Dense(at_output.to(kind).sum(1))
    return gradients


def attention_by_sample(call: LayerCall) -> LayerGradients:
    """The fallback, told which arguments of the attention belong to samples: a (T, S) mask never does."""
    layer = call.layer
    assert isinstance(layer, nn.MultiheadAttention)
    bound = dict(zip(_ARGUMENTS, call.args, strict=False)) | dict(call.kwargs)
    mask = bound.get("attn_mask")
    per_head = False
    if isinstance(mask, Tensor) and mask.dim() == 3:  # (B * heads, T, S)
        per_head = True
        bound["attn_mask"] = mask.view(call.num_samples, layer.num_heads, *mask.shape[1:])
    names = list(bound)
    shared = {"attn_mask"} if not per_head else set()
    axes = [0 if isinstance(bound[name], Tensor) and name not in shared else None for name in names]

    def rebuild(parts: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = dict(zip(names, parts, strict=True))
        if per_head:
            arguments["attn_mask"] = arguments["attn_mask"].flatten(0, 1)
        return (), arguments

    return by_sample(call, list(bound.values()), axes, rebuild)
