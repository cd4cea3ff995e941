"""A state_dict as files and back: tied tensors once, a frozen base once for all checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_influence.artifacts.json_values import Fields, Json
from lightning_influence.artifacts.records import Artifact
from lightning_influence.artifacts.tensor_files import TensorFile, as_bytes, check_writable, content_digest
from lightning_influence.errors import StoreError

Place = tuple[str, str]  # the path of a file of frozen tensors, and the tensor's name in it


@dataclass
class Layout:
    """How one state_dict is split over files.

    Args:
        own: the tensors that this checkpoint's own file must hold.
        new_frozen: frozen tensors that no file holds yet.
        digests: checksum of the content of every frozen tensor.
        aliases: tied name -> the name that its tensor is stored under.
        left_out: entries that are not tensors.
    """

    own: dict[str, Tensor] = field(default_factory=dict)
    new_frozen: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


class FrozenTensors:
    """Where each frozen tensor is stored, by content; a tensor that has not changed is not read again."""

    def __init__(self, artifacts: Iterable[Artifact] = ()) -> None:
        self.places: dict[str, Place] = {}
        self._seen: dict[str, tuple[tuple[object, ...], str]] = {}
        for artifact in artifacts:
            self.add(artifact)

    def add(self, artifact: Artifact) -> None:
        digests = Fields(artifact.meta).object("digests")
        for name, content in digests.items():
            self.places.setdefault(str(content), (artifact.path, name))

    def digest(self, name: str, tensor: Tensor) -> str:
        """sha256 over dtype, shape and content.

        Skipped when address, version counter and a plain sum of the tensor's words are those of the last
        call. The sum is there because ``parameter.data = ...`` and ``parameter.data.add_(...)`` (a momentum
        encoder) change a parameter without its version counter, and an allocator hands out the same address
        again.
        """
        version = -1 if tensor.is_inference() else tensor._version
        state = (tensor.data_ptr(), version, tensor.dtype, tensor.shape, tensor.stride(), _word_sum(tensor))
        known = self._seen.get(name)
        if known is not None and known[0] == state:
            return known[1]
        found = content_digest(name, tensor)
        self._seen[name] = (state, found)
        return found


def _word_sum(tensor: Tensor) -> int:
    """Sum of the tensor's bytes as 64-bit words, wrapping around: one pass at the speed of the memory."""
    data = as_bytes(tensor.detach())
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64).sum() if whole else data.new_zeros((), dtype=torch.int64)
    return int(words) + int(data[whole:].sum(dtype=torch.int64))


def lay_out(state: Mapping[str, Any], frozen_names: Collection[str], frozen: FrozenTensors) -> Layout:
    """Split a state_dict: what is tied, what is frozen and already stored, what this checkpoint must write.

    Entries that are not tensors (``_extra_state``, lists of metrics) are left out with a warning, and named
    in the checkpoint's record: no per-sample gradient needs them, and only a pickle could hold them.
    """
    layout = Layout()
    owner: dict[tuple[object, ...], str] = {}
    members: dict[str, list[str]] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            layout.left_out.append(name)
            continue
        check_writable(name, value)
        tensor = value.detach()
        identity: tuple[object, ...] = (name,)
        if tensor.numel():
            identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = owner.setdefault(identity, name)
        members.setdefault(first, []).append(name)
        if first == name:
            layout.own[name] = tensor
        else:
            layout.aliases[name] = first
    new: set[str] = set()
    for name in list(layout.own):
        if not any(member in frozen_names for member in members[name]):
            continue
        tensor = layout.own.pop(name)
        content = layout.digests[name] = frozen.digest(name, tensor)
        if content not in frozen.places and content not in new:
            new.add(content)
            layout.new_frozen[name] = tensor
    if layout.left_out:
        warnings.warn(
            f"the state_dict entries {layout.left_out} are no tensors and are left out of the stored weights; "
            "gradients do not need them, but a model rebuilt from the store lacks them",
            stacklevel=3,
        )
    return layout


def weights_meta(layout: Layout, frozen: FrozenTensors) -> dict[str, Json]:
    """What a weights file's manifest entry must say so that `join` finds everything again."""
    places: dict[str, Json] = {name: list(frozen.places[content]) for name, content in layout.digests.items()}
    return {"aliases": layout.aliases, "frozen": places, "left_out": layout.left_out}


def frozen_files(artifact: Artifact) -> set[str]:
    """The paths of the files of frozen tensors that a weights file refers to."""
    return {path for path, _ in _places(artifact).values()}


def _places(artifact: Artifact) -> dict[str, Place]:
    places = {}
    for name, place in Fields(artifact.meta).object("frozen").items():
        path, key = Fields({"place": place}).texts("place")
        places[name] = (path, key)
    return places


def join(artifact: Artifact, open_file: Callable[[str], TensorFile]) -> dict[str, Tensor]:
    """The whole state_dict of a weights file and its frozen files, tied names sharing a tensor.

    Raises:
        StoreError: a file is missing or damaged, or does not hold what the manifest entry says.
    """
    try:
        state = open_file(artifact.path).read()
        places = _places(artifact)
        for path in sorted({path for path, _ in places.values()}):
            wanted = {name: key for name, (file, key) in places.items() if file == path}
            file = open_file(path)
            if missing := [key for key in wanted.values() if key not in file]:
                raise ValueError(f"{path} holds no tensor {missing[0]!r}")
            tensors = file.read(tuple(wanted.values()))
            state |= {name: tensors[key] for name, key in wanted.items()}
        for alias, name in Fields(artifact.meta).object("aliases").items():
            if name not in state:
                raise ValueError(f"the tied name {alias!r} refers to {name!r}, which is not stored")
            state[alias] = state[name]
    except ValueError as error:
        raise StoreError(
            f"the weights in {artifact.path} are not whole",
            expected="every entry of the model's state_dict",
            found=str(error),
            hint="restore the store from a copy; run `verify()` to see everything that is wrong",
        ) from error
    return state
