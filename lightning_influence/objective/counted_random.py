"""Random numbers that belong to a sample: the same for it in whatever batch, order or process it is drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.gradients.counter import INCREMENT, mixed, normal, uniform


def uniforms(seed: int, draw: int, sample_ids: Tensor, count: int) -> Tensor:
    """Numbers in (0, 1), (N, count) float64, each a function of (seed, draw, sample id, place) alone.

    Args:
        seed: of the whole run.
        draw: number of the pass.
        sample_ids: (N,) int64.
        count: numbers for each sample.
    """
    return uniform(_bits(seed, draw, sample_ids, count))


def normals(seed: int, draw: int, sample_ids: Tensor, count: int) -> Tensor:
    """Standard normal numbers (N, count) float64, likewise."""
    return normal(_bits(seed, draw, sample_ids, count))


def _bits(seed: int, draw: int, sample_ids: Tensor, count: int) -> Tensor:
    """Mixed twice, so that neighbouring samples share nothing."""
    keys = mixed(sample_ids.long() + mixed(torch.tensor(seed * 1_000_003 + draw, device=sample_ids.device)))
    return mixed(keys[:, None] + torch.arange(count, device=sample_ids.device) * INCREMENT)  # (N, count)
