"""What an edit costs: a product with the Hessian beside a double backward by hand, an iteration of GIF beside both.

    python recipes/benchmarks/edit_cost.py --rounds 5 --out recipes/results/edit_cost.md

A ResNet-style network of 56 thousand parameters on random 28x28 images, a tenth of the parameters in K. The double
backward by hand walks the same batches, already collated, and does nothing else. A solve is divided by its iterations;
what it does before and after them (the first product, the check of the residual) is spread over them.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence import TargetParameters, choose_target
from lightning_influence.curvature import Absolute, Generalized, MatrixFree, Solver, TrainingEvidence
from lightning_influence.gradients import Dense, select
from lightning_influence.replay import TrainingData
from recipes.benchmarks.measuring import interleaved, report, timed
from recipes.images.models import ImageClassifier, resnet_style

ITERATIONS, SAMPLES, BATCH = 20, 1024, 128


def by_hand(module: ImageClassifier, batches: list[tuple[Tensor, Tensor]], v: list[Tensor]) -> list[Tensor]:
    """H v of the mean loss, as one would write it."""
    parameters = list(module.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for inputs, labels in batches:
        loss = F.cross_entropy(module(inputs), labels, reduction="sum") / SAMPLES
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        for part, found in zip(total, torch.autograd.grad(gradients, parameters, v), strict=True):
            part += found
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*stopped before its tolerance")
    module = ImageClassifier(resnet_style, channels=1, size=28, classes=10, learning_rate=0.1).eval()
    dataset = TensorDataset(torch.randn(SAMPLES, 1, 28, 28), torch.randint(0, 10, (SAMPLES,)))
    loader = DataLoader(dataset, batch_size=BATCH)
    batches = [(inputs, labels) for inputs, labels in loader]
    evidence = TrainingEvidence(module, select(module, "all"), TrainingData.of(loader, forked=True))
    curvature = MatrixFree("hessian").collect(evidence)
    v = {name: Dense(torch.randn(1, *p.shape)) for name, p in module.named_parameters()}
    flat = [block.dense()[0] for block in v.values()]
    product = curvature.matvec(v)
    for found, block in zip(by_hand(module, batches, flat), product.values(), strict=True):
        torch.testing.assert_close(block.dense()[0], found, rtol=1e-3, atol=1e-6)
    target: TargetParameters = choose_target(module, loader, ratio=0.1)
    solver = Solver("minres", tolerance=1e-12, max_iterations=ITERATIONS)

    def solve() -> None:
        answer = Generalized(target, solver).change(curvature, v, Absolute(0.01))
        assert answer.iterations == ITERATIONS, answer.iterations

    measured = interleaved(
        {
            "double backward by hand": lambda: timed(lambda: by_hand(module, batches, flat)),
            "product with the Hessian": lambda: timed(lambda: curvature.matvec(v)),
            "GIF, one iteration": lambda: timed(solve) / ITERATIONS,
        },
        options.rounds,
    )
    rows = [
        measured.row("product with the Hessian", "double backward by hand", **{"beside": "double backward by hand"}),
        measured.row("GIF, one iteration", "product with the Hessian", **{"beside": "product with the Hessian"}),
    ]
    report("The cost of an edit", rows, options.out, samples=SAMPLES, rounds=options.rounds)


if __name__ == "__main__":
    main()
