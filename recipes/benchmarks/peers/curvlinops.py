"""Curvlinops as the benchmarks use it: the K-FAC and EK-FAC of a classifier's Linear and Conv2d layers, on a CPU.

It is imported where it is used: it lives in an environment of its own (README.md of the benchmarks says how).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset


def layer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the Linear and Conv2d layers, in order."""
    return [p for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)) for p in layer.parameters()]


def curvlinops_operator(
    kind: Literal["kfac", "ekfac"],
    model: nn.Module,
    data: TensorDataset,
    *,
    fisher_type: Literal["mc", "type-2", "empirical"] = "mc",
    batch_size: int,
    tuned: bool = True,
    seed: int = 0,
) -> Any:
    """The fitted curvature of the Linear and Conv2d layers, a weight and its bias together.

    Tuned leaves out what curvlinops does by default beside the fit: the passes over the data that count its samples
    and its loss terms, and the check that two products agree.
    """
    from curvlinops import EKFACLinearOperator, KFACLinearOperator

    known = {"check_deterministic": False, "num_data": len(data), "num_per_example_loss_terms": 1} if tuned else {}
    operator = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}[kind](
        model.eval(),
        nn.CrossEntropyLoss(),
        layer_parameters(model),
        list(DataLoader(data, batch_size)),
        fisher_type=fisher_type,
        separate_weight_and_bias=False,
        seed=seed,
        **known,
    )
    if kind == "ekfac":
        operator._maybe_compute_ekfac()
    else:
        operator.compute_kronecker_factors()
    return operator


def curvlinops_inverse(operator: Any, damping: float) -> Any:
    """(operator + damping·I)⁻¹, exactly: the same damping for all layers, since curvlinops has no other."""
    from curvlinops import KFACInverseLinearOperator

    return KFACInverseLinearOperator(operator, damping=damping, use_exact_damping=True)


def per_sample_gradients(model: nn.Module, data: TensorDataset) -> Tensor:
    """Gradients (N, P) of each sample's loss with respect to the layers' parameters."""
    wanted = {id(parameter) for parameter in layer_parameters(model)}
    parameters = {name: value.detach() for name, value in model.named_parameters() if id(value) in wanted}
    others = {name: value.detach() for name, value in model.named_parameters() if id(value) not in wanted}

    def loss(own: dict[str, Tensor], inputs: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, {**others, **own}, (inputs.unsqueeze(0),))
        return F.cross_entropy(logits, label.unsqueeze(0))

    found = vmap(grad(loss), (None, 0, 0))(parameters, *data.tensors)
    return torch.cat([value.flatten(1) for value in found.values()], 1)
