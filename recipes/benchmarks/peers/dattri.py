"""Dattri's TracIn, influence function and TRAK, with losses as its examples write them: for one sample under vmap.

Dattri gives scores (N, Q). Its TracIn and its influence function are inner products of loss gradients, positive for
proponents; its TRAK is one of margins (trak.py here says of which), positive for proponents too. All that it keeps
stays in memory, so the folder stays empty.

Two of its influence functions are left out. IFAttributorEKFAC takes Linear layers alone, here the last one, and for a
layer with a bias it writes the weight's gradient and then the bias's into one line and reads that as rows of a weight
with its bias, which are others; the exact Hessian of that layer answers the same question. IFAttributorArnoldi takes
the roots of eigenvalues that are negative where the loss of all parameters is not convex: its scores are no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from recipes.benchmarks.peers.asked import Peer, Trained, dataset, last_layer
from recipes.benchmarks.peers.trak import dimension
from recipes.truths.samples import Samples

BATCH = 250  # queries are differentiated again for every batch of training samples; 1 MB of gradients a sample
TRAK_BATCH = 500  # its projection is drawn again for every batch
REGULARIZATION = 1e-2  # as in dattri's examples; with its default of 0 a softmax has a Hessian without inverse
Weights = Mapping[str, Tensor]
Data = tuple[Tensor, Tensor]
Loss = Callable[[Weights, Data], Tensor]


def peers() -> list[Peer]:
    """TracIn, an influence function and TRAK."""
    return [
        Peer("dattri, TracIn, all parameters", _tracin_scores, _tracin_self_influence),
        Peer("dattri, IF explicit, last layer", _explicit_scores, _explicit_self_influence),
        Peer("dattri, TRAK, final checkpoint", _trak_scores, _trak_self_influence),
    ]


def _tracin_scores(trained: Trained, queries: Samples, folder: Path) -> Tensor:
    return _answer(_tracin(trained).attribute(_loader(trained.train), _loader(queries)))


def _tracin_self_influence(trained: Trained, folder: Path) -> Tensor:
    found: Tensor = _tracin(trained).self_attribute(_loader(trained.train))
    return found.detach()


def _tracin(trained: Trained) -> Any:
    """All checkpoints with their learning rates, gradients neither normalised nor projected.

    A constructor without arguments for a projection projects all the same, to 512 dimensions; dattri's own examples
    switch that off in this way.
    """
    from dattri.algorithm import TracInAttributor

    attributor = TracInAttributor(
        _task(trained, _loss_of_one, trained.checkpoints),
        torch.tensor(list(trained.learning_rates)),
        normalized_grad=False,
    )
    attributor.projector_kwargs = None
    return attributor


def _explicit_scores(trained: Trained, queries: Samples, folder: Path) -> Tensor:
    attributor, train = _explicit(trained)
    with torch.no_grad():  # as dattri's examples do
        return _answer(attributor.attribute(train, _all(_pooled(trained, queries))))


def _explicit_self_influence(trained: Trained, folder: Path) -> Tensor:
    attributor, train = _explicit(trained)
    with torch.no_grad():
        found: Tensor = attributor.self_attribute(train)
    return found.detach()


def _explicit(trained: Trained) -> tuple[Any, DataLoader[Any]]:
    """The exact Hessian of the last layer's weight and bias at the final checkpoint.

    Dattri is given what enters the last layer and that layer alone as its model. Its own way to a single layer, by the
    name of its parameters, runs the whole model for every parameter of the layer at once, and did not fit into memory
    with 4,000 texts. All samples are one batch, since the inverses of single batches' Hessians would be added up.
    """
    from dattri.algorithm import IFAttributorExplicit

    head = _final(trained).get_submodule(last_layer(trained.model))
    attributor = IFAttributorExplicit(
        _task_of(head, _mean_loss, [head.state_dict()]),
        regularization=REGULARIZATION,
    )
    train = _all(_pooled(trained, trained.train))
    attributor.cache(train)
    return attributor, train


def _pooled(trained: Trained, samples: Samples) -> Samples:
    """What enters the last layer (N, D) at the final checkpoint, with the labels."""
    model, found = _final(trained), []
    layer = model.get_submodule(last_layer(model))
    layer.register_forward_pre_hook(lambda _, entered: found.append(entered[0].detach()))
    with torch.no_grad():
        for tokens, _ in _loader(samples):
            model(tokens)
    return Samples(torch.cat(found), samples.labels)


def _final(trained: Trained) -> nn.Module:
    model = trained.copy()
    model.load_state_dict(dict(trained.checkpoints[-1]))
    return model


def _trak_scores(trained: Trained, queries: Samples, folder: Path) -> Tensor:
    attributor = _trak(trained)
    with torch.no_grad():
        attributor.cache(_loader(trained.train, TRAK_BATCH))
        return _answer(attributor.attribute(_loader(queries, TRAK_BATCH)))


def _trak_self_influence(trained: Trained, folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = _trak(trained).self_attribute(_loader(trained.train, TRAK_BATCH))
    return found.detach().flatten()


def _trak(trained: Trained) -> Any:
    """Margins of the final checkpoint, with the projection that TRAK's own library gets."""
    from dattri.algorithm import TRAKAttributor

    def probability(model: nn.Module) -> Loss:
        loss = _loss_of_one(model)
        return lambda weights, data: torch.exp(-loss(weights, data))

    task = _task(trained, _margin_of_one, trained.checkpoints[-1:])
    projection = {"proj_dim": dimension(len(trained.train)), "device": "cpu"}
    return TRAKAttributor(task, probability(task.get_model()), projector_kwargs=projection)


def _task(trained: Trained, loss: Callable[[nn.Module], Loss], checkpoints: Sequence[Weights]) -> Any:
    return _task_of(trained.copy(), loss, checkpoints)


def _task_of(model: nn.Module, loss: Callable[[nn.Module], Loss], checkpoints: Sequence[Weights]) -> Any:
    from dattri.task import AttributionTask

    return AttributionTask(loss(model), model, [dict(weights) for weights in checkpoints])


def _loss_of_one(model: nn.Module) -> Loss:
    """The cross-entropy of a single sample."""

    def loss(weights: Weights, data: Data) -> Tensor:
        inputs, label = data
        return F.cross_entropy(functional_call(model, dict(weights), (inputs.unsqueeze(0),)), label.unsqueeze(0))

    return loss


def _mean_loss(model: nn.Module) -> Loss:
    """The mean cross-entropy of a batch; influence functions hand single samples over as batches of one."""

    def loss(weights: Weights, data: Data) -> Tensor:
        inputs, labels = data
        return F.cross_entropy(functional_call(model, dict(weights), (inputs,)), labels)

    return loss


def _margin_of_one(model: nn.Module) -> Loss:
    """log p/(1 − p) of a single sample, whose 1 − p is never rounded to 0: of the other classes' logits."""

    def margin(weights: Weights, data: Data) -> Tensor:
        inputs, label = data
        logits = functional_call(model, dict(weights), (inputs.unsqueeze(0),)).squeeze(0)  # (C,)
        own = torch.arange(len(logits)) == label
        found: Tensor = (logits * own).sum() - logits.masked_fill(own, -torch.inf).logsumexp(0)
        return found

    return margin


def _loader(samples: Samples, batch_size: int = BATCH) -> DataLoader[Any]:
    return DataLoader(dataset(samples), batch_size)


def _all(samples: Samples) -> DataLoader[Any]:
    return _loader(samples, len(samples))


def _answer(scores: Tensor) -> Tensor:
    return scores.detach().t().contiguous()
