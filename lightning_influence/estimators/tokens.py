"""Which tokens each sample of a batch consists of, as they go through the word embeddings of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_influence.gradients import word_embeddings

_PADDING = -1


@contextmanager
def token_look_ups(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the token ids that go through the word embeddings while it is active, a tensor for each look-up."""
    seen: list[Tensor] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args:
            padding, ids = getattr(layer, "padding_idx", None), args[0].detach().cpu()
            seen.append(ids if padding is None else torch.where(ids == padding, _PADDING, ids))

    with ExitStack() as stack:
        for _, layer in word_embeddings(module):
            stack.callback(layer.register_forward_pre_hook(note).remove)
        yield seen


def token_sequences(seen: Sequence[Tensor], num_samples: int) -> list[list[int]]:
    """Each sample's token ids in order, padding left out; the texts of a pair one after the other.

    Look-ups of anything but `num_samples` rows (N, T, ...) say nothing about samples and are passed over; one that is
    repeated, by another forward pass over the same batch, counts once.
    """
    texts: list[Tensor] = []
    for ids in seen:
        if ids.ndim >= 2 and len(ids) == num_samples and not any(torch.equal(ids, text) for text in texts):
            texts.append(ids)
    return [[t for ids in texts for t in ids[i].flatten().tolist() if t != _PADDING] for i in range(num_samples)]
