"""Rules for Conv1d, Conv2d and Conv3d: every output place is a position with its window of the input as
factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.gradients.blocks import Dense, GradientBlock, spans
from lightning_influence.gradients.factored import Factored
from lightning_influence.gradients.rules.call import LayerCall, LayerGradients, gradient_rule


@gradient_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(call: LayerCall) -> LayerGradients:
    """∂ℓ_n/∂W = Σ_places g ⊗ window, for any groups, stride, dilation, padding and padding mode."""
    layer = call.layer
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    inputs, grads = call.widened()
    gradients: LayerGradients = {}
    if "weight" in call.wanted:
        gradients["weight"] = _weight_gradient(layer, _padded(layer, inputs), grads, factored=call.factored)
    if "bias" in call.wanted:
        gradients["bias"] = Dense(grads.flatten(2).sum(2))
    return gradients


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    """The input as the convolution really sees it, (N, C, *padded)."""
    amounts: list[int] = []  # F.pad counts from the last dimension
    for dim in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            amounts += [total // 2, total - total // 2]
        elif layer.padding == "valid":
            amounts += [0, 0]
        else:
            amounts += [int(layer.padding[dim])] * 2
    if not any(amounts):
        return inputs
    return F.pad(inputs, amounts, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _windows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, padded: Tensor, places: Sequence[int]) -> Tensor:
    """A view (N, C, *places, *kernel) of the padded input."""
    windows = padded
    for dim, (kernel, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        windows = windows.unfold(2 + dim, dilation * (kernel - 1) + 1, stride)
        windows = windows.narrow(2 + dim, 0, places[dim])[..., ::dilation]
    return windows


def _weight_gradient(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, padded: Tensor, grads: Tensor, *, factored: bool
) -> GradientBlock:
    """Factored where that is asked for or smaller; else Dense, a few samples at a time: the windows of all of them
    may be many times the input."""
    n, out_channels = grads.shape[:2]
    places = grads.shape[2:]
    groups, width = layer.groups, padded.shape[1] // layer.groups
    windows = _windows(layer, padded, places)  # (N, C, *places, *kernel)
    d, kernel = len(places), layer.kernel_size
    shape = (out_channels, width, *kernel)
    positions, window = places.numel(), width * torch.Size(kernel).numel()
    by_place = grads.flatten(2)  # (N, O, L)
    if factored or (groups == 1 and out_channels * window > positions * (out_channels + window)):
        windows = windows.permute([0, *range(2, 2 + d), 1, *range(2 + d, 2 + 2 * d)])  # (N, *places, C, *kernel)
        seen = windows.reshape(n, positions, groups * window)
        return Factored(seen, by_place.transpose(1, 2), shape, groups)
    order = [0, 1, *range(3, 3 + d), 2, *range(3 + d, 3 + 2 * d)]  # (N, G, *places, C/G, *kernel)
    windows = torch.unflatten(windows, 1, (groups, width)).permute(order)
    out = torch.empty(n, groups, out_channels // groups, window, dtype=grads.dtype, device=grads.device)
    for span in spans(n, groups * positions * window):
        seen = windows[span].reshape(-1, positions, window)  # (nG, L, K)
        out[span] = torch.bmm(by_place[span].reshape(seen.shape[0], -1, positions), seen).view(out[span].shape)
    return Dense(out.view(n, *shape))
