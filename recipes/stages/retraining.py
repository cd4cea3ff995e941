"""Ground truth over two runs: many networks pretrained and finetuned at once, and what they say of queries.

    found = retrain_both(runs, tasks, tasks.test, subsets, seeds=range(5), cache="truths")
    found.losses  # (S, seeds, Q)

As in `recipes.truths.retraining`: all models of a chunk take their steps together, a seed gives initial weights and
batches, and a sample of weight 0 keeps its place in its batch, so that `1/N` stays as it was. A model's second run
begins at the embedding that its own first run ended with, and a head that is the same for every subset of a seed.
What the first runs ended with is kept as well: finetuning with the embedding frozen and tuned shares it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from tqdm import tqdm

from recipes.stages.data import Tasks
from recipes.stages.network import TwoRuns, finetuning_seed, is_shared
from recipes.truths.retraining import Batches, Samples, check_subsets, content_key, write_whole
from recipes.truths.training import Recipe, initial

_VERSION = 1  # raise it when the arithmetic changes: it is part of every cache's key
State = dict[str, Tensor]  # parameters of many models, (M, *shape)


@dataclass(frozen=True)
class Measured:
    """What the retrained models say.

    Args:
        losses: cross-entropy (S, seeds, Q), float64.
        right: whether the most probable class is the label (S, seeds, Q).
    """

    losses: Tensor
    right: Tensor


def retrain_both(
    runs: TwoRuns,
    tasks: Tasks,
    queries: Samples,
    subsets: Sequence[Tensor],
    *,
    seeds: Sequence[int],
    cache: str | os.PathLike[str],
    weights: Sequence[Tensor] | None = None,
    at_once: int = 50,
) -> Measured:
    """Pretrain on every subset with every seed, finetune each, and measure the queries.

    Args:
        runs: how both runs train.
        tasks: what they train on; the subsets index the pretraining samples.
        queries: of the finetuning task.
        subsets: indices (n_s,), of any sizes.
        seeds: of the initial weights and the batches.
        cache: folder of the results. A run that was killed goes on after the last chunk that it finished.
        weights: of the samples of each subset, (n_s,) each; 1 where omitted.
        at_once: models of a chunk.
    """
    check_subsets(tasks.pretraining, subsets, weights)
    weights = weights or [torch.ones(len(subset)) for subset in subsets]
    every = [(subset, seed) for seed in seeds for subset in range(len(subsets))]
    chunks = [every[start : start + at_once] for start in range(0, len(every), at_once)]
    before = content_key(runs.first, runs.pretraining, tasks.pretraining, subsets, weights, seeds)
    head_seeds = [finetuning_seed(seed) for seed in seeds]
    later = content_key(runs.second, runs.finetuning.recipe, tasks.finetuning, queries, head_seeds)
    key = hashlib.sha256(f"{_VERSION} {before} {later} {runs.finetuning.embedding}".encode()).hexdigest()[:32]
    epochs = runs.pretraining.epochs + runs.finetuning.recipe.epochs
    files = []
    with tqdm(total=len(every) * epochs, unit="epoch", desc="retraining twice", dynamic_ncols=True) as bar:
        for number, chunk in enumerate(chunks):
            first, second = (Path(cache) / f"{each}-{at_once}-{number:04d}.safetensors" for each in (before, key))
            files.append(second)
            if second.exists():
                bar.initial += len(chunk) * epochs  # known already: it says nothing of the speed
                bar.update(len(chunk) * epochs)
                continue
            second.parent.mkdir(parents=True, exist_ok=True)
            if first.exists():
                bar.initial += len(chunk) * runs.pretraining.epochs
                bar.update(len(chunk) * runs.pretraining.epochs)
                embedding = load_file(first)
            else:
                embedding = _pretrained(runs, tasks, [(subsets[s], weights[s], seed) for s, seed in chunk], bar)
                write_whole(first, embedding)
            seeds_of = [finetuning_seed(seed) for _, seed in chunk]
            write_whole(second, _finetuned(runs, tasks, queries, embedding, seeds_of, bar))
    found = [load_file(file) for file in files]
    shape = len(seeds), len(subsets), len(queries)
    losses, right = (torch.cat([each[kind] for each in found]).view(shape) for kind in ("losses", "right"))
    return Measured(losses.transpose(0, 1).contiguous(), right.transpose(0, 1).contiguous())


def _pretrained(runs: TwoRuns, tasks: Tasks, parts: Sequence[tuple[Tensor, Tensor, int]], bar: tqdm) -> State:
    """The embeddings that a chunk's first runs end with."""
    seeds = [seed for _, _, seed in parts]
    models = [initial(runs.first, seed) for seed in seeds]
    batches = Batches(runs.pretraining, [(subset, weight) for subset, weight, _ in parts])
    trained = _trained(
        models[0], _stacked(models), {}, runs.pretraining, tasks.pretraining, batches, seeds,
        lambda: bar.update(len(parts)),
    )  # fmt: skip
    return {name: value for name, value in trained.items() if is_shared(name)}


def _finetuned(
    runs: TwoRuns, tasks: Tasks, queries: Samples, embedding: State, seeds: Sequence[int], bar: tqdm
) -> State:
    """What a chunk's second runs say of the queries."""
    how = runs.finetuning
    models = [initial(runs.second, seed) for seed in seeds]
    begin = {**_stacked(models), **{name: value.clone() for name, value in embedding.items()}}
    fixed = {name: value for name, value in begin.items() if how.frozen and is_shared(name)}
    free = {name: value for name, value in begin.items() if name not in fixed}
    size = len(tasks.finetuning)
    batches = Batches(how.recipe, [(torch.arange(size), torch.ones(size))] * len(seeds))
    trained = _trained(
        models[0], free, fixed, how.recipe, tasks.finetuning, batches, seeds, lambda: bar.update(len(seeds)),
        rates={name: how.learning_rate(name) for name in free},
    )  # fmt: skip
    return _measured(models[0].eval(), {**trained, **fixed}, queries)


def _stacked(models: Sequence[nn.Module]) -> State:
    parameters, buffers = stack_module_state(list(models))
    if buffers:
        raise ValueError(f"Expected a model without buffers, found {sorted(buffers)}. HINT: use layers without state.")
    return {name: value.detach() for name, value in parameters.items()}


def _trained(
    model: nn.Module,
    free: State,
    fixed: State,
    recipe: Recipe,
    samples: Samples,
    batches: Batches,
    seeds: Sequence[int],
    after_epoch: Callable[[], object],
    rates: Mapping[str, float] | None = None,
) -> State:
    """The free parameters of all models after their training; the fixed ones stay."""
    rates = rates or dict.fromkeys(free, recipe.learning_rate)
    velocity = {name: torch.zeros_like(value) for name, value in free.items()}

    def loss(own: State, held: State, inputs: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        logits = functional_call(model, {**own, **held}, (inputs,))
        return (F.cross_entropy(logits, labels, reduction="none") * shares).sum()

    gradients = vmap(grad(loss))
    sizes = [len(part) for part, _ in batches.parts]
    for orders in zip(*(recipe.orders(size, seed) for size, seed in zip(sizes, seeds, strict=True)), strict=True):
        for indices, shares, active in zip(*batches.epoch(orders), strict=True):
            found = gradients(
                free, fixed, samples.inputs[indices], samples.labels[indices], shares.to(samples.inputs.dtype)
            )
            for name, value in free.items():
                moves = active.view(-1, *(1,) * (value.dim() - 1))  # a model without a batch rests
                step = found[name].add_(value, alpha=recipe.weight_decay)
                velocity[name] = torch.where(moves, velocity[name] * recipe.momentum + step, velocity[name])
                value.sub_(velocity[name] * moves, alpha=rates[name])
        after_epoch()
    return free


def _measured(model: nn.Module, parameters: State, queries: Samples) -> State:
    with torch.no_grad():
        logits = vmap(lambda own: functional_call(model, own, (queries.inputs,)))(parameters).double()  # (M, Q, C)
    labels = queries.labels.expand(len(logits), -1)
    losses = -logits.log_softmax(2).gather(2, labels.unsqueeze(2)).squeeze(2)
    return {"losses": losses, "right": logits.argmax(2) == labels}
