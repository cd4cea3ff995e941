"""Rules for LayerNorm, GroupNorm and BatchNorm in eval mode, whose gradients are sums over places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.errors import CaptureError
from lightning_influence.gradients.blocks import Dense
from lightning_influence.gradients.rules.call import LayerCall, LayerGradients, gradient_rule


@gradient_rule(nn.LayerNorm)
def layer_norm(call: LayerCall) -> LayerGradients:
    """∂ℓ_n/∂γ = Σ_t g_nt x̂_nt, ∂ℓ_n/∂β = Σ_t g_nt."""
    layer = call.layer
    assert isinstance(layer, nn.LayerNorm)
    inputs, grads = call.widened()
    normalised = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    shape = (call.num_samples, -1, *layer.normalized_shape)
    return _affine(call, (normalised * grads).reshape(shape), grads.reshape(shape))


@gradient_rule(nn.GroupNorm)
def group_norm(call: LayerCall) -> LayerGradients:
    """∂ℓ_n/∂γ_c = Σ_places g x̂, ∂ℓ_n/∂β_c = Σ_places g."""
    layer = call.layer
    assert isinstance(layer, nn.GroupNorm)
    inputs, grads = call.widened()
    normalised = F.group_norm(inputs, layer.num_groups, eps=layer.eps)
    return _by_channel(call, normalised * grads, grads)


@gradient_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(call: LayerCall) -> LayerGradients:
    """The same with running statistics; with batch statistics a sample has no gradient of its own:
    refused."""
    layer = call.layer
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    if layer.training or layer.running_mean is None or layer.running_var is None:
        raise CaptureError(
            f"{call.title} normalises with the statistics of the batch",
            expected="eval mode with running statistics",
            found="training mode" if layer.training else "track_running_stats=False",
            hint="capture by replay (eval mode), freeze the layer in eval mode, or use GroupNorm or LayerNorm",
        )
    inputs, grads = call.widened()
    shape = (1, -1, *[1] * (inputs.dim() - 2))
    deviation = (layer.running_var.to(inputs) + layer.eps).sqrt().view(shape)
    normalised = (inputs - layer.running_mean.to(inputs).view(shape)) / deviation
    return _by_channel(call, normalised * grads, grads)


def _by_channel(call: LayerCall, weighted: Tensor, grads: Tensor) -> LayerGradients:
    """Both summed over the places that follow (N, C)."""
    return _affine(
        call,
        weighted.flatten(2).transpose(1, 2) if weighted.dim() > 2 else weighted[:, None],
        grads.flatten(2).transpose(1, 2) if grads.dim() > 2 else grads[:, None],
    )


def _affine(call: LayerCall, weighted: Tensor, grads: Tensor) -> LayerGradients:
    """Blocks of scale and shift from (N, T, *shape) products and gradients."""
    found: dict[str, Tensor] = {"weight": weighted, "bias": grads}
    return {name: Dense(torch.sum(found[name], 1)) for name in found if name in call.wanted}
