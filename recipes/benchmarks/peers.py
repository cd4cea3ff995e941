"""Kronfluence and curvlinops as the benchmarks use them: classifiers with the mean cross-entropy, one process, a CPU.

Both are imported where they are used: they live in an environment of their own (README.md here says how to make it).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

Strategy = Literal["identity", "diagonal", "kfac", "ekfac"]


class Kronfluence:
    """A model with kronfluence's analyzer: factors are fitted once, scores asked for with several settings.

    Args:
        model: left as it is; a copy is analysed.
        folder: where kronfluence writes its factors and scores.
        modules: names of the layers to track; all Linear and Conv2d layers where omitted.
    """

    def __init__(self, model: nn.Module, folder: Path, modules: Sequence[str] | None = None) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.task import Task

        class Classification(Task):  # type: ignore[misc]  # an untyped library's class
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                inputs, labels = batch
                logits = model(inputs).float()
                if sample:
                    with torch.no_grad():
                        labels = torch.multinomial(logits.softmax(1), 1).squeeze(1)
                return F.cross_entropy(logits, labels, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str] | None:
                return list(modules) if modules is not None else None

        logging.getLogger("kronfluence").setLevel(logging.ERROR)
        task = Classification()
        prepared = prepare_model(copy.deepcopy(model).eval(), task)
        self.analyzer = Analyzer(
            "analysis", prepared, task, cpu=True, disable_tqdm=True, output_dir=str(folder), log_level=logging.ERROR
        )
        self._scored = 0

    def fit(
        self, strategy: Strategy, data: TensorDataset, *, batch_size: int, amp_dtype: torch.dtype | None = None
    ) -> None:
        """Fit the factors of a strategy with labels sampled from the model; name them after the strategy."""
        from kronfluence.arguments import FactorArguments

        self.analyzer.fit_all_factors(
            strategy,
            data,
            per_device_batch_size=batch_size,
            factor_args=FactorArguments(strategy=strategy, amp_dtype=amp_dtype),
            overwrite_output_dir=True,
        )

    def scores(
        self,
        strategy: Strategy,
        queries: TensorDataset,
        data: TensorDataset,
        *,
        damping: float | None,
        query_batch_size: int,
        train_batch_size: int,
        amp_dtype: torch.dtype | None = None,
        low_rank: int | None = None,
        full_svd: bool = False,
    ) -> Tensor:
        """Influence scores (Q, N), positive for proponents; damping None is kronfluence's 0.1·mean of a layer."""
        from kronfluence.arguments import ScoreArguments

        self._scored += 1
        arguments = ScoreArguments(
            damping_factor=damping, amp_dtype=amp_dtype, query_gradient_low_rank=low_rank, use_full_svd=full_svd
        )
        name = f"scores-{self._scored}"
        self.analyzer.compute_pairwise_scores(
            name,
            strategy,
            queries,
            data,
            per_device_query_batch_size=query_batch_size,
            per_device_train_batch_size=train_batch_size,
            score_args=arguments,
        )
        scores: Tensor = self.analyzer.load_pairwise_scores(name)["all_modules"]
        return scores


def linear_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the Linear layers, in order."""
    return [p for layer in model.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()]


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
    """The fitted curvature of the Linear layers, a weight and its bias together.

    Tuned leaves out what curvlinops does by default beside the fit: the passes over the data that count its samples
    and its loss terms, and the check that two products agree.
    """
    from curvlinops import EKFACLinearOperator, KFACLinearOperator

    known = {"check_deterministic": False, "num_data": len(data), "num_per_example_loss_terms": 1} if tuned else {}
    operator = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}[kind](
        model.eval(),
        nn.CrossEntropyLoss(),
        linear_parameters(model),
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
    """Gradients (N, P) of each sample's loss with respect to the Linear layers' parameters."""
    wanted = {id(parameter) for parameter in linear_parameters(model)}
    parameters = {name: value.detach() for name, value in model.named_parameters() if id(value) in wanted}
    others = {name: value.detach() for name, value in model.named_parameters() if id(value) not in wanted}

    def loss(own: dict[str, Tensor], inputs: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, {**others, **own}, (inputs.unsqueeze(0),))
        return F.cross_entropy(logits, label.unsqueeze(0))

    found = vmap(grad(loss), (None, 0, 0))(parameters, *data.tensors)
    return torch.cat([value.flatten(1) for value in found.values()], 1)
