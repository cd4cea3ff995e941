"""Which positions of a training sequence carry its score: the summands of a sample's gradient, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.errors import QueryError
from lightning_influence.estimators.estimator import Stage, Term, restricted, unchanged
from lightning_influence.estimators.tokens import token_look_ups, token_sequences
from lightning_influence.gradients import (
    Dense,
    Factored,
    GradientBlock,
    GradientCapture,
    Gradients,
    Rows,
    inner,
    select,
)
from lightning_influence.objective import training_objective
from lightning_influence.replay import TrainingData, isolated, sample_gradients, to_device


@dataclass(frozen=True)
class TokenScores:
    """How the score of a query and a training sample spreads over the sample's tokens (Grosse et al. 2023, 2308.03296,
    section 5.1).

        score = Σ_t scores[t] + rest

    Attributes:
        sample_id: the training sample.
        tokens: its token ids (T,), as they go through the word embeddings, padding left out.
        scores: (T,), what the layers did at each token.
        rest: what comes from parameters that do not act token by token: normalisations, layers after a pooling, biases
            that are selected without their weight.
    """

    sample_id: int
    tokens: tuple[int, ...]
    scores: Tensor
    rest: float


def token_scores(
    stage: Stage, terms: Sequence[Term], transformed: Sequence[Gradients], sample_ids: Tensor
) -> list[list[TokenScores]]:
    """For each query the spread of its scores against some training samples, which run through the model again.

    Args:
        stage: with the model and the `train_loader`.
        terms: of the estimator; `transformed` their query gradients.
        sample_ids: (Q, k).

    Raises:
        QueryError: no training data at hand, a sample without tokens, or terms that change training gradients.
    """
    if stage.module is None or stage.train_loader is None:
        raise QueryError(
            "token scores are taken from the training samples themselves",
            expected="the module and its training data",
            found="no training data" if stage.module is not None else "no module",
            hint="pass InfluenceModule(module, store, estimator, train_loader=train_loader)",
        )
    if stage.projection is not None:
        raise QueryError(
            "token scores need gradients as they are",
            expected="a store without a projection",
            found=f"gradients projected by {stage.projection}",
            hint="fit with GradientSnapshot(projection=None)",
        )
    if any(term.train_transform is not unchanged or term.train_weight is not None for term in terms):
        raise QueryError(
            "token scores need training gradients as they are",
            expected="an estimator such as InfluenceFunction() or TracIn() of a store written by replay",
            found="one that selects words or weighs records",
            hint="ask another estimator; influence.words(...) tells the shared words of TracInWE",
        )
    data = TrainingData.of(stage.train_loader, forked=True)
    wanted = torch.unique(sample_ids).tolist()
    at_hand: dict[int, tuple[tuple[int, ...], Tensor, Tensor]] = {}  # tokens, (Q, T) and (Q,) so far
    for term, query in zip(terms, transformed, strict=True):
        with (
            stage.at(term.query_at) as module,
            isolated(module),
            closing(data.batches([[i] for i in wanted])) as batches,
        ):
            for sample, batch in zip(wanted, batches, strict=True):
                tokens, by_position, rest = _of_one(stage, module, to_device(batch, module, None), term, sample)
                spread, remainder = inner(by_position, restricted(query, by_position)), _total(rest, query)
                known = at_hand.get(sample)
                at_hand[sample] = (
                    (tokens, spread, remainder) if known is None else (tokens, known[1] + spread, known[2] + remainder)
                )
    found = []
    for q, row in enumerate(sample_ids.tolist()):
        found.append([TokenScores(i, at_hand[i][0], at_hand[i][1][q].cpu(), float(at_hand[i][2][q])) for i in row])
    return found


def _of_one(
    stage: Stage, module: Any, batch: Any, term: Term, sample: int
) -> tuple[tuple[int, ...], Gradients, Gradients]:
    """Tokens of one sample, its gradients position by position (T rows), and what has no positions (one row)."""
    selection = select(module, list(term.parameters))
    capture = GradientCapture(selection, factored=True)
    with token_look_ups(module) as seen, _look_up_gradients(module, term.parameters) as looked_up:
        gradients, found = sample_gradients(
            module,
            capture,
            1,
            lambda: training_objective(
                module, batch, 1, per_sample_loss=stage.per_sample_loss, reduction=stage.reduction
            ),
        )
    ids = seen[0].ids[0].flatten() if seen and seen[0].ids.ndim >= 2 and len(seen[0].ids) == 1 else None
    if ids is None:
        raise QueryError(
            f"training sample {sample} is no sequence of tokens",
            expected="a model whose word embedding is given (N, T) token ids",
            found="no such look-up",
            hint="token scores are for models of text; ask for whole samples with influence.query(batch)",
        )
    kept = (ids >= 0).nonzero().squeeze(1)
    positions: dict[str, GradientBlock] = {}
    rest: dict[str, GradientBlock] = {}
    for name, block in gradients.items():
        by_token = _by_position(name, block, looked_up, found.scale) if name not in positions else None
        if by_token is None or by_token.num_samples != len(ids):
            rest[name] = block
        else:
            positions[name] = by_token.select(kept)
            if isinstance(block, Factored) and (bias := _bias_name(name)) in gradients:
                positions[bias] = Dense(block.output_grads[0]).select(kept)
    rest = {name: block for name, block in rest.items() if name not in positions}
    return tuple(token_sequences(seen[:1], 1)[0]), positions, rest


def _by_position(
    name: str, block: GradientBlock, looked_up: dict[str, list[tuple[Tensor, Tensor]]], scale: Tensor
) -> GradientBlock | None:
    """The gradient of one sample as one row a position; None where the parameter has none."""
    if isinstance(block, Factored):
        inputs, grads = block.inputs.transpose(0, 1), block.output_grads.transpose(0, 1)
        return Factored(inputs, grads, block.shape, block.groups)
    if isinstance(block, Rows) and len(looked_up.get(name, [])) == 1:
        tokens, grads = looked_up[name][0]
        return Rows.from_tokens(tokens.reshape(-1, 1), grads.flatten(0, -2)[:, None] * scale, num_words=block.num_words)
    return None


def _bias_name(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _total(rest: Gradients, query: Gradients) -> Tensor:
    """Product of what has no positions, (Q,)."""
    first = next(iter(query.values()))
    if not rest:
        return torch.zeros(first.num_samples)
    return inner(rest, restricted(query, rest)).squeeze(1)


@contextmanager
def _look_up_gradients(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """By embedding weight: the token ids of each look-up and the gradient at its output."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    known = {id(parameter): name for name, parameter in module.named_parameters()}

    def watch(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        name = known.get(id(layer.weight), "")
        if name in names and output.requires_grad:
            output.register_hook(lambda grad: found.setdefault(name, []).append((args[0].detach(), grad.detach())))  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        for layer in module.modules():
            if isinstance(layer, nn.Embedding):
                stack.callback(layer.register_forward_hook(watch).remove)
        yield found
