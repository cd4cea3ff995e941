"""LDS of the peers' K-FAC and EK-FAC on the digits: the figures that our own curvatures have to reach.

    /tmp/peers/bin/python recipes/benchmarks/peers_digits.py --cache /tmp/truths --out recipes/results/peers_digits.md

It needs the environment of the peers (README.md here says how). For each of the two models, three of them trained on
all 1,000 samples from different seeds are explained; their scores are judged by the models retrained on 100 halves with
5 seeds (recipes/truths/digits.py, minutes the first time). The LDS is the mean over the three models, its interval a
bootstrap over queries. Dampings are absolute, the same for all layers, but for kronfluence's heuristic of 0.1·mean of
each layer's eigenvalues. The best damping is picked by the LDS itself, which nobody can do without the truths.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence.metrics import QueryMean, linear_datamodeling_score, mean_over_models, noise_ceiling
from recipes.benchmarks.measuring import Row, report
from recipes.benchmarks.peers.curvlinops import curvlinops_inverse, curvlinops_operator, per_sample_gradients
from recipes.benchmarks.peers.kronfluence import Kronfluence
from recipes.truths.digits import (
    MODELS,
    REFERENCE_SEEDS,
    Digits,
    digits,
    half_subset_truth,
    half_subsets,
    reference_model,
)

DAMPINGS = (1e-8, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
Scored = Iterator[tuple[str, str, Tensor]]  # method, damping, scores (Q, N)


def datasets(data: Digits) -> tuple[TensorDataset, TensorDataset]:
    """The training set and the queries."""
    return (
        TensorDataset(data.train.inputs, data.train.labels),
        TensorDataset(data.queries.inputs, data.queries.labels),
    )


def kronfluence(model: nn.Module, data: Digits, seed: int) -> Scored:
    """Kronfluence's scores with every damping."""
    train, queries = datasets(data)
    with tempfile.TemporaryDirectory() as folder:
        for strategy, name in (("kfac", "kronfluence K-FAC"), ("ekfac", "kronfluence EK-FAC")):
            analysis = Kronfluence(model, Path(folder) / strategy)
            torch.manual_seed(seed)
            analysis.fit(strategy, train, batch_size=1000)  # type: ignore[arg-type]
            for damping in (None, *DAMPINGS):
                scores = analysis.scores(
                    strategy,  # type: ignore[arg-type]
                    queries,
                    train,
                    damping=damping,
                    query_batch_size=200,
                    train_batch_size=1000,
                )
                yield name, "heuristic" if damping is None else f"{damping:g}", scores


def curvlinops(model: nn.Module, data: Digits, seed: int) -> Scored:
    """Curvlinops' curvatures between plain per-sample gradients, with sampled and with all labels."""
    train, queries = datasets(data)
    theirs, ours = per_sample_gradients(model, train), per_sample_gradients(model, queries)
    yield "gradient dot product", "", ours @ theirs.t()
    for kind in ("kfac", "ekfac"):
        for fisher, labels in (("mc", "one sampled label"), ("type-2", "all labels")):
            operator = curvlinops_operator(
                kind,
                model,
                train,
                fisher_type=fisher,  # type: ignore[arg-type]
                batch_size=1000,
                seed=seed,
            )
            for damping in DAMPINGS:
                scores = (curvlinops_inverse(operator, damping) @ ours.t()).t() @ theirs.t()
                yield f"curvlinops {kind[:-3].upper()}-FAC, {labels}", f"{damping:g}", scores


def random(model: nn.Module, data: Digits, seed: int) -> Scored:
    """Scores without meaning."""
    draw = torch.Generator().manual_seed(seed)
    yield "random", "", torch.randn(len(data.queries), len(data.train), generator=draw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the truths")
    parser.add_argument("--out", type=Path, default=None, help="write the table as .json or .md")
    parser.add_argument("--every-damping", action="store_true", help="not only 1e-8, the heuristic and the best")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data, subsets = digits(), half_subsets()
    methods: tuple[Callable[[nn.Module, Digits, int], Scored], ...] = (random, curvlinops, kronfluence)
    rows: list[Row] = []
    for kind in MODELS:
        truth = half_subset_truth(kind, options.cache)
        found: dict[tuple[str, str], list[QueryMean]] = {}
        for seed in REFERENCE_SEEDS:
            model = reference_model(kind, seed, options.cache)
            for method in methods:
                for name, damping, scores in method(model, data, seed):
                    lds = linear_datamodeling_score(scores, subsets, truth.losses)
                    found.setdefault((name, damping), []).append(lds)
        rows.append(_row(kind, "half of the seeds against the other half", "", noise_ceiling(truth.losses).halves))
        means = {key: mean_over_models(each) for key, each in found.items()}
        best = {name: max((m.mean, d) for (n, d), m in means.items() if n == name)[1] for name, _ in means}
        for (name, damping), lds in means.items():
            shown = damping in ("", "1e-08", "heuristic", best[name])
            if shown or options.every_damping:
                each = " ".join(f"{one.mean:.3f}" for one in found[name, damping])
                mark = " (best)" if damping and damping == best[name] else ""
                rows.append({**_row(kind, name, damping + mark, lds), "of the three models": each})
    report("LDS on the digits", rows, options.out)


def _row(kind: str, name: str, damping: str, lds: QueryMean) -> dict[str, str | float]:
    interval = f"{lds.low:.3f} to {lds.high:.3f}"
    return {"model": kind, "what": name, "damping": damping, "LDS": f"{lds.mean:.3f}", "95% interval": interval}


if __name__ == "__main__":
    main()
