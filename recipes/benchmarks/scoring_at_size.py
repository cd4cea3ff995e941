"""TracIn-WE scores from a store of 10,000 texts, against the bare arithmetic: one product a word and its scatter-adds.

    python recipes/benchmarks/scoring_at_size.py --rounds 5 --out recipes/results/scoring_at_size.md

10,000 training texts and 500 queries of 64 tokens, d = 128, three checkpoints of random gradients in float32, the
words drawn by a Zipf-like law or evenly. The bare baseline has every posting list of every checkpoint in memory, as
one index with its bounds known, and does nothing but, word by word, multiply two lists and add the products into the
score table. The library reads its shards (of the size that the callback writes) through the memory map, scales by the
learning rates and gives complete blocks of scores. The first pass of a process also computes the checksum of
every file; it stands in a row of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence import ArtifactStore, TracInWE
from lightning_influence.artifacts import Checkpoint, Manifest, ParameterGroup
from lightning_influence.callbacks.replay_recorder import shard_size
from lightning_influence.estimators.estimator import Queries, Stage
from lightning_influence.gradients import Rows, pack
from recipes.benchmarks.measuring import Row, interleaved, report, timed

NAME, LENGTH, WIDTH, CHECKPOINTS, RATE = "embedding.weight", 64, 128, 3, 0.1
Index = list[tuple[int, int, int, int]]  # rows i:j of the queries and k:m of the training texts that hold one word


def texts(count: int, vocabulary: int, law: str, draw: torch.Generator) -> Tensor:
    """Token ids (count, LENGTH); the r-th word of a Zipf-like vocabulary has a share of 1 / (r + 2.7)."""
    share = 1 / (torch.arange(vocabulary) + 2.7) if law == "zipf" else torch.ones(vocabulary)
    return torch.multinomial(share, count * LENGTH, replacement=True, generator=draw).view(count, LENGTH)


def rows_of(tokens: Tensor, vocabulary: int, draw: torch.Generator) -> Rows:
    """Random gradients of the words of some texts."""
    grads = torch.randn(*tokens.shape, WIDTH, generator=draw)
    return Rows.from_tokens(tokens, grads, num_words=vocabulary)


def write_store(folder: str, tokens: Tensor, words: int, draw: torch.Generator) -> tuple[ArtifactStore, list[Rows]]:
    """A store of three checkpoints as the callback writes it, and the same training gradients in memory."""
    weights = {NAME: torch.zeros(words, WIDTH)}
    count = len(tokens)
    whole = [rows_of(tokens, words, draw) for _ in range(CHECKPOINTS)]
    size = shard_size(whole[0].nbytes() / count, 64)
    store = ArtifactStore.create(
        folder, Manifest(count, "0" * 16, Manifest.describe(weights.items()), (NAME,), "replay", size, "float32")
    )
    for step, rows in enumerate(whole, 1):
        store.commit(
            *(
                store.write_gradients(step, step, (a, min(a + size, count)), pack({NAME: rows.select(span)}))
                for a in range(0, count, size)
                if len(span := torch.arange(a, min(a + size, count)))
            )
        )
        groups = (ParameterGroup("SGD", 0, (NAME,), RATE, RATE),)
        store.commit_checkpoint(Checkpoint(step, step, step, groups), store.write_weights(step, step, weights, ()))
    return ArtifactStore.open(folder), whole


def bounds(query: Rows, train: Rows) -> Index:
    """Where each shared word lies in both indices."""
    (words, starts), (others, begins) = query.postings, train.postings
    shared = words[torch.isin(words, others)]
    a, b = torch.searchsorted(words, shared), torch.searchsorted(others, shared)
    found: Index = torch.stack([starts[a], starts[a + 1], begins[b], begins[b + 1]], 1).tolist()
    return found


def bare(queries: list[Rows], trains: list[Rows], index: Index) -> Tensor:
    """The arithmetic alone, (N, Q): per checkpoint and word one product, and one scatter-add of its cells."""
    num_queries = queries[0].num_samples
    table = torch.zeros(trains[0].num_samples, num_queries)
    flat = table.view(-1)
    for query, train in zip(queries, trains, strict=True):
        for i, j, k, m in index:
            products = train.values[k:m] @ query.values[i:j].T
            cells = train.owners[k:m, None] * num_queries + query.owners[i:j]
            flat.scatter_add_(0, cells.view(-1), products.view(-1))
    return table


def measure(law: str, vocabulary: int, samples: int, num_queries: int, rounds: int) -> list[Row]:
    """The rows of the table for one law."""
    draw = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        store, trains = write_store(folder + "/store", texts(samples, vocabulary, law, draw), vocabulary, draw)
        asked = texts(num_queries, vocabulary, law, draw)
        queries = [rows_of(asked, vocabulary, draw) for _ in range(CHECKPOINTS)]
        index = bounds(queries[0], trains[0])
        cells = sum((j - i) * (m - k) for i, j, k, m in index)
        by_step = {c.step: {NAME: rows} for c, rows in zip(store.checkpoints(), queries, strict=True)}
        stage = Stage(store)
        estimator = TracInWE(unmatched="zeros")

        def scored() -> Tensor:
            given = Queries([asked], [num_queries], lambda at, names: by_step[at.step])
            return torch.cat([block.scores for block in estimator.score_blocks(stage, given)], 1)

        first = timed(scored)
        expected = bare(queries, trains, index).T * RATE
        error = float((scored() - expected).abs().max() / expected.abs().max())
        assert error < 1e-5, f"the scores differ: {error:.2g} of the largest"
        case = f"{law}, {vocabulary:,} words"
        basis, name = f"{case}: bare products and scatter-adds", f"{case}: scores from the store"
        variants: dict[str, Callable[[], float]] = {
            basis: lambda: timed(lambda: bare(queries, trains, index)),
            name: lambda: timed(scored),
        }
        found = interleaved(variants, rounds)
        return [
            found.row(basis, basis, work=f"{len(index):,} shared words, {cells / 1e6:.1f} M cells a checkpoint"),
            found.row(name, basis, work=f"largest relative difference {error:.1g}"),
            {"what": f"{case}: the first pass of a process", "CPU s": round(first, 3), "work": "with all checksums"},
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--out", type=Path, default=None, help="write the table as .json or .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for law, vocabulary in (("zipf", 20_000), ("uniform", 20_000), ("uniform", 2_000)):
        rows += measure(law, vocabulary, options.samples, options.queries, options.rounds)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    report("Scores from the store at size", rows, options.out, **settings)


if __name__ == "__main__":
    main()
