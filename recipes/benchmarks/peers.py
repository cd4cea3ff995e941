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
        padding: word id whose positions do not count; the model's inputs are then word ids.
    """

    def __init__(
        self, model: nn.Module, folder: Path, modules: Sequence[str] | None = None, padding: int | None = None
    ) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.task import Task

        class Classification(Task):  # type: ignore[misc]  # an untyped library's class
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                inputs, labels = batch
                logits = model(inputs)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                if sample:
                    with torch.no_grad():
                        labels = torch.multinomial(logits.softmax(1), 1).squeeze(1)
                return F.cross_entropy(logits, labels, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str] | None:
                return list(modules) if modules is not None else None

            def get_attention_mask(self, batch: Any) -> Tensor | None:
                return None if padding is None else (batch[0] != padding).long()

        logging.getLogger("kronfluence").setLevel(logging.ERROR)
        task = Classification()
        prepared = prepare_model(copy.deepcopy(model).eval(), task)
        self.analyzer = Analyzer(
            "analysis", prepared, task, cpu=True, disable_tqdm=True, output_dir=str(folder), log_level=logging.ERROR
        )
        self._scored = 0

    def fit(
        self,
        strategy: Strategy,
        data: TensorDataset,
        *,
        batch_size: int,
        amp_dtype: torch.dtype | None = None,
        observed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Fit the factors of a strategy with labels sampled from the model, or with those observed; name them after
        the strategy."""
        from kronfluence.arguments import FactorArguments

        self.analyzer.fit_all_factors(
            strategy,
            data,
            per_device_batch_size=batch_size,
            factor_args=FactorArguments(
                strategy=strategy,
                use_empirical_fisher=observed,
                amp_dtype=amp_dtype,
                activation_covariance_dtype=dtype,
                gradient_covariance_dtype=dtype,
                per_sample_gradient_dtype=dtype,
                lambda_dtype=dtype,
            ),
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

        arguments = ScoreArguments(
            damping_factor=damping, amp_dtype=amp_dtype, query_gradient_low_rank=low_rank, use_full_svd=full_svd
        )
        return self._scores(strategy, queries, data, arguments, query_batch_size, train_batch_size)["all_modules"]

    def scores_by_layer(
        self, strategy: Strategy, queries: TensorDataset, data: TensorDataset, *, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Influence scores (Q, N) that each layer gives, by its name, with the damping of 0.1·mean."""
        from kronfluence.arguments import ScoreArguments

        arguments = ScoreArguments(
            damping_factor=None,
            compute_per_module_scores=True,
            score_dtype=dtype,
            per_sample_gradient_dtype=dtype,
            precondition_dtype=dtype,
        )
        return self._scores(strategy, queries, data, arguments, len(queries), len(data))

    def _scores(
        self,
        strategy: Strategy,
        queries: TensorDataset,
        data: TensorDataset,
        arguments: Any,
        query_batch_size: int,
        train_batch_size: int,
    ) -> dict[str, Tensor]:
        self._scored += 1
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
        scores: dict[str, Tensor] = self.analyzer.load_pairwise_scores(name)
        return scores


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
