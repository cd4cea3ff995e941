"""Target parameters K of generalized influence functions: the entries of a model's parameters that may change.

K is a mask over parameters. `chosen_units` fills it layer by layer with the most important output units, as Lyu, Jang,
Ryu and Yang (2023, arXiv:2312.05586) do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.errors import CaptureError
from lightning_influence.gradients.blocks import GradientBlock, Gradients

_WITH_UNITS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerShare:
    """How much of a layer is in K.

    Attributes:
        layer: name of the layer, which its parameters' names begin with; empty for the model itself.
        selected, total: trained entries of the layer that are in K, and all of them.
        whole_rows, rows: output rows all of whose trained entries (weight and bias) are in K, and all rows.
    """

    layer: str
    selected: int
    total: int
    whole_rows: int
    rows: int


@dataclass(frozen=True, eq=False)
class TargetParameters:
    """K, the entries of a model's trained parameters that may change (Lyu et al. 2023, arXiv:2312.05586).

    Attributes:
        masks: True where an entry is in K: bool, shaped like the parameter, on the CPU. In the module's order;
            parameters without an entry in K are left out.
        shapes: of all trained parameters of the model that K belongs to, in the module's order.
        origin: how K was chosen, as plain JSON: the rule, and where they matter ratio, seed and number of samples.

    Errors:
        CaptureError: a mask that is not bool, or has another name or shape than the parameters; K is empty.
    """

    masks: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    origin: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, mask in self.masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise CaptureError(
                    f"the mask of {name!r} does not say which entries are chosen",
                    expected="a tensor of dtype bool",
                    found=str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__,
                    hint="pass for example scores > threshold",
                )
        _compare(_shapes(self.masks), self.shapes, "the trained parameters of the model")
        held = {name: self.masks[name] for name in self.shapes if name in self.masks and bool(self.masks[name].any())}
        if not held:
            raise CaptureError(
                "there are no target parameters",
                expected="at least one entry of a trained parameter",
                found="none" if self.shapes else "a model without trained parameters",
                hint="choose more, or TargetParameters.everything(module)",
            )
        object.__setattr__(self, "masks", {name: mask.to("cpu", copy=True) for name, mask in held.items()})

    @classmethod
    def of(cls, module: nn.Module, masks: Mapping[str, Tensor]) -> TargetParameters:
        """K as it is given: by full parameter name a bool mask of that parameter's shape.

        Errors:
            CaptureError: names that are no trained parameters, other shapes, masks that are not bool, or no entry.
        """
        return cls(masks, _trained(module), {"rule": "masks"})

    @classmethod
    def everything(cls, module: nn.Module) -> TargetParameters:
        """All trained parameters: with it GIF, PIF and FIF are the ordinary influence function.

        Errors:
            CaptureError: nothing is trained.
        """
        shapes = _trained(module)
        masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
        return cls(masks, shapes, {"rule": "everything", "ratio": 1.0})

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that have entries in K, in the module's order."""
        return tuple(self.masks)

    @property
    def size(self) -> int:
        """|K|, the number of entries."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def total(self) -> int:
        """P, the number of entries of all trained parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def ratio(self) -> float:
        """|K| / P."""
        return self.size / self.total

    def restricted(self, gradients: Gradients) -> dict[str, GradientBlock]:
        """v_K embedded again: entries outside K set to zero, parameters without entries in K dropped.

        Errors:
            CaptureError: the gradients lack a parameter of K, or have it in another shape.
        """
        _compare(_shapes(self.masks), {name: block.shape for name, block in gradients.items()}, "these gradients")
        return {name: gradients[name].multiplied(mask) for name, mask in self.masks.items()}

    def flat(self, shapes: Mapping[str, Sequence[int]]) -> Tensor:
        """Which entries are in K, (P,) bool, over parameters laid end to end in the order of `shapes`.

        Errors:
            CaptureError: a parameter of K is not among them, or has another shape there.
        """
        _compare(_shapes(self.masks), shapes, "this layout")
        nothing = {name: torch.zeros(math.prod(shape), dtype=torch.bool) for name, shape in shapes.items()}
        return torch.cat([self.masks.get(name, none).flatten() for name, none in nothing.items()])

    def check(self, parameters: Mapping[str, Sequence[int]]) -> None:
        """Refuse the parameters (shapes by full name) of another model than K's; frozen ones may be among them.

        Errors:
            CaptureError: the first trained parameter of K's model that is missing or has another shape, by name.
        """
        _compare(self.shapes, parameters, "this model")

    def check_trained(self, trained: Collection[str]) -> None:
        """Refuse a model in which other parameters are trained now than when K was chosen.

        Errors:
            CaptureError: parameters that are frozen now, and parameters that were frozen then, by name.
        """
        frozen = [name for name in self.shapes if name not in trained]
        new = [name for name in trained if name not in self.shapes]
        if frozen or new:
            told = [f"{', '.join(names)} {what}" for names, what in ((frozen, "frozen"), (new, "trained")) if names]
            raise CaptureError(
                "other parameters are trained now than when the target parameters were chosen",
                expected=f"{', '.join(self.shapes)} trained, and no others",
                found=" and ".join(told),
                hint="choose K again for the model as it is now (choose_target, TargetParameters.of), or set "
                "requires_grad as it was then",
            )

    def shares(self) -> list[LayerShare]:
        """For every layer of which something is in K, how much; in the module's order."""
        layers: dict[str, list[str]] = {}
        for name in self.shapes:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        found = []
        for layer, names in layers.items():
            if not any(name in self.masks for name in names):
                continue
            masks = [self.masks.get(name, torch.zeros(self.shapes[name], dtype=torch.bool)) for name in names]
            rows = (*self.shapes[names[0]], 1)[0]
            alike = [mask.reshape(rows, math.prod(mask.shape[1:])) for mask in masks if (*mask.shape, 1)[0] == rows]
            whole = torch.cat(alike, 1).all(1)  # (rows,)
            counts = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
            found.append(LayerShare(layer, *counts, int(whole.sum()), rows))
        return found

    def __repr__(self) -> str:
        table = [("layer", "selected / total", "whole rows")]
        for share in self.shares():
            cells = f"{share.selected:,} / {share.total:,}", f"{share.whole_rows:,} / {share.rows:,}"
            table.append((share.layer or "(the model)", *cells))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            [
                f"target parameters: {self.size:,} of {self.total:,} ({self.ratio:.2%}), {self.origin.get('rule')}",
                *(f"  {a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in table),
            ]
        )


def unit_layers(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The layers with output units (Linear, Conv1d, Conv2d, Conv3d, and subclasses) whose weight is trained: by layer
    name the weight and, if it is trained too, the bias, by full parameter name. A parameter that several layers share
    counts for the first."""
    names = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    found: dict[str, dict[str, Tensor]] = {}
    for layer_name, layer in module.named_modules():
        if not isinstance(layer, _WITH_UNITS) or id(layer.weight) not in names or not layer.weight.numel():
            continue
        both = (layer.weight, layer.bias)
        found[layer_name] = {names.pop(id(p)): p for p in both if p is not None and id(p) in names}
    return found


def chosen_units(
    module: nn.Module,
    ratio: float,
    importance: Callable[[str], Tensor] | Mapping[str, Tensor],
    origin: Mapping[str, Any],
) -> TargetParameters:
    """The most important output units of every Linear and convolution with a trained weight (Lyu et al. 2023).

    The budget of a layer is ⌊ratio · numel⌋, numel the entries of its weight and trained bias, and ratio the decimal
    number that it reads as (0.29 of 100 is 29). It is spent on whole output rows with their bias by falling importance
    (of equals the lower index first); what is left goes to the first entries of the next row's weight.

    Args:
        ratio: share of every layer, between 0 and 1.
        importance: by layer name (as in `named_modules`) the importance of its units, (out,).
        origin: what is to be remembered of how K was chosen, as plain JSON.

    Errors:
        CaptureError: another ratio; no such layers; a layer of which the ratio selects nothing; importance of another
            length, or NaN.

    >>> model = nn.Sequential(nn.Linear(2, 3))
    >>> target = chosen_units(model, 0.5, {"0": torch.tensor([1.0, 3.0, 2.0])}, {"rule": "by hand"})
    >>> target.masks["0.weight"].int().tolist(), target.masks["0.bias"].int().tolist()
    ([[0, 0], [1, 1], [1, 0]], [0, 1, 0])
    >>> print(target)
    target parameters: 4 of 9 (44.44%), by hand
      layer  selected / total  whole rows
      0                 4 / 9       1 / 3
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise CaptureError(
            "the ratio of target parameters is out of range",
            expected="a number between 0 and 1, such as 0.05",
            found=repr(ratio),
            hint="for all parameters use TargetParameters.everything(module)",
        )
    layers = unit_layers(module)
    sizes = {layer: sum(parameter.numel() for parameter in own.values()) for layer, own in layers.items()}
    exact = Fraction(str(float(ratio)))
    _refuse_empty_budgets(sizes, exact)
    masks: dict[str, Tensor] = {}
    for layer, own in layers.items():
        weight = next(iter(own))
        units = len(own[weight])
        order = _by_falling_importance(layer, units, importance)
        whole, rest = divmod(math.floor(exact * sizes[layer]), sizes[layer] // units)
        for name, parameter in own.items():
            masks[name] = torch.zeros(parameter.shape, dtype=torch.bool)
            masks[name][order[:whole]] = True
        masks[weight].view(units, -1)[order[whole], :rest] = True  # less than a row: its bias is never reached
    return TargetParameters(masks, _trained(module), origin)


def _by_falling_importance(
    layer: str, units: int, importance: Callable[[str], Tensor] | Mapping[str, Tensor]
) -> Tensor:
    """Indices of a layer's units, (out,)."""
    values = importance(layer) if callable(importance) else importance.get(layer)
    if values is None or values.shape != (units,) or bool(values.isnan().any()):
        known = values is not None and values.shape == (units,)
        raise CaptureError(
            f"the importance of the units of layer {layer!r} is {'NaN' if known else 'not one number for each'}",
            expected=f"{units} numbers",
            found="nothing" if values is None else "NaN among them" if known else f"shape {tuple(values.shape)}",
            hint="look at the outputs and the loss of this model for NaN"
            if known
            else "give (out,) values for each layer",
        )
    return values.detach().cpu().sort(descending=True, stable=True).indices


def _refuse_empty_budgets(sizes: Mapping[str, int], ratio: Fraction) -> None:
    """CaptureError if there are no layers, or the ratio selects nothing in the smallest."""
    if not sizes:
        raise CaptureError(
            "the model has no layer whose units could be chosen",
            expected="a Linear, Conv1d, Conv2d or Conv3d with a trained weight",
            found="none",
            hint="say which entries with TargetParameters.of(module, masks), or unfreeze a layer",
        )
    layer, size = min(sizes.items(), key=lambda each: each[1])
    if ratio * size >= 1:
        return
    digits = 10 ** (len(str(size)) + 2)
    least = -(-digits // size) / digits  # 1 / size, rounded up to a few digits
    raise CaptureError(
        f"the ratio selects nothing in layer {layer!r}",
        expected="at least one entry of every layer",
        found=f"a ratio of {float(ratio)} of {size} {'entries' if size > 1 else 'entry'}",
        hint=(f"pass ratio={least} or more, or " if least < 1 else "") + "freeze the layer: requires_grad_(False)",
    )


def _trained(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _compare(wanted: Mapping[str, Sequence[int]], present: Mapping[str, Sequence[int]], what: str) -> None:
    """CaptureError with the first name of `wanted` that `present` lacks, or has in another shape."""
    for name, shape in wanted.items():
        if name not in present or tuple(present[name]) != tuple(shape):
            raise CaptureError(
                f"the target parameters do not fit {what}: parameter {name!r} differs",
                expected=f"shape {tuple(shape)}",
                found=f"shape {tuple(present[name])}" if name in present else "no such parameter",
                hint="K holds for the model that it was chosen for, and goes by the names and shapes of its trained "
                "parameters; choose it again for this one",
            )
