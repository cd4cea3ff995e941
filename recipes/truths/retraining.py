"""Ground truth: many models retrained at once, each on its own part of the training set, and what they say of queries.

    truth = retrain(mlp, recipe, Samples(inputs, labels), queries, subsets, seeds=range(100, 105), cache="truths")
    truth.losses  # (S, seeds, Q)

All models of a chunk take their steps together: their parameters are stacked (`torch.func.stack_module_state`), and one
`vmap(grad)` gives the gradients of all. A seed gives the initial weights, the same for every subset, and the order of
the batches: **each model shuffles its own subset in every epoch** and cuts that order into batches of `batch_size`.
Subsets of one size are therefore drawn by position in the same order, those of different sizes are not. A smaller
subset has fewer batches; its model rests (no step, no momentum, no decay) while the others end their epoch.

`weights` turns the question from "trained without" to "trained with less of": sample z counts w(z) times in its batch's
loss, which is still divided by the number of samples of the batch. A sample of weight 0 thus keeps its place, so that
`1/N` and the other samples' batches stay as they were: the truth of a removal in METHODS' normalisation, and with far
less noise, for single removals.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from tqdm import tqdm

from recipes.truths.training import Build, Recipe, initial

_VERSION = 1  # raise it when the arithmetic changes: it is part of every cache's key


@dataclass(frozen=True)
class Samples:
    """Inputs (N, ...) and class labels (N,)."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Truth:
    """What the retrained models say: float64, lower is better in both.

    Args:
        losses: cross-entropy (S, seeds, Q).
        log_odds: −log(p/(1 − p)) of the true class (S, seeds, Q), the measurement of TRAK and LoGra, negated.
    """

    losses: Tensor
    log_odds: Tensor


def retrain(
    build: Build,
    recipe: Recipe,
    train: Samples,
    queries: Samples,
    subsets: Sequence[Tensor],
    *,
    seeds: Sequence[int],
    weights: Sequence[Tensor] | None = None,
    cache: str | os.PathLike[str],
    at_once: int = 50,
) -> Truth:
    """Train a model on every subset with every seed and measure the queries' losses.

    Args:
        build: makes the model; its randomness is that of the seed. Models with buffers or dropout are not supported.
        recipe: how each is trained.
        train: what the subsets index.
        queries: what is measured.
        subsets: indices (n_s,), of any sizes.
        seeds: of the initial weights and the batches.
        weights: of the samples of each subset, (n_s,) each; 1 where omitted.
        cache: folder of the results. A run that was killed goes on after the last chunk that it finished.
        at_once: models of a chunk.
    """
    check_subsets(train, subsets, weights)
    weights = weights or [torch.ones(len(subset)) for subset in subsets]
    runs = [(subset, seed) for seed in range(len(seeds)) for subset in range(len(subsets))]
    folder = Path(cache) / content_key(build, recipe, train, queries, subsets, weights, seeds)
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [range(start, min(start + at_once, len(runs))) for start in range(0, len(runs), at_once)]
    names = {chunk: folder / f"models-{chunk.start:06d}-{chunk.stop:06d}.safetensors" for chunk in chunks}
    with tqdm(total=len(runs) * recipe.epochs, unit="epoch", desc="retraining", dynamic_ncols=True) as bar:
        for chunk, name in names.items():
            if name.exists():
                bar.initial += len(chunk) * recipe.epochs  # known already: it says nothing of the speed
                bar.update(len(chunk) * recipe.epochs)
                continue
            models = [initial(build, seeds[runs[run][1]]) for run in chunk]
            batches = Batches(recipe, [(subsets[runs[run][0]], weights[runs[run][0]]) for run in chunk])
            orders = [seeds[runs[run][1]] for run in chunk]
            trained = _train(models, recipe, train, batches, orders, lambda: bar.update(len(chunk)))  # noqa: B023
            write_whole(name, _measure(models[0], trained, queries))
    found = [load_file(name) for name in names.values()]
    shape = len(seeds), len(subsets), len(queries)
    losses, log_odds = (torch.cat([each[kind] for each in found]).view(shape) for kind in ("losses", "log_odds"))
    return Truth(losses.transpose(0, 1).contiguous(), log_odds.transpose(0, 1).contiguous())


class Batches:
    """The batches of every model of a chunk, side by side: shorter ones are filled up with samples of weight 0."""

    def __init__(self, recipe: Recipe, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.recipe = recipe
        self.parts = parts
        self.steps = max(-(-len(subset) // recipe.batch_size) for subset, _ in parts)
        self.even = len({len(subset) for subset, _ in parts}) == 1

    def epoch(self, orders: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Indices and weights (steps, M, B), each weight over the batch's size, and which models step (steps, M)."""
        size = self.recipe.batch_size
        indices = torch.zeros(len(self.parts), self.steps * size, dtype=torch.long)
        shares = torch.zeros(len(self.parts), self.steps * size, dtype=torch.float64)
        counts = torch.zeros(len(self.parts), self.steps * size)
        for model, ((subset, weight), order) in enumerate(zip(self.parts, orders, strict=True)):
            indices[model, : len(subset)] = subset[order]
            shares[model, : len(subset)] = weight[order].double()
            counts[model, : len(subset)] = 1
        shape = len(self.parts), self.steps, size
        sizes = counts.view(shape).sum(2)  # (M, steps)
        shares = shares.view(shape) / sizes.clamp(min=1).unsqueeze(2)
        return indices.view(shape).transpose(0, 1), shares.transpose(0, 1), (sizes > 0).t()


def _train(
    models: Sequence[nn.Module],
    recipe: Recipe,
    train: Samples,
    batches: Batches,
    seeds: Sequence[int],
    after_epoch: Callable[[], object],
) -> dict[str, Tensor]:
    """The stacked parameters (M, ...) of all models after their training."""
    parameters, buffers = stack_module_state(list(models))
    if buffers:
        raise ValueError(f"Expected a model without buffers, found {sorted(buffers)}. HINT: use layers without state.")
    parameters = {name: value.detach() for name, value in parameters.items()}
    velocity = {name: torch.zeros_like(value) for name, value in parameters.items()}
    model = models[0]

    def loss(own: dict[str, Tensor], inputs: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        logits = functional_call(model, own, (inputs,))
        return (F.cross_entropy(logits, labels, reduction="none") * shares).sum()

    gradients = vmap(grad(loss))
    for orders in zip(*(recipe.orders(len(p), s) for (p, _), s in zip(batches.parts, seeds, strict=True)), strict=True):
        for indices, shares, active in zip(*batches.epoch(orders), strict=True):
            found = gradients(parameters, train.inputs[indices], train.labels[indices], shares.to(train.inputs.dtype))
            for name, value in parameters.items():
                step = found[name].add_(value, alpha=recipe.weight_decay)
                if batches.even:
                    velocity[name].mul_(recipe.momentum).add_(step)
                    value.sub_(velocity[name], alpha=recipe.learning_rate)
                else:
                    moves = active.view(-1, *(1,) * (value.dim() - 1))
                    velocity[name] = torch.where(moves, velocity[name] * recipe.momentum + step, velocity[name])
                    value.sub_(velocity[name] * moves, alpha=recipe.learning_rate)
        after_epoch()
    return parameters


def _measure(model: nn.Module, parameters: dict[str, Tensor], queries: Samples) -> dict[str, Tensor]:
    model.eval()
    with torch.no_grad():
        logits = vmap(lambda own: functional_call(model, own, (queries.inputs,)))(parameters).double()  # (M, Q, C)
    losses = -logits.log_softmax(2).gather(2, queries.labels.expand(len(logits), -1).unsqueeze(2)).squeeze(2)
    others = logits.scatter(2, queries.labels.expand(len(logits), -1).unsqueeze(2), -torch.inf)
    truth = logits.gather(2, queries.labels.expand(len(logits), -1).unsqueeze(2)).squeeze(2)
    return {"losses": losses, "log_odds": others.logsumexp(2) - truth}  # log((1 − p)/p) without computing 1 − p


def check_subsets(train: Samples, subsets: Sequence[Tensor], weights: Sequence[Tensor] | None) -> None:
    if not subsets or any(subset.dim() != 1 or not len(subset) for subset in subsets):
        raise ValueError(
            "Expected subsets of at least one index each, (n,). HINT: to remove a sample, list the others."
        )
    least, most = min(int(s.min()) for s in subsets), max(int(s.max()) for s in subsets)
    if least < 0 or most >= len(train):
        raise ValueError(f"Expected indices below {len(train)}, the number of training samples, found {least}..{most}.")
    if weights is not None and [len(w) for w in weights] != [len(s) for s in subsets]:
        raise ValueError("Expected one weight for every index of every subset.")


def content_key(build: Build, recipe: Recipe, *content: Any) -> str:
    """A hash of everything that the results depend on, by content."""
    *data, seeds = content
    digest = hashlib.sha256(f"{_VERSION} {recipe} {list(seeds)}".encode())

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, Samples):
            take([value.inputs, value.labels])
        else:
            digest.update(f"[{len(value)}]".encode())
            for each in value:
                take(each)

    for seed in seeds:
        model = initial(build, seed)
        digest.update(repr(model).encode())
        take([value for _, value in sorted(model.state_dict().items())])
    take(data)
    return digest.hexdigest()[:32]


def write_whole(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the file under another name, force it to the disk, and rename it: it is there whole, or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
