"""Which tokens each sample of a batch consists of, as they go through the word embeddings of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_influence.gradients import word_embeddings

_PADDING = -1


@dataclass(frozen=True)
class LookUp:
    """Token ids on their way through a word embedding.

    Attributes:
        table: full name of the embedding's weight; layers that share a weight share its first name.
        ids: as they came, such as (N, T), with -1 for padding.
    """

    table: str
    ids: Tensor


@contextmanager
def token_look_ups(module: nn.Module) -> Iterator[list[LookUp]]:
    """Collects the token ids that go through the word embeddings while it is active, one entry for each look-up."""
    seen: list[LookUp] = []
    names = {id(parameter): name for name, parameter in module.named_parameters()}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args:
            padding, ids = getattr(layer, "padding_idx", None), args[0].detach().cpu()
            ids = ids if padding is None else torch.where(ids == padding, _PADDING, ids)
            seen.append(LookUp(names.get(id(layer.weight), ""), ids))

    with ExitStack() as stack:
        for _, layer in word_embeddings(module):
            stack.callback(layer.register_forward_pre_hook(note).remove)
        yield seen


def token_sequences(seen: Sequence[LookUp], num_samples: int, table: str | None = None) -> list[list[int]]:
    """Each sample's token ids in order, padding left out; the texts of a pair one after the other.

    `table` takes the look-ups in that weight alone: two embeddings may have two vocabularies, and one id be two words.

    Look-ups of anything but `num_samples` rows (N, T, ...) say nothing about samples and are passed over; one that is
    repeated, by another forward pass over the same batch, counts once.
    """
    texts: list[Tensor] = []
    for ids in (look_up.ids for look_up in seen if table in (None, look_up.table)):
        if ids.ndim >= 2 and len(ids) == num_samples and not any(torch.equal(ids, text) for text in texts):
            texts.append(ids)
    return [[t for ids in texts for t in ids[i].flatten().tolist() if t != _PADDING] for i in range(num_samples)]
