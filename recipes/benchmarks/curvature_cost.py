"""What curvature costs: K-FAC and EK-FAC fits and the scores of queries, in epochs of plain training, and in memory.

    /tmp/peers/bin/python recipes/benchmarks/curvature_cost.py --rounds 3 --out recipes/results/curvature_cost.md

It needs the environment of the peers (README.md here says how). Two classifiers: `digits`, the MLP of the LDS tables
(1,500 images, 297 queries), and `transformer`, 0.4 M parameters (2 pre-norm blocks of width 96, 2,000 words), whose
curvatures are fitted on 512 texts of 64 words and which is then asked for the scores of 2,000 texts and 100 queries.
All work on the Linear layers, with one label a sample drawn from the model; the peers' batch sizes are the fastest of
those that were tried. `epochs` are forward and backward passes over the samples that are fitted or scored, in batches
of 64, without an optimizer's step. `bare` are the matrix products that nothing can do without, on random numbers of the
same shapes: A and G; these, the factors' rotation, and the products of rotated factors; or per-sample gradients and
their product with those of all queries.

Seconds are CPU seconds of one process on one thread, after a first run of every variant that does not count.
Kronfluence collects garbage between its steps, which takes half a second each time in a process that has imported as
much as this: what exists before the rounds is hidden from the collector (`gc.freeze`), but for the lines that say "as
shipped". Its seconds include its files, which are its way to hand factors on; ours include a file of all scores.
"LoGra" is this library's store of gradients projected to rank 16: it is written by `GradientSnapshot` in a fit of one
step at a learning rate of 0, and asked with `InfluenceFunction(ProjectedGram())`. Memory is that of a process of its
own for each variant: what its resident set grew by at most during the work (the kernel's high-water mark, set back just
before, after everything that is needed was loaded and freed memory was given back).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence import (
    ArtifactStore,
    FactorProjection,
    GradientSnapshot,
    InfluenceFunction,
    InfluenceModule,
    ProjectedGram,
    add_curvature,
)
from lightning_influence.artifacts import Checkpoint, Manifest
from lightning_influence.curvature import EKFAC, KFAC, CurvatureStatistics, TrainingEvidence
from lightning_influence.gradients import select
from lightning_influence.replay import TrainingData
from lightning_influence.samples import fingerprint
from recipes.benchmarks.explained import Explained
from recipes.benchmarks.measuring import Rounds, interleaved, report, timed
from recipes.benchmarks.peers.curvlinops import (
    curvlinops_inverse,
    curvlinops_operator,
    layer_parameters,
    per_sample_gradients,
)
from recipes.benchmarks.peers.kronfluence import Kronfluence
from recipes.truths.digits import RECIPES, mlp
from recipes.truths.training import Recipe, initial, train

VOCABULARY, LENGTH, WIDTH, HEADS, BLOCKS, CLASSES = 2000, 64, 96, 4, 2, 4
TEXTS, FITTED_TEXTS, TEXT_QUERIES = 2000, 512, 100
RANK = 16  # of LoGra's projections
DAMPING = 1e-4  # of curvlinops' inverse; it does not change the cost


@dataclass(frozen=True)
class Units:
    """What seconds are compared with: names of variants."""

    epoch: str
    bare: str


FIT = Units("plain epoch, of the fits", "bare: fit, K-FAC")
EKFAC_BARE = "bare: fit, EK-FAC"
SCORES = Units("plain epoch, of the scores", "bare: scores")

Work = Callable[[], object]
Prepare = Callable[[], Work]  # loads what is needed and returns what is measured


class Attention(nn.Module):
    """Self-attention with a Linear layer for each of its four maps, so that everybody's hooks see them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        shape = *hidden.shape[:2], HEADS, WIDTH // HEADS
        query, key, value = (layer(hidden).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(hidden.shape)
        out: Tensor = self.out(mixed)
        return out


class Block(nn.Module):
    """One pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        out: Tensor = hidden + self.narrow(F.gelu(self.wide(self.norm(hidden))))
        return out


class Transformer(nn.Module):
    """Word ids (B, T) in, logits (B, C) out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.blocks(self.words(words) + self.places.weight)
        logits: Tensor = self.head(self.norm(hidden).mean(1))
        return logits


def texts(count: int, seed: int) -> TensorDataset:
    """Zipf-like texts, six words of each drawn from the twenty of its class; one label in twenty is another."""
    draw = torch.Generator().manual_seed(seed)
    share = 1 / (torch.arange(VOCABULARY) + 2.7)
    words = torch.multinomial(share, count * LENGTH, replacement=True, generator=draw).view(count, LENGTH)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    places = torch.rand(count, LENGTH, generator=draw).argsort(1)[:, :6]
    words.scatter_(1, places, 100 + 20 * labels.unsqueeze(1) + torch.randint(20, places.shape, generator=draw))
    wrong = torch.rand(count, generator=draw) < 0.05
    return TensorDataset(words, torch.where(wrong, (labels + 1) % CLASSES, labels))


@dataclass(frozen=True)
class Problem:
    """A trained model in eval mode, the samples that curvatures are fitted on, those that are scored, the queries, and
    the peers' batch sizes."""

    name: str
    model: nn.Module
    fitted: TensorDataset
    train: TensorDataset
    queries: TensorDataset
    fit_batch: int
    query_batch: int
    train_batch: int
    low_rank: int
    curvlinops_batch: int


def digits_problem() -> Problem:
    """All of scikit-learn's digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    inputs, labels = load_digits(return_X_y=True)
    parts = train_test_split(inputs / 16, labels, train_size=1500, test_size=297, random_state=0, stratify=labels)
    train_inputs, test_inputs = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    train_labels, test_labels = (torch.tensor(part, dtype=torch.long) for part in parts[2:])
    images = TensorDataset(train_inputs, train_labels)
    return Problem(
        "digits",
        train(mlp, RECIPES["mlp"], train_inputs, train_labels, seed=0),
        images,
        images,
        TensorDataset(test_inputs, test_labels),
        fit_batch=1500,
        query_batch=297,
        train_batch=1500,
        low_rank=4,
        curvlinops_batch=1500,
    )


def transformer_problem() -> Problem:
    """The transformer, trained with Adam until it finds most of the planted words."""
    data, queries = texts(TEXTS, 0), texts(TEXT_QUERIES, 1)
    model = initial(Transformer, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for order in Recipe(epochs=3, batch_size=64, learning_rate=0).orders(TEXTS, 0):
        for batch in torch.split(order, 64):
            optimizer.zero_grad()
            words, labels = data[batch]
            F.cross_entropy(model(words), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return Problem(
        "transformer",
        model.eval(),
        TensorDataset(*data[:FITTED_TEXTS]),
        data,
        queries,
        fit_batch=128,
        query_batch=100,
        train_batch=128,
        low_rank=16,
        curvlinops_batch=64,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {"digits": digits_problem, "transformer": transformer_problem}


def plain_epoch(problem: Problem, data: TensorDataset) -> Work:
    """The unit: forward and backward over some samples."""
    batches = list(DataLoader(data, 64))

    def work() -> None:
        for inputs, labels in batches:
            problem.model.zero_grad()
            F.cross_entropy(problem.model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        problem.model.zero_grad()

    return work


@dataclass(frozen=True)
class Bare:
    """The products that cannot be done without, on random factors of the layers' shapes.

    Args:
        layers: inputs (B, T, I) with a column for the bias and output gradients (B, T, O) of a batch of every layer.
        queries, samples: gradients (Q, O · I) and (B, O · I) of every layer.
        batches: of the samples that are fitted; of those that are scored.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    queries: Sequence[Tensor]
    samples: Sequence[Tensor]
    batches: tuple[float, float]

    @staticmethod
    def of(problem: Problem) -> Bare:
        """With the shapes that a batch of 64 has."""
        found: list[tuple[Tensor, Tensor]] = []

        def note(layer: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> None:
            a, g = (torch.randn_like(t.reshape(len(t), -1, t.shape[-1])) for t in (inputs[0], outputs))
            found.append((torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2), g))

        hooks = [m.register_forward_hook(note) for m in problem.model.modules() if isinstance(m, nn.Linear)]
        with torch.no_grad():
            problem.model(problem.train.tensors[0][:64])
        for hook in hooks:
            hook.remove()
        asked, there = (
            [torch.randn(count, g.shape[2] * a.shape[2]) for a, g in found] for count in (len(problem.queries), 64)
        )
        return Bare(found, asked, there, (len(problem.fitted) / 64, len(problem.train) / 64))

    def covariances(self) -> None:
        """A and G: of K-FAC."""
        for _ in range(round(self.batches[0])):
            for a, g in self.layers:
                for rows in (a.flatten(0, 1), g.flatten(0, 1)):
                    rows.T @ rows

    def rotations(self) -> None:
        """A and G, Q_Aᵀ a and Q_Gᵀ g, and their products: of EK-FAC, but for its eigenvectors."""
        self.covariances()
        for _ in range(round(self.batches[0])):
            for a, g in self.layers:
                a, g = (rows @ rows.new_ones(rows.shape[2], rows.shape[2]) for rows in (a, g))
                if a.shape[1] == 1:  # of one position, the square of the product is that of the squares
                    g.flatten(1).square().T @ a.flatten(1).square()
                else:
                    (g.transpose(1, 2) @ a).square_().sum(0)

    def gradients(self) -> None:
        """Per-sample gradients, and their product with the queries'."""
        for _ in range(round(self.batches[1])):
            for (a, g), queries in zip(self.layers, self.queries, strict=True):
                queries @ (g.transpose(1, 2) @ a).flatten(1).T

    def all_pairs(self) -> None:
        """The product of all queries' gradients with all samples', which lie there already."""
        for _ in range(round(self.batches[1])):
            for queries, samples in zip(self.queries, self.samples, strict=True):
                queries @ samples.T


def kronfluence_fit(
    problem: Problem, folder: Path, strategy: Literal["kfac", "ekfac"], amp: torch.dtype | None
) -> Work:
    """Kronfluence's factors, with its files."""
    analysis = Kronfluence(problem.model, Path(tempfile.mkdtemp(dir=folder)))
    return lambda: analysis.fit(strategy, problem.fitted, batch_size=problem.fit_batch, amp_dtype=amp)


def kronfluence_scores(problem: Problem, folder: Path, **options: Any) -> Callable[[], Tensor]:
    """Kronfluence's scores (Q, N) of all queries from fitted EK-FAC factors, with its files."""
    analysis = Kronfluence(problem.model, Path(tempfile.mkdtemp(dir=folder)))
    torch.manual_seed(0)
    analysis.fit("ekfac", problem.fitted, batch_size=problem.fit_batch)
    return partial(
        analysis.scores,
        "ekfac",
        problem.queries,
        problem.train,
        damping=None,
        query_batch_size=problem.query_batch,
        train_batch_size=problem.train_batch,
        **options,
    )


def curvlinops_fit(problem: Problem, kind: Literal["kfac", "ekfac"], tuned: bool) -> Work:
    """Curvlinops' Kronecker factors, and for EK-FAC their eigenvalues."""
    batch = problem.curvlinops_batch
    return lambda: curvlinops_operator(kind, problem.model, problem.fitted, batch_size=batch, tuned=tuned)


def curvlinops_solve(problem: Problem) -> Work:
    """Gradients of the queries and the inverse EK-FAC times them; curvlinops has no scores."""
    operator = curvlinops_operator("ekfac", problem.model, problem.fitted, batch_size=problem.curvlinops_batch)
    assert sum(p.numel() for p in layer_parameters(problem.model)) == operator.shape[0]

    def work() -> Tensor:
        found: Tensor = curvlinops_inverse(operator, DAMPING) @ per_sample_gradients(problem.model, problem.queries).t()
        return found

    return work


def quiet(**options: Any) -> Trainer:
    """A Trainer on the CPU that says and keeps nothing."""
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def ours(problem: Problem, folder: Path) -> Mapping[str, Prepare]:
    """This library on the same layers, with one sampled label: fits, and scores of training data that stream by."""
    module, batch = Explained(problem.model).eval(), problem.curvlinops_batch
    layers = [f"model.{name}" for name, layer in problem.model.named_modules() if isinstance(layer, nn.Linear)]
    names = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]

    def fit(statistics: CurvatureStatistics) -> Work:
        data = TrainingData.of(DataLoader(problem.fitted, batch), forked=True)
        return lambda: statistics.collect(TrainingEvidence(module, select(module, names), data, labels="sampled"))

    def scores(precision: str = "32-true", **options: Any) -> Callable[[], Tensor]:
        manifest = Manifest(
            len(problem.train), fingerprint(problem.train), Manifest.describe(module.named_parameters()), (), "replay",
            batch, "float32",
        )  # fmt: skip
        store = ArtifactStore.create(Path(tempfile.mkdtemp(dir=folder)), manifest)
        store.commit_checkpoint(Checkpoint(1, 0, 1), store.write_weights(1, 1, module.state_dict()))
        add_curvature(
            module, store.root, DataLoader(problem.train, batch), EKFAC(), parameters=names, labels="sampled",
            at_most=len(problem.fitted),
        )  # fmt: skip
        queries = list(DataLoader(problem.queries, problem.query_batch))
        scored = store.root / "scores.safetensors"

        def work() -> Tensor:
            scored.unlink(missing_ok=True)
            influence = InfluenceModule(module, store.root, InfluenceFunction(), k=1)
            influence.prepare(queries, scores_file=scored, **options)
            quiet(precision=precision).predict(influence, DataLoader(problem.train, problem.train_batch))
            return influence.streamed_scores

        return work

    def projected() -> Path:
        root = Path(tempfile.mkdtemp(dir=folder)) / "store"
        snapshot = GradientSnapshot(root, names, every_n_steps=1, projection=FactorProjection(RANK))
        quiet(max_steps=1, callbacks=[snapshot]).fit(Explained(problem.model), DataLoader(problem.train, batch))
        problem.model.eval()
        return root

    def projected_scores() -> Work:
        root, queries = projected(), problem.queries.tensors

        def work() -> Tensor:
            return InfluenceModule(module, root, InfluenceFunction(ProjectedGram()), k=1).scores(queries)

        return work

    return {
        "ours: fit, K-FAC": lambda: fit(KFAC()),
        "ours: fit, EK-FAC": lambda: fit(EKFAC()),
        "ours: scores, EK-FAC": scores,
        "ours: scores, EK-FAC, bf16": lambda: scores("bf16-mixed", dtype=torch.bfloat16),
        "ours: scores, EK-FAC, bf16 products": lambda: scores(dtype=torch.bfloat16),
        f"ours: scores, EK-FAC, rank {problem.low_rank}": lambda: scores(rank=problem.low_rank),
        f"ours: scores, LoGra, rank {RANK}: write the store": lambda: projected,
        f"ours: scores, LoGra, rank {RANK}: ask the store": projected_scores,
    }


@dataclass(frozen=True)
class Variant:
    """What is measured, and the units that it is told in: names of other variants."""

    prepare: Prepare
    epoch: str
    bare: str


def variants(problem: Problem, folder: Path) -> dict[str, Variant]:
    """Everything that is measured, by name."""
    p, bf16, rank = problem, torch.bfloat16, problem.low_rank
    works: dict[str, Prepare] = {
        FIT.epoch: lambda: plain_epoch(p, p.fitted),
        FIT.bare: lambda: Bare.of(p).covariances,
        EKFAC_BARE: lambda: Bare.of(p).rotations,
        "kronfluence: fit, K-FAC": lambda: kronfluence_fit(p, folder, "kfac", None),
        "kronfluence: fit, EK-FAC": lambda: kronfluence_fit(p, folder, "ekfac", None),
        "kronfluence: fit, EK-FAC, as shipped": lambda: as_shipped(kronfluence_fit(p, folder, "ekfac", None)),
        "kronfluence: fit, EK-FAC, bf16": lambda: kronfluence_fit(p, folder, "ekfac", bf16),
        "curvlinops: fit, K-FAC, tuned": lambda: curvlinops_fit(p, "kfac", True),
        "curvlinops: fit, K-FAC, default": lambda: curvlinops_fit(p, "kfac", False),
        "curvlinops: fit, EK-FAC, tuned": lambda: curvlinops_fit(p, "ekfac", True),
        "curvlinops: fit, EK-FAC, default": lambda: curvlinops_fit(p, "ekfac", False),
        SCORES.epoch: lambda: plain_epoch(p, p.train),
        SCORES.bare: lambda: Bare.of(p).gradients,
        "bare: scores, only the product of all pairs": lambda: Bare.of(p).all_pairs,
        "kronfluence: scores, EK-FAC": lambda: kronfluence_scores(p, folder),
        "kronfluence: scores, EK-FAC, as shipped": lambda: as_shipped(kronfluence_scores(p, folder)),
        "kronfluence: scores, EK-FAC, bf16": lambda: kronfluence_scores(p, folder, amp_dtype=bf16),
        f"kronfluence: scores, EK-FAC, rank {rank}": lambda: kronfluence_scores(p, folder, low_rank=rank),
        "curvlinops: scores, EK-FAC, only the solve for the queries": lambda: curvlinops_solve(p),
        **ours(problem, folder),
    }
    return {name: Variant(prepare, *_units(name)) for name, prepare in works.items()}


def _units(name: str) -> tuple[str, str]:
    if "scores" in name:
        return SCORES.epoch, SCORES.bare
    return FIT.epoch, EKFAC_BARE if "EK-FAC" in name else FIT.bare


def as_shipped(work: Work) -> Work:
    """With everything that exists in sight of the garbage collector."""

    def seen() -> object:
        gc.unfreeze()
        try:
            return work()
        finally:
            gc.freeze()

    return seen


def peak_mebibytes(prepare: Prepare) -> float:
    """What the resident set of this process grows by at most during the work, in MiB (Linux)."""
    work = prepare()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present resident set
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def measured_apart(saved: Path, variant: str) -> float:
    """Peak memory of a variant in a process of its own, in MiB; the problem is read from a file of this process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", str(saved), variant]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(said.splitlines()[-1])


def agreement(works: Mapping[str, Work], whose: str) -> str:
    """How well the faster settings of one library agree with its plain ones."""
    plain, *faster = (name for name in works if name.startswith(f"{whose}: scores, EK-FAC") and "shipped" not in name)
    scores = {name: _flat(works[name]()) for name in (plain, *faster)}
    of = (
        f"{n.rpartition(', ')[2]} {torch.corrcoef(torch.stack([scores[plain], scores[n]]))[0, 1]:.4f}" for n in faster
    )
    return ", ".join(of)


def _flat(scores: object) -> Tensor:
    assert isinstance(scores, Tensor)
    return scores.flatten().double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=list(PROBLEMS), action="append", help="one of the two; both if omitted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="seconds only")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="write the table as .json or .md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    names = options.problem or list(PROBLEMS)
    with tempfile.TemporaryDirectory() as folder:
        if options.memory_of:
            saved, variant = options.memory_of
            problem = pickle.loads(Path(saved).read_bytes())
            plain_epoch(problem, problem.fitted)()
            print(peak_mebibytes(variants(problem, Path(folder))[variant].prepare))
            return
        rows: list[dict[str, str | float]] = []
        agreements = {}
        for name in names:
            problem = PROBLEMS[name]()
            saved = Path(folder) / f"{name}.pickle"
            saved.write_bytes(pickle.dumps(problem))
            known = variants(problem, Path(folder))
            works = {variant: what.prepare() for variant, what in known.items()}
            for work in works.values():
                work()
            gc.collect()
            gc.freeze()
            found = interleaved({variant: partial(timed, work) for variant, work in works.items()}, options.rounds)
            lines = {variant: _line(name, variant, what, found) for variant, what in known.items()}
            rows += lines.values()
            for whose in ("kronfluence", "ours"):
                agreements[f"correlation with the plain scores of {whose} on {name}"] = agreement(works, whose)
            report("The cost of curvature", rows, options.out, rounds=options.rounds, **agreements)
            for variant, line in lines.items():  # each takes as long as what it prepares: the seconds are safe already
                if not (options.no_memory or variant.startswith(("plain", "bare")) or "shipped" in variant):
                    line["peak MiB"] = round(measured_apart(saved, variant), 1)
            report("The cost of curvature", rows, options.out, rounds=options.rounds, **agreements)


def _line(problem: str, name: str, variant: Variant, found: Rounds) -> dict[str, str | float]:
    epochs, bare = found.row(name, variant.epoch), found.row(name, variant.bare)
    spread = {"epochs": epochs["ratio"], "least": epochs["least"], "most": epochs["most"]}
    return {"problem": problem, "what": name, "CPU s": epochs["CPU s"], **spread, "bare": bare["ratio"]}


if __name__ == "__main__":
    main()
