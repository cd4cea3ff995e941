"""A pretended second device: tensors that compute on the CPU and refuse to meet others there, as CUDA's do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")  # the one name of a device that needs neither hardware nor a driver

_MAY_MEET = {"_to_copy", "copy_", "index", "index_put_", "index_put", "_index_put_impl_", "equal"}


class _There(Tensor):
    """A tensor on the pretended device, around one on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _There:
        place = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.size(), **place, dtype=held.dtype, device=ELSEWHERE)
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """While it is active, `tensor.to(ELSEWHERE)` moves there, factories make tensors there, and `.cpu()` comes back.

    Raises:
        RuntimeError: an operation on tensors here and there, other than those that CUDA allows.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.partition("::")[2]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, _There)]
    here = [tensor for tensor in tensors if not isinstance(tensor, _There) and tensor.ndim > 0]  # numbers may meet all
    indexed_here = name.startswith(("index", "_index")) and not isinstance(tensors[0], _There)
    if there and here and (name not in _MAY_MEET or indexed_here):
        raise RuntimeError(f"tensors of both devices in {name}")
    known = {id(tensor.held): tensor for tensor in there}
    asked = kwargs.get("device")
    given = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    plain, options = tree_map(lambda leaf: leaf.held if isinstance(leaf, _There) else leaf, (args, given))
    found = func(*plain, **options)
    if name == "copy_":
        return args[0]
    if not (there if asked is None else torch.device(asked) == ELSEWHERE):
        return found

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else _There(leaf)

    return tree_map(moved, found)
