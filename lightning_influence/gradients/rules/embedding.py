"""Rules for look-ups: Embedding and EmbeddingBag, whose gradients are rows by word."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_influence.errors import CaptureError
from lightning_influence.gradients.rows import Rows
from lightning_influence.gradients.rules.call import LayerCall, LayerGradients, gradient_rule


def _refuse_scaling(call: LayerCall) -> None:
    if getattr(call.layer, "scale_grad_by_freq", False):
        raise CaptureError(
            f"the gradient of {call.title} is scaled by how often each word occurs in the batch",
            expected="scale_grad_by_freq=False",
            found="scale_grad_by_freq=True",
            hint="with it one sample's gradient depends on the rest of the batch: turn it off",
        )


@gradient_rule(nn.Embedding)
def embedding(call: LayerCall) -> LayerGradients:
    """Row w of sample n is Σ_{t: x_nt = w} g_nt; the padding row gets nothing. ``sparse`` and ``max_norm``
    change nothing."""
    layer = call.layer
    assert isinstance(layer, nn.Embedding)
    _refuse_scaling(call)
    tokens = call.input.reshape(call.num_samples, -1)  # (N, T)
    grads = call.output_grad.reshape(*tokens.shape, layer.embedding_dim)  # (N, T, D)
    return {"weight": Rows.from_tokens(tokens, grads, num_words=layer.num_embeddings, padding_idx=layer.padding_idx)}


@gradient_rule(nn.EmbeddingBag)
def embedding_bag(call: LayerCall) -> LayerGradients:
    """Row w of bag n is g_n times the sum of the weights of w's places in the bag (mean: each 1/number of
    words)."""
    layer = call.layer
    assert isinstance(layer, nn.EmbeddingBag)
    _refuse_scaling(call)
    if layer.mode == "max":
        raise CaptureError(
            f"the gradient of {call.title} is not kept by words",
            expected="an EmbeddingBag that sums or averages",
            found="mode='max'",
            hint="use mode='sum' or 'mean', or leave the layer out of the selection",
        )
    bound = dict(zip(("input", "offsets", "per_sample_weights"), call.args, strict=False)) | dict(call.kwargs)
    tokens: Tensor = bound["input"]
    weights: Tensor | None = bound.get("per_sample_weights")
    n = call.num_samples
    if tokens.dim() == 2:
        owners = torch.arange(n, device=tokens.device).repeat_interleave(tokens.shape[1])
        tokens = tokens.reshape(-1)
    else:
        starts: Tensor = bound["offsets"].long()[:n]  # include_last_offset adds one that starts no bag
        owners = torch.searchsorted(starts, torch.arange(tokens.shape[0], device=tokens.device), right=True) - 1
        if layer.include_last_offset:
            inside = torch.arange(tokens.shape[0], device=tokens.device) < bound["offsets"][-1]
            tokens, owners = tokens[inside], owners[inside]
            weights = weights.reshape(-1)[inside] if weights is not None else None
    if layer.padding_idx is not None:
        kept = tokens != layer.padding_idx
        tokens, owners = tokens[kept], owners[kept]
        weights = weights.reshape(-1)[kept] if weights is not None else None
    grads = call.output_grad
    values = grads[owners]  # (M, D)
    if weights is not None:
        values = values * weights.reshape(-1, 1).to(values)
    if layer.mode == "mean":
        counts = torch.bincount(owners, minlength=n).clamp_min(1)
        values = values / counts[owners, None]
    return {"weight": Rows.from_pairs(tokens, owners, values, num_samples=n, num_words=layer.num_embeddings)}
