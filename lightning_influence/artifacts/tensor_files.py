"""Safetensors files: written in one pass with their checksum, read lazily through a memory map.

The format is a header of JSON and the raw bytes of the tensors: reading one never executes code. The writer
lays the tensors out by falling item size and name, starts the data on a multiple of 64 bytes, and so gives
equal tensors equal files, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_influence.artifacts.disk import check_size, replace_file, write_all
from lightning_influence.artifacts.json_values import Fields, parse
from lightning_influence.artifacts.paths import inside
from lightning_influence.errors import StoreError

_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMES = {name: dtype for dtype, name in _DTYPES.items()}
_METADATA = "__metadata__"
_ALIGNMENT = 64
_PIECE = 1 << 22  # bytes hashed and written at a time: they are still in the cache when they are written
_LONGEST_HEADER = 100_000_000  # the limit of the format's own reader

_verified: set[tuple[str, int, int, int, str]] = set()  # files whose checksum this process has already computed


def check_writable(name: object, tensor: object) -> None:
    """StoreError unless ``name`` and ``tensor`` can be written: a strided tensor of a known dtype."""
    reason = None
    if not isinstance(name, str) or name == _METADATA:
        reason = f"the name {name!r}"
    elif not isinstance(tensor, Tensor):
        reason = f"an object of type {type(tensor).__name__}"
    elif tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        reason = f"a tensor with layout {tensor.layout} on device {tensor.device}"
    elif tensor.dtype not in _DTYPES:
        reason = f"a tensor of dtype {tensor.dtype}"
    if reason is not None:
        raise StoreError(
            f"{name!r} cannot be stored",
            expected="a dense tensor of dtype " + ", ".join(str(dtype).split(".")[1] for dtype in _DTYPES),
            found=reason,
            hint="convert the tensor before it is written (to_dense(), float(), torch.view_as_real)",
        )


def raw_bytes(name: str, tensor: Tensor) -> memoryview:
    """The bytes of ``tensor`` in row-major order; a view where it is already so on the CPU."""
    check_writable(name, tensor)
    data: memoryview = as_bytes(tensor.detach().resolve_neg().cpu()).numpy().data
    return data


def content_digest(name: str, tensor: Tensor) -> str:
    """sha256 over dtype, shape and content, 64 hex digits."""
    checksum = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    checksum.update(raw_bytes(name, tensor))
    return checksum.hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """The content of a dense tensor in row-major order, as a flat uint8 tensor; a view where that is possible."""
    row_major = tensor.contiguous()  # one element may keep a stride other than 1: hence not view(-1)
    return row_major.as_strided((row_major.numel(),), (1,)).view(torch.uint8)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], rank: int = 0) -> tuple[int, str]:
    """Write a safetensors file (temporary, fsync, rename, fsync) and return its size and sha256.

    One tensor at a time is copied (from its device, or to make it contiguous), so the memory needed is one
    tensor's.

    Raises:
        StoreError: a tensor cannot be stored, or the disk is full or refuses; nothing is left under ``path``.
    """
    for name, tensor in tensors.items():
        check_writable(name, tensor)
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    checksum = hashlib.sha256()

    def emit(file: FileIO, data: memoryview) -> None:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            checksum.update(piece)  # releases the interpreter lock
            write_all(file, piece)

    def write(file: FileIO) -> None:
        emit(file, memoryview(struct.pack("<Q", len(text)) + text))
        for name in names:
            emit(file, raw_bytes(name, tensors[name]))

    replace_file(path, write, rank)
    return 8 + len(text) + end, checksum.hexdigest()


class TensorFile(Mapping[str, Tensor]):
    """The tensors of one file by name, memory-mapped when asked for, freed with the last reference.

    Size and header are checked when the object is made, the checksum at the first tensor that is read (once
    in a process for a file that does not change). The tensors are private copies-on-write: writing into one
    changes neither the file nor another reader's tensor.

    Raises:
        StoreError: the file is missing, leads outside the store, is truncated, is no safetensors file, or its
            content is not what was committed.
    """

    def __init__(self, root: Path, relative: str, *, size: int, sha256: str) -> None:
        self.path = inside(root, relative)
        self.size, self.sha256 = size, sha256
        check_size(root, relative, size)
        self._specs = self._read_header()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._specs:
            raise KeyError(name)
        return self.read((name,))[name]

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self._specs[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header alone."""
        return self._specs[name][1]

    def read(self, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """Several tensors (all by default) through one opening of the file."""
        self.verify()
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in (self if names is None else names)}
        except (SafetensorError, OSError) as error:
            raise self._damage("a readable safetensors file", str(error)) from error

    def verify(self, anew: bool = False) -> None:
        """Compare the file's checksum with the committed one, unless this process has already done so.

        With ``anew`` an earlier check is not trusted.
        """
        status = self.path.stat()
        key = (str(self.path), status.st_ino, status.st_size, status.st_mtime_ns, self.sha256)
        if key in _verified and not anew:
            return
        found = file_sha256(self.path)
        if found != self.sha256:
            raise self._damage(f"sha256 {self.sha256}", f"sha256 {found}")
        _verified.add(key)

    def _read_header(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        try:
            with open(self.path, "rb") as file:
                start = file.read(8)
                _refuse_pickle(start)
                length = struct.unpack("<Q", start)[0] if len(start) == 8 else self.size
                if length > min(self.size - 8, _LONGEST_HEADER):
                    raise ValueError(f"a header of {length:,} bytes in a file of {self.size:,}")
                header = parse(file.read(length))
            return _specs(header, self.size - 8 - length)
        except (OSError, ValueError) as error:
            raise self._damage("a safetensors file", str(error)) from error

    def _damage(self, expected: str, found: str) -> StoreError:
        return StoreError(
            f"{self.path} is damaged",
            expected=expected,
            found=found,
            hint="restore the file from a copy of the store; `verify()` lists every problem",
        )


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, read in pieces."""
    checksum, buffer = hashlib.sha256(), bytearray(_PIECE)
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(buffer):
            checksum.update(memoryview(buffer)[:read])
    return checksum.hexdigest()


def _refuse_pickle(start: bytes) -> None:
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise ValueError("a pickle, which is never loaded because loading one can run any code")
    if start[:4] == b"PK\x03\x04":
        raise ValueError("a zip file as torch.save writes it; only safetensors files are ever loaded")


def _specs(header: dict[str, Any], size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a header; ValueError unless the tensors fill ``size`` bytes exactly once."""
    specs, spans = {}, []
    for name, record in header.items():
        if name == _METADATA:
            continue
        fields = Fields(record)
        shape, dtype = fields.integers("shape"), _NAMES.get(fields.text("dtype"))
        if dtype is None:
            raise ValueError(f"the tensor {name!r} has the unknown dtype {fields.text('dtype')!r}")
        start, stop = fields.integers("data_offsets")
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the tensor {name!r} takes {stop - start} bytes, which its shape {shape} does not")
        specs[name] = (shape, dtype)
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"the tensors leave a gap or overlap at byte {end}")
        end = stop
    if end != size:
        raise ValueError(f"the tensors take {end:,} bytes and the file holds {size:,}")
    return specs
