"""Numbers made by counting: SplitMix64 (Steele, Lea & Flood 2014) on tensors, the same on any machine and device.

PyTorch's own generators are not: they differ between devices, may differ between versions, and depend on what was drawn
before. Integer arithmetic on a counter has no such memory: a number belongs to the place that asks for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

INCREMENT = -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio in 64 bits
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mixed(x: Tensor) -> Tensor:
    """64 random bits for every int64 entry of a counter; arithmetic wraps as unsigned does."""
    x = x + INCREMENT
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def uniform(bits: Tensor) -> Tensor:
    """Numbers strictly between 0 and 1, float64, from 64 random bits each."""
    return (_shifted(bits, 12).double() + 0.5) * 2.0**-52  # of 53 bits the sum could round to 1


def normal(bits: Tensor) -> Tensor:
    """Standard normal numbers, float64, from 64 random bits each."""
    return torch.erfinv(2 * uniform(bits) - 1) * 2**0.5


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> by) & ((1 << (64 - by)) - 1)
