"""Random signs and bases that belong to a name and a seed: the same on any machine and device, however they are cut."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.gradients.counter import INCREMENT, mixed, normal


def key_of(seed: int, *names: str) -> int:
    """A 64-bit number for a seed and names."""
    text = "\0".join([str(seed), *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def signs(key: int, places: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Numbers +1 and -1, (n, count): row i is a function of the key and of places[i] alone.

    Every bit of a mixed counter is a sign.

    Args:
        places: (n,) int64.
    """
    words = -(-count // 64)
    counters = places[:, None] * words + torch.arange(words, device=places.device)  # (n, words)
    octets = mixed(key + counters * INCREMENT).view(torch.uint8)  # (n, 8 words)
    bits = torch.arange(256, device=places.device)[:, None] >> torch.arange(8, device=places.device)
    table = ((bits & 1) * 2 - 1).to(dtype)  # (256, 8)
    return F.embedding(octets.int(), table).flatten(1)[:, :count]


def orthonormal(key: int, size: int, rank: int) -> Tensor:
    """Random orthonormal columns (size, rank), rank <= size, float64 on the CPU; no direction is preferred."""
    counters = torch.arange(size * rank).view(size, rank)
    basis, triangle = torch.linalg.qr(normal(mixed(key + counters * INCREMENT)))
    unique: Tensor = basis * triangle.diagonal().sign()  # otherwise the signs are a matter of the algorithm
    return unique
