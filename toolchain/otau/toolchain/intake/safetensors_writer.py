"""safetensors files written one tensor at a time: their header needs only names, types and shapes."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from otau.runtime.errors import CheckpointError
from otau.toolchain.intake.files import FileRead
from otau.toolchain.intake.safetensors import DTYPES, MAX_HEADER_BYTES
from otau.training.policies.weights import StoredTensor

__all__ = ["stored_as", "write_safetensors"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class _Cast:
    """The `read` of a tensor in another type."""

    source: StoredTensor
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        return self.source.read().to(self.dtype)


def stored_as(tensor: StoredTensor, dtype: torch.dtype | None) -> StoredTensor:
    """A tensor in another floating-point type; integers and booleans stay what they are."""
    if dtype is None or tensor.dtype == dtype or not tensor.dtype.is_floating_point:
        return tensor
    return StoredTensor(tensor.shape, dtype, _Cast(tensor, dtype))


def write_safetensors(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> Iterator[int]:
    """Write a file, a tensor at a time; the file is on the disk when the iterator ends.

    Args:
        path: A new file.
        tensors: What to write. Types of more bytes come first, so that each tensor is aligned; else the order
            is kept, so that files which have the tensors in that order are read from front to back.
        metadata: Text for the header.

    Yields:
        The bytes of each tensor, once it is written.

    Raises:
        CheckpointError: A tensor has a type that safetensors does not know, or there are too many tensors.
        OSError: The file cannot be written.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header = _header(path, ordered, metadata)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    try:
        _write(handle, memoryview(struct.pack("<Q", len(header)) + header))
        for key, stored in ordered.items():
            written = 0
            for part in _parts(stored, buffer):
                _write(handle, part)
                written += len(part)
            if written != stored.nbytes:
                raise RuntimeError(f"{key}: {written:,} bytes instead of {stored.nbytes:,}")
            yield written
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for key, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(
                "a tensor has a type that safetensors files of this project do not hold",
                where=key,
                expected=", ".join(str(dtype) for dtype in _NAMES),
                got=tensor.dtype,
                fix="give --dtype fp32 or bf16" if tensor.dtype.is_floating_point else None,
            )
        entries[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise CheckpointError(
            "the checkpoint has too many tensors for one file",
            where=path,
            expected=f"a header of at most {MAX_HEADER_BYTES:,} bytes",
            got=f"{len(header):,}",
        )
    return header + b" " * (-len(header) % 8)


def _parts(tensor: StoredTensor, buffer: memoryview) -> Iterator[memoryview]:
    """A tensor's bytes; where they lie in files as they are, a part at a time and never all in memory."""
    read, dtype = tensor.read, None
    if isinstance(read, _Cast):
        read, dtype = read.source.read, read.dtype
    if not isinstance(read, FileRead):
        yield _bytes(tensor.read())
        return
    for part in read.read_through(buffer):
        yield part if dtype is None else _bytes(torch.frombuffer(part, dtype=read.dtype).to(dtype))


def _bytes(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _write(handle: int, data: memoryview) -> None:
    # The kernel takes at most 2 GB a call.
    done = 0
    while done < len(data):
        done += os.write(handle, data[done:])
