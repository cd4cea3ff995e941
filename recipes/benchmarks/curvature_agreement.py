"""K-FAC and EK-FAC of this library beside those of curvlinops and kronfluence, layer by layer, in float64.

    /tmp/peers/bin/python recipes/benchmarks/curvature_agreement.py --out recipes/results/curvature_agreement.md

It needs the environment of the peers (README.md here says how). Labels are those observed (the empirical Fisher), so
that nothing is drawn. Small classifiers with Linear and Conv2d layers, trained for 30 steps. Errors are the largest
difference over the largest value of the peer's, for the gradients of the queries of a layer: `H v` of the product with
the curvature, `solve` of (H + λI)⁻¹ v with λ = 1e-4, `scores` of all scores that a layer gives, at the damping of a
tenth of its mean eigenvalue. Correlations are those of the scores of all layers together.

Conventions that are mapped. All: weight and bias are one matrix, the bias its last column. Curvlinops: its mean loss is
scaled back to single samples by itself (KFAC-expand: A is a mean over positions, G a sum); its damping is one number
for all layers, taken exactly. Kronfluence: its loss is a sum over samples; its G is a mean over positions, where ours
and curvlinops' is a sum over them. Its K-FAC is therefore ours divided by the mean number of positions of a sample in
that layer, T; errors are those of T times its H, and its scores over T.

Conventions that are not. Positions without any gradient do not count in our A: those behind max-pooling and ReLU, and
padding. Both peers count them, but for padding that kronfluence is told of. EK-FAC's eigenvalues are measured over
whole samples, where positions without gradient say nothing: there only the basis differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence.curvature import EKFAC, KFAC, Absolute, Curvature, Damping, Relative, TrainingEvidence
from lightning_influence.gradients import Dense, Gradients, select
from lightning_influence.replay import TrainingData
from recipes.benchmarks.explained import Explained
from recipes.benchmarks.measuring import Row, report
from recipes.benchmarks.peers.curvlinops import curvlinops_inverse, curvlinops_operator, per_sample_gradients
from recipes.benchmarks.peers.kronfluence import Kronfluence
from recipes.truths.training import Build, initial

Kind = Literal["kfac", "ekfac"]
SAMPLES, QUERIES, VOCABULARY, LENGTH, WIDTH, CLASSES, PADDING = 200, 20, 50, 12, 16, 4, 0
DAMPING = 1e-4  # of `solve`
STATISTICS = {"kfac": KFAC(), "ekfac": EKFAC()}
SHOWN = {"kfac": "K-FAC", "ekfac": "EK-FAC"}


class TextClassifier(nn.Module):
    """One pre-norm transformer block over word ids (B, T), PADDING left out, averaged into logits (B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.wide, self.narrow, self.head = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        real = (words != PADDING).unsqueeze(2)  # (B, T, 1)
        hidden = self.words(words)
        normed = self.norms[0](hidden)
        strengths = self.query(normed) @ self.key(normed).transpose(1, 2) / WIDTH**0.5
        weights = strengths.masked_fill(~real.transpose(1, 2), -torch.inf).softmax(2)
        hidden = hidden + self.out(weights @ self.value(normed))
        hidden = hidden + self.narrow(F.gelu(self.wide(self.norms[1](hidden))))
        logits: Tensor = self.head((hidden * real).sum(1) / real.sum(1))
        return logits


def mlp() -> nn.Module:
    """64-32-16-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))


def strided_cnn() -> nn.Module:
    """Two strided convolutions; tanh, so that every position has a gradient."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def pooled_cnn() -> nn.Module:
    """Two convolutions with ReLU and max-pooling, which leave many positions without a gradient."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def images() -> tuple[Tensor, Tensor]:
    """Some of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: SAMPLES + QUERIES]
    return torch.from_numpy(inputs / 16)[chosen].view(-1, 1, 8, 8), torch.from_numpy(labels)[chosen].long()


def texts() -> tuple[Tensor, Tensor]:
    """Texts of one length; the class is told by which words are frequent."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (SAMPLES + QUERIES,), generator=draw)
    words = torch.randint(1, VOCABULARY, (len(labels), LENGTH), generator=draw)
    return torch.where(words % 3 == 0, 1 + labels.unsqueeze(1), words), labels


def padded_texts() -> tuple[Tensor, Tensor]:
    """The texts cut to lengths between 6 and LENGTH, and filled up with PADDING."""
    words, labels = texts()
    lengths = torch.randint(6, LENGTH + 1, (len(words), 1), generator=torch.Generator().manual_seed(1))
    return words.masked_fill(torch.arange(LENGTH) >= lengths, PADDING), labels


@dataclass(frozen=True)
class Problem:
    """A classifier and its data.

    Args:
        name: in the table.
        build: makes the model.
        data: inputs and labels of training samples and queries, in that order.
        padding: what kronfluence is told not to count.
        differs: why the figures are not all 0.
    """

    name: str
    build: Build
    data: Callable[[], tuple[Tensor, Tensor]]
    padding: int | None = None
    differs: str = ""

    def trained(self) -> tuple[nn.Module, TensorDataset, TensorDataset]:
        """The model in float64 and eval mode, the training set, and the queries."""
        inputs, labels = self.data()
        train = TensorDataset(inputs[:SAMPLES], labels[:SAMPLES])
        model = initial(self.build, 0).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            F.cross_entropy(model(train.tensors[0]), train.tensors[1]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return model.eval(), train, TensorDataset(inputs[SAMPLES:], labels[SAMPLES:])


WEIGHED = "a layer's scores are T times ours, so layers weigh otherwise in the sum"
PROBLEMS = (
    Problem("MLP", mlp, images),
    Problem("CNN, strided", strided_cnn, images, differs=f"kronfluence K-FAC: {WEIGHED}"),
    Problem("transformer", TextClassifier, texts, differs=f"kronfluence K-FAC: {WEIGHED}"),
    Problem(
        "CNN, max-pooling",
        pooled_cnn,
        images,
        differs=f"positions without gradient count in the peers' A, not in ours; kronfluence K-FAC: {WEIGHED}",
    ),
    Problem(
        "transformer, padding",
        TextClassifier,
        padded_texts,
        differs=f"padding counts in the peers' A, not in ours; kronfluence K-FAC: {WEIGHED}",
    ),
    Problem(
        "transformer, padding told",
        TextClassifier,
        padded_texts,
        padding=PADDING,
        differs=f"padding counts in curvlinops' A, not in ours; kronfluence K-FAC: {WEIGHED}",
    ),
)


@dataclass(frozen=True)
class Layers:
    """The layers of a model, each a matrix (O, I + 1) with the bias as its last column."""

    shapes: Mapping[str, tuple[tuple[int, ...], int]]  # of the weight; number of parameters

    @staticmethod
    def of(model: nn.Module) -> Layers:
        """All Linear and Conv2d layers, in order."""
        found = {n: layer for n, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
        return Layers(
            {n: (tuple(layer.weight.shape), sum(p.numel() for p in layer.parameters())) for n, layer in found.items()}
        )

    def parts(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each layer's part of vectors (Q, P), as curvlinops and `per_sample_gradients` lay them: (Q, p)."""
        start = 0
        for name, (_, size) in self.shapes.items():
            yield name, flat[:, start : start + size]
            start += size

    def matrix(self, name: str, part: Tensor) -> Tensor:
        """A layer's part (Q, p) as matrices (Q, O, I + 1)."""
        outputs = self.shapes[name][0][0]
        return torch.cat([part[:, :-outputs].view(len(part), outputs, -1), part[:, -outputs:].unsqueeze(2)], 2)

    def ours(self, flat: Tensor) -> dict[str, Dense]:
        """Vectors (Q, P) as this library names them."""
        found: dict[str, Dense] = {}
        for name, part in self.parts(flat):
            shape = self.shapes[name][0]
            found[f"model.{name}.weight"] = Dense(part[:, : -shape[0]].reshape(-1, *shape))
            found[f"model.{name}.bias"] = Dense(part[:, -shape[0] :])
        return found

    def flat(self, vectors: Gradients) -> Tensor:
        """The inverse of `ours`."""
        names = [f"model.{name}.{part}" for name in self.shapes for part in ("weight", "bias")]
        return torch.cat([vectors[name].dense().flatten(1) for name in names], 1)


def our_curvature(kind: Kind, model: nn.Module, train: TensorDataset, layers: Layers) -> Curvature:
    """This library's, with the labels observed."""
    module = Explained(model).eval()
    names = [f"model.{name}.{part}" for name in layers.shapes for part in ("weight", "bias")]
    data = TrainingData.of(DataLoader(train, 50))
    return STATISTICS[kind].collect(TrainingEvidence(module, select(module, names), data, labels="observed"))


class KronfluenceFactors:
    """What kronfluence fitted, as a matrix for each layer and as scores."""

    def __init__(self, problem: Problem, kind: Kind, model: nn.Module, train: TensorDataset, folder: Path) -> None:
        self.kind, self.train = kind, train
        self.analysis = Kronfluence(model, folder, padding=problem.padding)
        self.analysis.fit(kind, train, batch_size=50, observed=True, dtype=torch.float64)
        analyzer = self.analysis.analyzer
        self.factors: dict[str, dict[str, Tensor]] = {
            **analyzer.load_covariance_matrices(kind),
            **analyzer.load_eigendecomposition(kind),
            **(analyzer.load_lambda_matrices(kind) if kind == "ekfac" else {}),
        }

    def positions(self, name: str) -> float:
        """Mean number of positions of a sample in a layer."""
        counted: Tensor = self.factors["num_gradient_covariance_processed"][name]
        return float(counted) / len(self.train)

    def scale(self, name: str) -> float:
        """By which its curvature is smaller than ours, by convention."""
        return self.positions(name) if self.kind == "kfac" else 1.0

    def matvec(self, name: str, v: Tensor) -> Tensor:
        """H v for matrices (Q, O, I + 1), in our convention."""
        f = self.factors
        if self.kind == "kfac":
            a = f["activation_covariance"][name] / f["num_activation_covariance_processed"][name]
            g = f["gradient_covariance"][name] / f["num_gradient_covariance_processed"][name]
            return (g @ v @ a) * self.scale(name)
        q_a, q_g = f["activation_eigenvectors"][name], f["gradient_eigenvectors"][name]
        eigenvalues = f["lambda_matrix"][name] / f["num_lambda_processed"][name]
        found: Tensor = q_g @ ((q_g.T @ v @ q_a) * eigenvalues) @ q_a.T
        return found

    def scores(self, queries: TensorDataset) -> dict[str, Tensor]:
        """Scores by layer, in its own convention."""
        return self.analysis.scores_by_layer(self.kind, queries, self.train, dtype=torch.float64)


def compared(problem: Problem) -> list[Row]:
    """The lines of one problem: a line for each layer, and one for all together."""
    model, train, queries = problem.trained()
    layers = Layers.of(model)
    asked, known = per_sample_gradients(model, queries), per_sample_gradients(model, train)  # (Q, P), (N, P)
    found: dict[str, dict[str, str]] = {name: {"positions": ""} for name in layers.shapes}
    together: dict[str, str] = {}
    for kind in ("kfac", "ekfac"):
        mine = our_curvature(kind, model, train, layers)

        def solved(damping: Damping, mine: Curvature = mine) -> Tensor:
            return layers.flat(mine.solve(layers.ours(asked), damping))

        product = layers.flat(mine.matvec(layers.ours(asked)))
        column = f"curvlinops {SHOWN[kind]}"
        operator = curvlinops_operator(kind, model, train, fisher_type="empirical", batch_size=50)
        inverse = (curvlinops_inverse(operator, DAMPING) @ asked.t()).t()
        pairs = {"H v": (product, (operator @ asked.t()).t()), "solve": (solved(Absolute(DAMPING)), inverse)}
        for what, (here, there) in pairs.items():
            for (name, one), (_, other) in zip(layers.parts(here), layers.parts(there), strict=True):
                found[name][f"{column}, {what}"] = _error(one, other)
        together[f"{column}, solve"] = _correlation(solved(Absolute(DAMPING)) @ known.t(), inverse @ known.t())
        with tempfile.TemporaryDirectory() as folder:
            peer = KronfluenceFactors(problem, kind, model, train, Path(folder))
            theirs = peer.scores(queries)
            column = f"kronfluence {SHOWN[kind]}"
            parts = zip(layers.parts(asked), layers.parts(product), layers.parts(solved(Relative())),
                        layers.parts(known), strict=True)  # fmt: skip
            total = torch.zeros(QUERIES, SAMPLES, dtype=torch.float64)
            for (name, v), (_, hv), (_, inverse_v), (_, gradients) in parts:
                found[name][f"{column}, H v"] = _error(
                    layers.matrix(name, hv), peer.matvec(name, layers.matrix(name, v))
                )
                scores = inverse_v @ gradients.t()
                found[name][f"{column}, scores"] = _error(scores, theirs[name] / peer.scale(name))
                found[name]["positions"] = f"{peer.positions(name):.3g}"
                total += scores
            together[f"{column}, scores"] = _correlation(total, torch.stack(list(theirs.values())).sum(0))
    correlations = {column: f"correlation {value}" for column, value in together.items()}
    return [
        *({"problem": problem.name, "layer": name, **cells} for name, cells in found.items()),
        {"problem": problem.name, "layer": "all, scores", **correlations, "what differs": problem.differs},
    ]


def _error(ours: Tensor, theirs: Tensor) -> str:
    return f"{float((ours - theirs).abs().max() / theirs.abs().max()):.1e}"


def _correlation(ours: Tensor, theirs: Tensor) -> str:
    return f"{float(torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]):.6f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="write the table as .json or .md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = [row for problem in PROBLEMS for row in compared(problem)]
    report("Agreement with the peers, labels observed, float64", rows, options.out, samples=SAMPLES, queries=QUERIES)


if __name__ == "__main__":
    main()
