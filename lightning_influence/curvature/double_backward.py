"""A context in which a model can be differentiated twice, also through what torch runs in a form that cannot be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_influence.errors import CurvatureError

# What torch says of a function that has no second derivative, in its own words.
_COMPLAINTS = (
    "is not implemented",
    "once_differentiable",
    "Double backwards is not supported",
    "does not support double backward",
)


@contextmanager
def twice_differentiable(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Run the module so that its outputs can be differentiated twice in `parameters`, frozen ones too.

    Attention runs as plain products (the fused kernels have no second derivative), EmbeddingBag as a look-up and a sum,
    sparse look-ups dense, recurrent layers without cuDNN; values stay the same up to rounding. Flags are put back.
    """
    parameters = list(parameters)
    with ExitStack() as stack:
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_()
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(part, nn.RNNBase) for part in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_SmoothLookUps())
        yield


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Say in the library's words that a function of the model has no second derivative.

    Raises:
        CurvatureError: in place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(complaint in str(error) for complaint in _COMPLAINTS):
            raise
        raise not_twice(str(error).splitlines()[0]) from error


def not_twice(found: str) -> CurvatureError:
    """The error that says so."""
    return CurvatureError(
        "this model cannot be differentiated twice",
        expected="functions with a double backward",
        found=found,
        hint="take EKFAC() or Diagonal(), which need first derivatives only; EmbeddingBag(mode='max'), activation "
        "checkpointing with use_reentrant=True and autograd functions of your own, in Triton or CUDA, can be such "
        "functions",
    )


def refuse_reentrant_checkpoints(output: Tensor) -> None:
    """Refuse a graph that is to be made in the backward pass only: a derivative towards parameters passes it by.

    Raises:
        CurvatureError: there is such a part.
    """
    waiting = [output.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise not_twice("activation checkpointing with use_reentrant=True")
        after = {other for other, _ in node.next_functions} - seen
        waiting += after
        seen |= after


class _SmoothLookUps(TorchFunctionMode):
    """Says `embedding_bag` and sparse `embedding` by functions that can be differentiated twice."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.embedding and func is not F.embedding_bag:
            return func(*args, **(kwargs or {}))
        bound = inspect.signature(func).bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        given = {**bound.arguments, "sparse": False, "scale_grad_by_freq": False}  # these say how, not what
        if func is F.embedding:
            return F.embedding(**given)
        per_sample_weights: Tensor | None = given["per_sample_weights"]
        learns = given["weight"].requires_grad or (per_sample_weights is not None and per_sample_weights.requires_grad)
        if given["mode"] == "max" or not (learns and torch.is_grad_enabled()):
            return func(*args, **(kwargs or {}))
        return _gathered(**given)


def _gathered(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
    **renormalisation: Any,
) -> Tensor:
    """`F.embedding_bag` as a look-up and a sum over each bag, (bags, D)."""
    words, owners, bags = _owners(input, offsets, include_last_offset)
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.reshape(-1)[: len(words)]
    if padding_idx is not None:
        kept = words != padding_idx % len(weight)
        words, owners = words[kept], owners[kept]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[kept]
    rows = F.embedding(words, weight, **renormalisation)  # (M, D)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(1).to(rows)
    if mode == "mean":
        rows = rows / torch.bincount(owners, minlength=bags).clamp_min(1)[owners, None]
    return rows.new_zeros(bags, weight.shape[1]).index_add(0, owners, rows)


def _owners(input: Tensor, offsets: Tensor | None, include_last_offset: bool) -> tuple[Tensor, Tensor, int]:
    """Words (M,), the bag of each (M,), and the number of bags."""
    if offsets is None:
        bags, length = input.shape
        return input.reshape(-1), torch.arange(bags, device=input.device).repeat_interleave(length), bags
    ends = offsets[1:]
    if not include_last_offset:
        ends = torch.cat([ends, ends.new_full((1,), len(input))])
    sizes = ends - offsets[: len(ends)]
    owners = torch.arange(len(ends), device=input.device).repeat_interleave(sizes)
    return input[: len(owners)], owners, len(ends)
