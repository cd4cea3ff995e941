"""Uses of selected parameters outside their layer's own call, seen through a torch function mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_influence.gradients.selection import Selection


@dataclass(frozen=True)
class LayerUse:
    """A call of a layer, or of a function that does what the layer does, with selected parameters.

    Attributes:
        layer: the layer, or a stand-in of the type whose rule applies.
        names: the layer's own names of the selected parameters to their full names.
        args, kwargs: what the layer was called with, parameters excluded.
    """

    layer: nn.Module
    names: Mapping[str, str]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    return nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> nn.Module:
    num_words, width = weight.shape
    return nn.Embedding(num_words, width, padding_idx, None, norm_type, scale_grad_by_freq, sparse, device="meta")


def _convolution(kind: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]) -> Callable[..., nn.Module]:
    def stand_in(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> nn.Module:
        def each(value: Any) -> Any:
            """One number, or a sequence of one number, stands for every dimension."""
            return value if isinstance(value, int | str) else value[0] if len(value) == 1 else tuple(value)

        return kind(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),  # type: ignore[arg-type]
            each(stride),
            each(padding),
            each(dilation),
            groups,
            bias is not None,
            device="meta",
        )

    return stand_in


_STAND_INS: dict[Any, Callable[..., nn.Module]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.embedding: lambda weight, input, padding_idx=-1, scale_grad_by_freq=False, sparse=False: _embedding(
        input, weight, None if padding_idx < 0 else padding_idx, None, 2.0, scale_grad_by_freq
    ),
    F.conv1d: _convolution(nn.Conv1d),
    F.conv2d: _convolution(nn.Conv2d),
    F.conv3d: _convolution(nn.Conv3d),
}
_ORDERS: dict[Any, tuple[str, ...]] = {torch.embedding: ("weight", "input")}


class FunctionalUses(TorchFunctionMode):
    """Watches every torch function for selected parameters among its arguments.

    Args:
        selection: the selected parameters.
        own_call: tells whether a layer that answers for the parameter is running.
        watch: receives each use that has a rule, with its output, and returns the output to go on with.
        left_out: receives, by parameter name, the other uses that were seen.
    """

    def __init__(
        self,
        selection: Selection,
        own_call: Callable[[str], bool],
        watch: Callable[[LayerUse, Tensor], Any],
        left_out: dict[str, set[str]],
    ) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in selection.parameters.items()}
        self._ids = frozenset(self._names)
        self._input_only = selection.input_only
        self._own_call, self._watch, self._left_out = own_call, watch, left_out
        self.found = False  # a use that is captured

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._ids.isdisjoint(map(id, args)) and (not kwargs or self._ids.isdisjoint(map(id, kwargs.values()))):
            return output
        return self._foreign(func, args, kwargs, output) if torch.is_grad_enabled() else output

    def _foreign(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        bound = dict(zip(_ORDERS.get(func, ("input", "weight", "bias")), args, strict=False)) | kwargs
        look_up = func in (F.embedding, torch.embedding)
        captured: dict[str, str] = {}
        for local in ("weight", "bias") if func in _STAND_INS else ():
            name = self._names.get(id(bound.get(local)))
            if name is not None and not self._own_call(name) and (look_up or name not in self._input_only):
                captured[local] = name
        if _differentiable(output) and all(output is not value for value in args):
            for value in (*args, *kwargs.values()):
                name = self._names.get(id(value))
                if name is not None and name not in captured.values() and not self._own_call(name):
                    self._left_out.setdefault(name, set()).add(_title(func))
        if not captured or not isinstance(output, Tensor):
            return output
        self.found = True
        return self._watch(LayerUse(_STAND_INS[func](*args, **kwargs), captured, (bound["input"],), {}), output)


def _differentiable(output: Any) -> bool:
    """Looking at a shape or at ``.data`` is no use of a parameter; what carries a gradient on is."""
    parts = output if isinstance(output, tuple | list) else (output,)
    return any(isinstance(part, Tensor) and part.requires_grad for part in parts)


def _title(func: Any) -> str:
    """``linear``, ``matmul``, and ``T`` for a property."""
    name = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name
