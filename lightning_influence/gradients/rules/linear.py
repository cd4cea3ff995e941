"""Rules for layers that multiply by a matrix: Linear and the transposed Conv1D of transformers."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_influence.gradients.blocks import Dense
from lightning_influence.gradients.factored import Factored
from lightning_influence.gradients.rules.call import LayerCall, LayerGradients, gradient_rule


def _factors(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Inputs (N, T, I) and output gradients (N, T, O), every middle dimension counted as positions."""
    inputs, grads = call.widened()
    n = call.num_samples
    positions = grads[0, ..., 0].numel() if n else 0
    return inputs.reshape(n, positions, inputs.shape[-1]), grads.reshape(n, positions, grads.shape[-1])


@gradient_rule(nn.Linear)
def linear(call: LayerCall) -> LayerGradients:
    """∂ℓ_n/∂W = Σ_t g_nt x_ntᵀ, ∂ℓ_n/∂b = Σ_t g_nt, for inputs (N, I), (N, T, I) or of more dimensions."""
    inputs, grads = _factors(call)
    gradients: LayerGradients = {}
    if "weight" in call.wanted:
        gradients["weight"] = Factored(inputs, grads)
    if "bias" in call.wanted:
        gradients["bias"] = Dense(grads.sum(1))
    return gradients


@gradient_rule("transformers.pytorch_utils.Conv1D")
def transposed_linear(call: LayerCall) -> LayerGradients:
    """The same for a weight that is kept as (I, O): the two factors change places."""
    inputs, grads = _factors(call)
    gradients: LayerGradients = {}
    if "weight" in call.wanted:
        gradients["weight"] = Factored(inputs=grads, output_grads=inputs)
    if "bias" in call.wanted:
        gradients["bias"] = Dense(grads.sum(1))
    return gradients
