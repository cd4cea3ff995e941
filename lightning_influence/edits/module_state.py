"""What the function of a module depends on: copies of it, moved weights, and digests by which it is known again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_influence.artifacts.tensor_files import content_digest
from lightning_influence.errors import StoreError

Module = TypeVar("Module", bound=LightningModule)

_COUNTER = "num_batches_tracked"  # of batch normalisation: no output in eval mode depends on it
_DIGITS = 32


def copied(module: Module) -> Module:
    """A copy that shares nothing with the module but its Trainer, which a training_step may ask for the epoch."""
    trainers = {id(v): v for part in module.modules() for v in vars(part).values() if isinstance(v, Trainer)}
    found = copy.deepcopy(module, {**trainers})
    for part, its_copy in zip(module.modules(), found.modules(), strict=True):
        if isinstance(part, LightningModule) and isinstance(its_copy, LightningModule):
            its_copy._trainer = part._trainer  # which it leaves out of copies
    return found


def moved(weight: Tensor, change: Tensor) -> Tensor:
    """A weight and its change, added in the wider type of the two; bit by bit as it was where the change is 0."""
    return torch.where(change == 0, weight, (weight + change).to(weight.dtype))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters, frozen ones too, and all persistent buffers, by full name."""
    found = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            local = name.rpartition(".")[2]
            if local not in part._non_persistent_buffers_set and local != _COUNTER:
                found[name] = buffer.detach()
    return found


def digests(module: nn.Module) -> dict[str, str]:
    """Of everything in `state_of`, what it is known by."""
    dense = {name: t.to_dense() if t.is_sparse else t for name, t in state_of(module).items()}
    return {name: content_digest(name, tensor)[:_DIGITS] for name, tensor in dense.items()}


def check_digests(module: nn.Module, expected: Mapping[str, str]) -> None:
    """Refuse a module with other weights or buffers than those of the digests.

    Raises:
        StoreError: the first that differs, by name.
    """
    found = digests(module)
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise StoreError(
                f"{name!r} is not what the edit was made beside",
                expected=f"all {len(expected)} parameters and buffers as they were, frozen ones too",
                found="no such parameter or buffer"
                if name not in found
                else "a parameter or buffer that was not there"
                if name not in expected
                else "other values, as by training on or by running statistics that have moved",
                hint="pass the module as it was when the edit was made, or make a new edit for this one",
            )
