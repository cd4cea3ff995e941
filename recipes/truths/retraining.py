"""Ground truth: many models retrained, each on its own part of the training set, and what they say of queries.

    truth = retrain(mlp, recipe, Samples(inputs, labels), queries, subsets, seeds=range(100, 105), cache="truths")
    truth.losses  # (S, seeds, Q)

All models of a chunk take their steps together: their parameters are stacked, and one `vmap(grad)` gives the gradients
of all. A chunk of one model is trained in torch's own way, which is faster where parameters fill the processor's cache,
as word embeddings do. A seed gives the initial weights, the same for every subset, and the order of the batches: **each
model shuffles its own subset in every epoch** and cuts that order into batches of `batch_size`. Subsets of one size are
therefore drawn by position in the same order, those of different sizes are not. A smaller subset has fewer batches; its
model rests (no step, no momentum, no decay) while the others end their epoch.

`weights` turns the question from "trained without" to "trained with less of": sample z counts w(z) times in its batch's
loss, which is still divided by the number of samples of the batch. A sample of weight 0 thus keeps its place, so that
`1/N` and the other samples' batches stay as they were: the truth of a removal in METHODS' normalisation, and with far
less noise, for single removals.

Every model's results are kept by themselves (`recipes.truths.store`): more subsets or seeds train what is new.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from recipes.truths.chunks import Batches, Run, train_chunk
from recipes.truths.measuring import Truth, measure
from recipes.truths.samples import Samples, check_subsets, random_subsets
from recipes.truths.store import Origin, TruthStore, data_hash, model_hash, part_key, write_whole
from recipes.truths.training import Build, Recipe, initial

__all__ = [
    "Batches",
    "Samples",
    "Truth",
    "check_subsets",
    "content_key",
    "origins",
    "random_subsets",
    "retrain",
    "write_whole",
]

_VERSION = 1  # of `content_key`


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
        build: makes the model; its randomness is that of the seed. Buffers must be constants, and dropout 0; for
            anything else there is `recipes/retrain.py`.
        recipe: how each is trained.
        train: what the subsets index.
        queries: what is measured.
        subsets: indices (n_s,), of any sizes; equal ones are trained once.
        seeds: of the initial weights and the batches.
        weights: of the samples of each subset, (n_s,) each; 1 where omitted.
        cache: folder of the results, a store for each seed. What is there already is not trained again, be it of
            another list of subsets or of a run that was killed.
        at_once: models of a chunk; 1 is best on few cores where a model has many parameters.

    Raises:
        ValueError: subsets, weights or the model are not as they should be.
        StoreError: what the folder holds is damaged.
    """
    check_subsets(train, subsets, weights)
    if at_once < 1:
        raise ValueError(f"Expected chunks of one model or more, found at_once={at_once}.")
    weights = weights or [torch.ones(len(subset)) for subset in subsets]
    keys = [part_key(*part) for part in zip(subsets, weights, strict=True)]
    of_seeds = zip(seeds, origins(build, recipe, train, queries, seeds), strict=True)
    stores = {seed: TruthStore.at(cache, origin) for seed, origin in of_seeds}
    found = {seed: store.known() for seed, store in stores.items()}
    runs = {
        (seed, key): Run(subset, weight, seed)
        for seed in stores
        for key, subset, weight in zip(keys, subsets, weights, strict=True)
    }
    missing = [which for which in runs if which[1] not in found[which[0]]]
    done = (len(runs) - len(missing)) * recipe.epochs  # the bar begins there: what is known says nothing of the speed
    bar = tqdm(total=len(runs) * recipe.epochs, initial=done, unit="epoch", desc="retraining", dynamic_ncols=True)
    with bar:
        for start in range(0, len(missing), at_once):
            chunk = missing[start : start + at_once]
            models = [initial(build, seed) for seed, _ in chunk]
            train_chunk(models, recipe, train, [runs[which] for which in chunk], lambda: bar.update(len(chunk)))  # noqa: B023
            for seed, store in stores.items():
                own = zip(chunk, models, strict=True)
                results = {key: measure(model, queries) for (whose, key), model in own if whose == seed}
                if results:
                    store.add(results)
                    found[seed] |= results
    for store in stores.values():
        store.tidy()
    rows = [[found[seed][key] for seed in seeds] for key in keys]  # (S, seeds)
    return Truth(
        torch.stack([torch.stack([each.losses for each in row]) for row in rows]),
        torch.stack([torch.stack([each.log_odds for each in row]) for row in rows]),
    )


def origins(build: Build, recipe: Recipe, train: Samples, queries: Samples, seeds: Sequence[int]) -> list[Origin]:
    """What the results of each seed depend on, but for the subsets: for `TruthStore.open(folder).require(origin)`."""
    data, asked = data_hash(train), data_hash(queries)
    models = [initial(build, seed) for seed in seeds]
    return [
        Origin(
            model=model_hash(model),
            recipe=asdict(recipe),
            train=data,
            train_size=len(train),
            queries=asked,
            query_count=len(queries),
            seed=int(seed),
            model_repr=repr(model),
        )
        for seed, model in zip(seeds, models, strict=True)
    ]


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
