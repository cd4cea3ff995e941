"""Safetensors files: exact round trips, laziness, checksums, and refusal of everything that is not what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.artifacts import disk, tensor_files
from lightning_influence.artifacts.tensor_files import TensorFile, write_tensors
from lightning_influence.errors import StoreError

DTYPES = list(tensor_files._DTYPES)


def opened(path: Path, tensors: dict[str, Tensor]) -> TensorFile:
    size, sha256 = write_tensors(path, tensors)
    return TensorFile(path.parent, path.name, size=size, sha256=sha256)


def some(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3, 4)], ids=str)
def test_round_trip(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = some(shape, dtype)
    file = opened(tmp_path / "a.safetensors", {"x": tensor, "other": torch.ones(3, dtype=torch.uint8)})
    assert (file.shape("x"), file.dtype("x")) == (shape, dtype)
    assert file["x"].dtype == dtype and file["x"].shape == shape and torch.equal(file["x"], tensor)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 3), max_size=3).map(tuple), st.sampled_from(DTYPES)),
        max_size=5,
    )
)
def test_any_names_and_shapes(tmp_path: Path, entries: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    tensors = {name: some(shape, dtype) for name, (shape, dtype) in entries.items()}
    file = opened(tmp_path / "a.safetensors", tensors)
    assert set(file) == set(tensors) and len(file) == len(tensors)
    for name, tensor in file.read().items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name])


def test_nan_and_infinity_survive_bit_by_bit(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=dtype)
        found = opened(tmp_path / "a.safetensors", {"x": tensor})["x"]
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(12.0)[::3],
        torch.ones(1, 3).expand(4, 3),
        torch.arange(6.0, requires_grad=True) * 2,
        torch.tensor([1 + 2j]).conj().imag,
        torch.arange(40, dtype=torch.uint8)[1:].view(13, 3),
        torch.arange(6.0).view(2, 3)[:1, ::3],
    ],
    ids=["transposed", "strided", "expanded", "in a graph", "negative bit", "odd offset", "one element"],
)
def test_memory_layout_does_not_matter(tmp_path: Path, tensor: Tensor) -> None:
    found = opened(tmp_path / "a.safetensors", {"x": tensor})["x"]
    assert torch.equal(found, tensor.detach()) and not found.requires_grad


def test_the_format_is_the_common_one(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3), "a": torch.zeros(2, dtype=torch.int8), "é|x": torch.randn(2, 2).bfloat16()}
    opened(tmp_path / "a.safetensors", tensors)
    for name, tensor in safetensors.torch.load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(tensor, tensors[name])
    header = struct.unpack("<Q", (tmp_path / "a.safetensors").read_bytes()[:8])[0]
    assert (8 + header) % 64 == 0


def test_equal_tensors_give_equal_files(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3), "a": torch.zeros(2, dtype=torch.int8)}
    first = write_tensors(tmp_path / "a.safetensors", tensors)
    second = write_tensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())))
    content = (tmp_path / "a.safetensors").read_bytes()
    assert first == second == (len(content), hashlib.sha256(content).hexdigest())
    assert content == (tmp_path / "b.safetensors").read_bytes()


def test_reading_is_a_memory_map_and_private(tmp_path: Path) -> None:
    file = opened(tmp_path / "a.safetensors", {"x": torch.zeros(1 << 20), "y": torch.ones(1)})
    x = file["x"]
    if Path("/proc/self/maps").exists():
        assert str(tmp_path / "a.safetensors") in Path("/proc/self/maps").read_text()
    x += 1  # copies the pages it touches
    assert float(file["x"].sum()) == 0
    assert hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest() == file.sha256
    del x
    if Path("/proc/self/maps").exists():
        assert str(tmp_path / "a.safetensors") not in Path("/proc/self/maps").read_text()


def test_an_unknown_name_is_a_key_error(tmp_path: Path) -> None:
    file = opened(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    assert "y" not in file and "x" in file
    with pytest.raises(KeyError):
        file["y"]


def test_the_checksum_is_computed_once_and_again_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    file = opened(path, {"x": torch.zeros(8), "y": torch.zeros(8)})
    seen: list[Path] = []
    real = tensor_files.file_sha256
    monkeypatch.setattr(tensor_files, "file_sha256", lambda path: (seen.append(path), real(path))[1])
    assert seen == [] and "x" in file and len(file) == 2  # size and header alone at opening
    _ = file["x"], file["y"], TensorFile(tmp_path, path.name, size=file.size, sha256=file.sha256)["x"]
    assert len(seen) == 1
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        file["x"]


@pytest.mark.parametrize("place", [-1, -20, 0, 5, 12, 40])
def test_any_flipped_bit_is_found(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.safetensors"
    size, sha256 = write_tensors(path, {"x": torch.zeros(64)})
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"a\.safetensors is damaged") as error:
        _ = TensorFile(tmp_path, path.name, size=size, sha256=sha256)["x"]
    assert "HINT" in str(error.value)


def header_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch exploded",)


BAD_FILES = {
    "empty": (b"", "safetensors"),
    "four bytes": (b"abcd", "safetensors"),
    "pickle": (pickle.dumps(Bomb()) + b" " * 100, "a pickle"),
    "text": (b"hello world, this is not a tensor file", "header of"),
    "header longer than the file": (struct.pack("<Q", 1 << 40) + b"{}", "header of"),
    "header is not JSON": (header_file(b"{not json"), "found"),
    "header is a list": (header_file([1]), "a JSON object"),
    "header too deep": (header_file(b'{"a":' + b"[" * 200_000), "found"),
    "header not UTF-8": (header_file(b'{"\xff\xfe":1}'), "found"),
    "entry is a number": (header_file({"x": 3}), "an object was expected"),
    "unknown dtype": (header_file({"x": {"dtype": "F3", "shape": [], "data_offsets": [0, 4]}}, b"1234"), "F3"),
    "negative shape": (header_file({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "-1"),
    "wrong extent": (header_file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "4 bytes"),
    "one offset": (header_file({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"), "found"),
    "data after the tensors": (
        header_file({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"),
        "the file holds 8",
    ),
    "gap": (header_file({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"), "gap"),
    "overlap": (
        header_file({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "xy"}, b"1234"),
        "overlap",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_are_no_tensor_files(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, found = BAD_FILES[case]
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(StoreError, match=r"a\.safetensors") as error:
        TensorFile(tmp_path, "a.safetensors", size=len(content), sha256=hashlib.sha256(content).hexdigest())
    assert found in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_a_torch_save_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch.save({"x": torch.zeros(2)}, path)
    with pytest.raises(StoreError, match=r"torch\.save"):
        TensorFile(tmp_path, path.name, size=path.stat().st_size, sha256="0" * 64)


def test_truncated_missing_and_not_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    size, sha256 = write_tensors(path, {"x": torch.zeros(64)})
    os.truncate(path, size - 1)
    with pytest.raises(StoreError, match="wrong size") as error:
        TensorFile(tmp_path, path.name, size=size, sha256=sha256)
    assert (error.value.expected, error.value.found) == (f"{size:,} bytes", f"{size - 1:,} bytes")
    path.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        TensorFile(tmp_path, path.name, size=size, sha256=sha256)
    os.mkfifo(path)
    with pytest.raises(StoreError, match="not a plain file"):
        TensorFile(tmp_path, path.name, size=size, sha256=sha256)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.eye(2).to_sparse()),
        ("x", torch.ones(2, dtype=torch.complex64)),
        ("x", torch.ones(2, device="meta")),
        ("x", [1.0]),
        ("__metadata__", torch.ones(1)),
        (3, torch.ones(1)),
    ],
    ids=["sparse", "complex", "meta", "list", "reserved name", "number as name"],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path, name: str, value: Tensor) -> None:
    with pytest.raises(StoreError, match="cannot be stored"):
        write_tensors(tmp_path / "a.safetensors", {"good": torch.ones(1), name: value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    write_tensors(tmp_path / "old.safetensors", {"x": torch.zeros(4)})

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    if call == "write":
        monkeypatch.setattr(tensor_files, "write_all", fail)
    else:
        monkeypatch.setattr(disk.os, call, fail)
    with pytest.raises(StoreError) as error:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(4)})
    assert ("no space left" in str(error.value)) == (code != errno.EIO)
    assert [path.name for path in tmp_path.iterdir()] == ["old.safetensors"]


def test_a_write_that_takes_few_bytes_at_a_time(tmp_path: Path) -> None:
    class Slow:
        def __init__(self) -> None:
            self.taken = b""

        def write(self, data: memoryview) -> int:
            self.taken += bytes(data[:3])
            return min(3, len(data))

    slow = Slow()
    disk.write_all(slow, memoryview(b"0123456789"))  # type: ignore[arg-type]
    assert slow.taken == b"0123456789"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    small = {"x": torch.ones(1000)}
    size, sha256 = write_tensors(tiny_disk / "a.safetensors", small)
    with pytest.raises(StoreError, match="no space left") as error:
        write_tensors(tiny_disk / "b.safetensors", {"x": torch.ones(1 << 20)})
    assert "HINT: free some space" in str(error.value)
    assert [path.name for path in tiny_disk.iterdir()] == ["a.safetensors"]
    assert torch.equal(TensorFile(tiny_disk, "a.safetensors", size=size, sha256=sha256)["x"], small["x"])
