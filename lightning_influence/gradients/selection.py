"""Which parameters are captured, and which layers use them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_influence.errors import CaptureError

_NOT_WORDS = re.compile(
    r"(^|[._])(pos|pos_?(emb|embed|enc)\w*|position\w*|wpe|pe|segment\w*|seg_?(emb|embed)\w*|token_type\w*|type_emb\w*"
    r"|relative\w*)([._]|$)"
)


@dataclass(frozen=True, eq=False)
class Selection:
    """Selected parameters and the layers that own them.

    Attributes:
        names: full parameter names in the order of ``module.named_parameters()``.
        parameters: the parameters by full name.
        layers: for each layer, its own (local) parameter names to full names. A MultiheadAttention also
            answers for its ``out_proj``, which it never calls as a module.
        input_only: names chosen as word embeddings: their look-ups are captured and every other use (a tied
            output head) is left out, as TracIn-WE wants it.
        module: the module they belong to.
    """

    names: tuple[str, ...]
    parameters: Mapping[str, nn.Parameter]
    layers: Mapping[nn.Module, Mapping[str, str]]
    input_only: frozenset[str]
    module: nn.Module


def select(module: nn.Module, parameters: str | Sequence[str], *, input_only: Iterable[str] = ()) -> Selection:
    """The parameters that ``parameters`` asks for.

    Args:
        module: the whole model.
        parameters: one or more of

            - ``"word_embeddings"``: the weights of the token look-ups (Embedding and EmbeddingBag), frozen or
              not;
              position, segment and token-type embeddings are left out;
            - ``"last_layer"``: the last Linear that is trained (the last registered one), else the last layer
              with
              parameters;
            - ``"all"``: every trainable parameter;
            - a parameter's name, or a glob over names (``"encoder.*.weight"``), frozen or not; what is a name is no
              glob.
        input_only: full names among them that are to be treated as word embeddings (see ``Selection.input_only``),
            so that a selection can be made again from the names of an earlier one.

    Errors:
        CaptureError: nothing matches; the message lists close names.
    """
    wanted = [parameters] if isinstance(parameters, str) else list(parameters)
    aliases = {name: id(parameter) for name, parameter in module.named_parameters(remove_duplicate=False)}
    canonical = {id(parameter): name for name, parameter in module.named_parameters()}
    chosen: set[str] = set()
    look_ups: set[str] = set()
    for want in wanted:
        if want == "word_embeddings":
            found = {canonical[id(layer.weight)] for _, layer in word_embeddings(module)}
            look_ups |= found - chosen
        else:
            if want == "last_layer":
                found = _last_layer(module, canonical)
            elif want == "all":
                found = {canonical[id(p)] for p in module.parameters() if p.requires_grad}
            else:
                found = {canonical[aliases[name]] for name in meant(want, aliases)}
            look_ups -= found
        if not found:
            raise _nothing(want, list(aliases))
        chosen |= found
    if not chosen:
        raise _nothing("", list(aliases))
    look_ups |= chosen & set(input_only)
    by_name = {name: parameter for name, parameter in module.named_parameters() if name in chosen}
    return Selection(
        names=tuple(by_name),
        parameters=by_name,
        layers=_layers(module, {id(p): name for name, p in by_name.items()}, look_ups),
        input_only=frozenset(look_ups),
        module=module,
    )


def meant(want: str, known: Iterable[str]) -> list[str]:
    """The names that a name or a glob means; what is a name is no glob: keys of a ModuleDict may have "[" in them."""
    names = list(known)
    return [want] if want in names else [name for name in names if fnmatchcase(name, want)]


def word_embeddings(module: nn.Module) -> list[tuple[str, nn.Embedding | nn.EmbeddingBag]]:
    """The token look-ups of a model, by name: what a Hugging Face model calls its input embeddings, else
    every Embedding and EmbeddingBag except those whose name speaks of positions, segments or types (a lone
    one stays)."""
    names = {layer: name for name, layer in module.named_modules()}
    declared: dict[nn.Module, None] = {}
    covered: set[nn.Module] = set()
    for part in module.modules():
        ask = getattr(part, "get_input_embeddings", None)
        if callable(ask):
            try:
                answer = ask()
            except (NotImplementedError, AttributeError):
                continue
            if isinstance(answer, nn.Embedding | nn.EmbeddingBag) and answer in names:
                declared[answer] = None
                covered |= set(part.modules())
    found = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and (layer in declared or layer not in covered)
    ]
    if len(found) > 1:
        words = [(name, layer) for name, layer in found if layer in declared or not _NOT_WORDS.search(name.lower())]
        found = words or found
    return found


def _last_layer(module: nn.Module, canonical: Mapping[int, str]) -> set[str]:
    owners = [layer for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None]
    linear = [layer for layer in owners if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"]
    trained = [layer for layer in linear if any(p.requires_grad for p in layer.parameters(recurse=False))]
    for layers in (trained, linear, owners):
        if layers:
            return {canonical[id(p)] for p in layers[-1].parameters(recurse=False)}
    return set()


def _layers(module: nn.Module, names: Mapping[int, str], look_ups: Iterable[str]) -> dict[nn.Module, dict[str, str]]:
    """Layer → local name → full name, for every layer that owns one of the parameters ``names`` (by id)."""
    look_ups = set(look_ups)
    layers: dict[nn.Module, dict[str, str]] = {}
    answered: set[nn.Module] = set()
    for layer in module.modules():
        if layer in answered:
            continue
        whole = isinstance(layer, nn.MultiheadAttention)
        if whole:
            answered |= set(layer.modules())
        owned = {
            local: names[id(parameter)]
            for local, parameter in layer.named_parameters(recurse=whole, remove_duplicate=False)
            if id(parameter) in names
        }
        if not isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            owned = {local: full for local, full in owned.items() if full not in look_ups}
        if owned:
            layers[layer] = owned
    return layers


def _nothing(want: str, names: list[str]) -> CaptureError:
    close = difflib.get_close_matches(want, names, n=5, cutoff=0.3) or names[:5]
    hint = f"parameters of this model are for example {', '.join(close)}" if close else "this model has no parameters"
    return CaptureError(
        f"the selection {want!r} matches no parameter",
        expected="'word_embeddings', 'last_layer', 'all', or names and globs over parameter names",
        found=want,
        hint=hint,
    )
