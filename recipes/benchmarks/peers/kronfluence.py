"""Kronfluence as the benchmarks use it: classifiers with the mean cross-entropy, one process, a CPU.

It tracks Linear and Conv2d layers, and no others: of a text classifier with an Embedding and Conv1d layers the last
layer alone. Since a Conv1d is a Conv2d of height one, it is also asked about a model that has been rewritten so.

It is imported where it is used: it lives in an environment of its own (README.md of the benchmarks says how).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from recipes.benchmarks.peers.asked import Peer, Trained, dataset
from recipes.truths.samples import Samples

BATCH, QUERY_BATCH = 500, 100
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

    def self_scores(self, strategy: Strategy, data: TensorDataset, *, batch_size: int) -> Tensor:
        """The influence (N,) of every sample on itself, with the damping of 0.1·mean of a layer."""
        from kronfluence.arguments import ScoreArguments

        self._scored += 1
        name = f"scores-{self._scored}"
        self.analyzer.compute_self_scores(
            name,
            strategy,
            data,
            per_device_train_batch_size=batch_size,
            score_args=ScoreArguments(damping_factor=None),
        )
        found: Tensor = self.analyzer.load_self_scores(name)["all_modules"]
        return found

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


class AsConv2d(nn.Module):
    """A Conv1d computed by a Conv2d of height one, with the same weights."""

    def __init__(self, original: nn.Conv1d) -> None:
        super().__init__()
        if original.padding_mode != "zeros":
            raise ValueError(f"Expected a convolution padded with zeros, found {original.padding_mode!r}.")
        self.convolution = nn.Conv2d(
            original.in_channels,
            original.out_channels,
            (1, original.kernel_size[0]),
            stride=(1, original.stride[0]),
            padding=original.padding if isinstance(original.padding, str) else (0, original.padding[0]),
            dilation=(1, original.dilation[0]),
            groups=original.groups,
            bias=original.bias is not None,
            dtype=original.weight.dtype,
        )
        weights = {
            name: value.unsqueeze(2) if value.dim() == 3 else value for name, value in original.state_dict().items()
        }
        self.convolution.load_state_dict(weights)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, K, T) of (B, D, T)."""
        answer: Tensor = self.convolution(hidden.unsqueeze(2)).squeeze(2)
        return answer


def with_conv2d(model: nn.Module) -> nn.Module:
    """The model itself, its Conv1d layers replaced by Conv2d layers that compute the same."""
    for layer in list(model.modules()):
        for name, child in list(layer.named_children()):
            if type(child) is nn.Conv1d:
                setattr(layer, name, AsConv2d(child))
    return model


def peers() -> list[Peer]:
    """EK-FAC at the final weights with labels sampled from the model, kronfluence's default, and its damping heuristic.

    Both track every layer that they can: Linear layers, and with the rewritten model convolutions too, in whose factors
    padded places count, since no mask reaches a Conv2d.
    """
    return [
        _ekfac("kronfluence, EK-FAC, linear layers", lambda model: model),
        _ekfac("kronfluence, EK-FAC, Conv1d as Conv2d too", with_conv2d),
    ]


def _ekfac(name: str, prepared: Callable[[nn.Module], nn.Module]) -> Peer:
    def fitted(trained: Trained, folder: Path) -> Kronfluence:
        model = trained.copy()
        model.load_state_dict(dict(trained.checkpoints[-1]))
        analysis = Kronfluence(prepared(model), folder, padding=trained.train.padding)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            analysis.fit("ekfac", dataset(trained.train), batch_size=BATCH)
        return analysis

    def scores(trained: Trained, queries: Samples, folder: Path) -> Tensor:
        return fitted(trained, folder).scores(
            "ekfac",
            dataset(queries),
            dataset(trained.train),
            damping=None,
            query_batch_size=min(QUERY_BATCH, len(queries)),
            train_batch_size=BATCH,
        )

    def self_influence(trained: Trained, folder: Path) -> Tensor:
        return fitted(trained, folder).self_scores("ekfac", dataset(trained.train), batch_size=BATCH)

    return Peer(name, scores, self_influence)
