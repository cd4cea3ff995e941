"""Into which layers the parameters of a model fall: word embeddings, blocks, and whatever lies between."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_influence.errors import CaptureError, QueryError
from lightning_influence.gradients import select, word_embeddings


@dataclass(frozen=True)
class Layer:
    """Parameters that are looked at together.

    Attributes:
        name: of the module that they belong to, or what the user called them.
        parameters: their full names, in the order of the model.
    """

    name: str
    parameters: tuple[str, ...]


def layers_of(module: nn.Module) -> tuple[Layer, ...]:
    """The layers of a model, so that every parameter is in one of them, in the order of the model.

    Each word embedding is one; each block, that is a child of a ModuleList, or of a Sequential with several children of
    one type; and of what is left each module with parameters of its own, such as a last LayerNorm and the head.
    """
    canonical = {id(parameter): name for name, parameter in module.named_parameters()}
    owner = {canonical[id(layer.weight)]: name for name, layer in word_embeddings(module)}
    for name, block in _blocks(module):
        for parameter in block.parameters():
            owner.setdefault(canonical[id(parameter)], name)
    found: dict[str, list[str]] = {}
    for name in canonical.values():
        found.setdefault(owner.get(name) or name.rpartition(".")[0] or name, []).append(name)
    return tuple(Layer(name, tuple(names)) for name, names in found.items())


def named_layers(module: nn.Module, wanted: Sequence[str]) -> tuple[Layer, ...]:
    """The layers that a user names, in that order.

    Args:
        wanted: of each a module's name, whose parameters are taken together; or what `GradientSnapshot(parameters=...)`
            takes: `"word_embeddings"`, `"last_layer"`, `"all"`, a glob over parameter names.

    Raises:
        QueryError: nothing is named, one twice, or what the model does not have.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if not names or len(set(names)) < len(names):
        raise QueryError(
            "these layers cannot be compared",
            expected="different names of layers",
            found=", ".join(names) or "none",
            hint="leave `layers` out for the word embeddings, every block and the last layer",
        )
    return tuple(Layer(name, _meant(module, name)) for name in names)


def held(layers: Sequence[Layer], known: Collection[str]) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """What can be compared where the gradients of some parameters are known; and the names of layers without any."""
    parts = [Layer(layer.name, tuple(name for name in layer.parameters if name in known)) for layer in layers]
    return tuple(part for part in parts if part.parameters), tuple(part.name for part in parts if not part.parameters)


def _meant(module: nn.Module, wanted: str) -> tuple[str, ...]:
    modules = {name: part for name, part in module.named_modules() if name and any(True for _ in part.parameters())}
    if wanted in modules:
        inside = {id(parameter) for parameter in modules[wanted].parameters()}
        return tuple(name for name, parameter in module.named_parameters() if id(parameter) in inside)
    try:
        return select(module, wanted).names
    except CaptureError as error:
        known = [*modules, *(name for name, _ in module.named_parameters())]
        close = difflib.get_close_matches(wanted, known, n=5, cutoff=0.3) or known[:5]
        raise QueryError(
            f"this model has no layer {wanted!r}",
            expected="a module's name, 'word_embeddings', 'last_layer', or a glob over parameter names",
            found=wanted,
            hint=f"layers of this model are for example {', '.join(close)}",
        ) from error


def _blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Repeated parts of a model by name; parts of blocks are none."""
    inside: list[str] = []
    for name, part in module.named_modules():
        if not isinstance(part, nn.ModuleList | nn.Sequential) or any(f"{name}.".startswith(b) for b in inside):
            continue
        children = [(f"{name}.{n}", c) for n, c in part.named_children() if any(True for _ in c.parameters())]
        if isinstance(part, nn.ModuleList) or len({type(child) for _, child in children}) < len(children):
            inside += [f"{child}." for child, _ in children]
            yield from children
