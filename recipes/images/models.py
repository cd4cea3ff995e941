"""Three small image classifiers whose loss is one fixed function: no batch normalisation, no dropout.

What the experiments of model edits need of a network is a Hessian of the training loss that is the same whoever takes
it. So no layer here behaves differently in training and evaluation, none couples the images of a batch, and the
widths are such that two CPU cores train each in a minute and take Hessian-vector products of thousands of images a
second. Average pooling is as accurate here as the largest value, and faster both forwards and twice backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn


class Architecture(Protocol):
    """Makes a network (B, C, H, W) -> logits (B, classes) for the images of a set."""

    def __call__(self, *, channels: int, size: int, classes: int) -> nn.Module: ...


class ImageClassifier(LightningModule):
    """A network with the mean cross-entropy, SGD, and a learning rate that ends at zero.

    The learning rate rises along a cosine for the first part of the steps and falls along one to nothing, so that
    training ends where it has settled: near a stationary point of the loss with its weight decay.

    Args:
        architecture: makes the network, such as `small_cnn`.
        channels: colours of an image.
        size: its height and width.
        classes: number of classes.
        learning_rate: the largest.
        momentum: of SGD.
        weight_decay: of every parameter, biases too.
        warmup: part of the steps in which the learning rate rises.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        channels: int,
        size: int,
        classes: int,
        learning_rate: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup: float = 0.2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="architecture")
        self.network = architecture(channels=channels, size=size, classes=classes)
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.warmup = warmup

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W)."""
        logits: Tensor = self.network(inputs)
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD and its schedule over all steps of the fit."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=self.warmup,
            cycle_momentum=False,
            final_div_factor=1e4,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def small_cnn(
    *, channels: int, size: int, classes: int, widths: Sequence[int] = (8, 16), hidden: int = 16
) -> nn.Sequential:
    """In the manner of LeNet: 3x3 convolutions that are each halved in size by pooling, and two linear layers.

    14 thousand parameters at 28x28.
    """
    return nn.Sequential(
        *_pooled_convolutions(channels, widths),
        nn.Flatten(),
        nn.Linear(widths[-1] * (size >> len(widths)) ** 2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def vgg_style(
    *, channels: int, size: int, classes: int, widths: Sequence[int] = (16, 32, 64), hidden: int = 64
) -> nn.Sequential:
    """In the manner of VGG: one more and wider convolution than `small_cnn`; 90 thousand parameters at 3x32x32."""
    return small_cnn(channels=channels, size=size, classes=classes, widths=widths, hidden=hidden)


def resnet_style(
    *, channels: int, size: int, classes: int, widths: Sequence[int] = (16, 32, 48), blocks: int = 1
) -> nn.Sequential:
    """In the manner of ResNet: stages of residual blocks, the mean over the places, a linear layer.

    A 5x5 convolution of stride 2 comes first, and each stage but the first halves the size again; 56 thousand
    parameters at any size. In place of normalisation, every block begins as its shortcut (Zhang et al. 2019, Fixup).
    """
    shapes = [(widths[0], widths[0]), *pairwise(widths)]
    stages = [
        [ResidualBlock(inputs, outputs, stride=2 if stage else 1)]
        + [ResidualBlock(outputs, outputs, stride=1) for _ in range(blocks - 1)]
        for stage, (inputs, outputs) in enumerate(shapes)
    ]
    return nn.Sequential(
        nn.Conv2d(channels, widths[0], 5, stride=2, padding=2),
        nn.ReLU(),
        *(block for stage in stages for block in stage),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], classes),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride)
        nn.init.zeros_(self.second.weight)
        assert self.second.bias is not None
        nn.init.zeros_(self.second.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (B, outputs, H / stride, W / stride)."""
        outputs: Tensor = self.shortcut(inputs) + self.second(self.first(inputs).relu())
        return outputs.relu()


def _pooled_convolutions(channels: int, widths: Sequence[int]) -> list[nn.Module]:
    """Convolution, ReLU and pooling for every width."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([channels, *widths]):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    return layers
