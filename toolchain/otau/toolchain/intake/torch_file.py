"""Files of torch.save, with tensors that are read when asked for.

Two formats: a zip archive (torch 1.6 and later) with a pickle and one stored entry a storage, and the older
one, five pickles and then the storages. Either is read without running anything: see `pickles`.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from otau.runtime.errors import CheckpointError
from otau.toolchain.intake.files import FileRead, Piece, check_numbers, check_shape, damaged, read_exactly
from otau.toolchain.intake.pickles import MAX_PICKLE_BYTES, Name, read_pickle
from otau.toolchain.intake.zip_entries import ZipEntry, read_entries
from otau.training.policies.files import open_file
from otau.training.policies.weights import StoredTensor

__all__ = ["TorchTensor", "read_torch_file"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_KEY_LENGTH = 256
_MAX_SPREAD = 8
"""Numbers that a tensor may span for each that it has: all that it spans is read to pick them out."""
_SMALL = 1 << 20
"""Tensors of fewer elements may span as many as one of these."""

_STORAGE_TYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}

_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
        *("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"),
    )
}

_INERT = {
    *_STORAGE_TYPES,
    *_DTYPES,
    *(f"builtins.{name}" for name in ("bytearray", "complex", "dict", "float", "frozenset", "int", "list")),
    *("builtins.set", "builtins.str", "builtins.tuple", "builtins.bool"),
    *("__builtin__.bytearray", "__builtin__.complex", "__builtin__.frozenset", "__builtin__.set"),
    *("_codecs.encode", "argparse.Namespace", "collections.Counter", "collections.defaultdict"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
    *("pathlib.PosixPath", "pathlib._local.PosixPath", "datetime.timedelta"),
    *("torch.Tensor", "torch.device", "torch.nn.parameter.Parameter", "torch.serialization._get_layout"),
    *("torch.ComplexFloatStorage", "torch.ComplexDoubleStorage", "torch._utils._rebuild_sparse_tensor"),
}
_INERT_PACKAGES = ("deepspeed.", "omegaconf.")
"""DeepSpeed's loss scalers, stage enums and fragment addresses; omegaconf's configurations of a run."""


@dataclass
class _Storage:
    """Bytes in a file; in the older format where they are is known last."""

    dtype: torch.dtype
    nbytes: int
    start: int = -1


@dataclass(frozen=True)
class TorchTensor:
    """A tensor in a file of torch.save; nothing of it is in memory."""

    path: Path
    storage: _Storage
    begin: int
    """Its first byte within the storage."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def start(self) -> int:
        """Its first byte within the file."""
        return self.storage.start + self.begin

    @property
    def is_contiguous(self) -> bool:
        """Whether its bytes lie in order and without gaps."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return self.numel == 0
            expected *= size
        return True

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for tensors that are one tensor under two names."""
        return self.path, self.start, self.shape, self.stride, self.dtype

    def stored(self) -> StoredTensor:
        """The tensor as every format gives it."""
        if self.is_contiguous:
            return FileRead(self.pieces(0, self.numel), self.shape, self.dtype).stored()
        return StoredTensor(self.shape, self.dtype, partial(_read_strided, self))

    def pieces(self, begin: int, end: int) -> tuple[Piece, ...]:
        """Where its numbers from `begin` to `end` lie, if it is contiguous."""
        width = self.dtype.itemsize
        if begin >= end:
            return ()
        return (Piece(self.path, self.start + begin * width, (end - begin) * width),)


def read_torch_file(path: Path) -> Any:
    """What a file of torch.save holds, its tensors as `TorchTensor`.

    Args:
        path: The file.

    Returns:
        Dicts (also for OrderedDict), lists, tuples (also for torch.Size), plain values, `TorchTensor` and,
        for the classes of DeepSpeed and a few others, `Record`.

    Raises:
        CheckpointError: The file is damaged, asks to run code, or its tensors lie outside of it.
    """
    with open_file(path) as handle:
        size = os.fstat(handle).st_size
        if read_exactly(handle, 0, min(4, size), path) == b"PK\x03\x04":
            return _read_archive(handle, path)
        return _read_legacy(handle, size, path)


def _is_inert(name: str) -> bool:
    return name in _INERT or name.startswith(_INERT_PACKAGES)


def _read_archive(handle: int, path: Path) -> Any:
    entries = read_entries(handle, path)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        damaged(path, f"a zip archive with {len(pickles)} entries named data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise CheckpointError(
            "the file is a TorchScript program, not weights",
            where=path,
            fix="save the weights: torch.save(model.state_dict(), FILE)",
        )
    order = entries.get(f"{root}byteorder")
    if order and read_exactly(handle, order.start, min(order.size, 16), path) != b"little":
        damaged(path, "its numbers are big-endian")
    entry = entries[pickles[0]]
    if entry.size > MAX_PICKLE_BYTES:
        damaged(path, f"a pickle of {entry.size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
    stream = io.BytesIO(read_exactly(handle, entry.start, entry.size, path))
    storages: dict[str, _Storage] = {}

    def find(pid: tuple[Any, ...]) -> _Storage:
        dtype, key, nbytes = _storage_id(pid, 5)
        if key not in storages:
            data = entries.get(f"{root}data/{key}", ZipEntry(-1, -1))
            if data.size != nbytes:
                raise ValueError(
                    f"storage {key[:100]!r} of {nbytes:,} bytes, of which the file has {data.size:,}"
                )
            storages[key] = _Storage(dtype, nbytes, data.start)
        if (storages[key].dtype, storages[key].nbytes) != (dtype, nbytes):
            raise ValueError(f"storage {key[:100]!r} with two types or sizes")
        return storages[key]

    return read_pickle(stream, path, _builders(path), _is_inert, find)


def _read_legacy(handle: int, size: int, path: Path) -> Any:
    with open(os.dup(handle), "rb") as stream:
        stream.seek(0)

        def load(persistent: Callable[[tuple[Any, ...]], Any] | None = None) -> Any:
            return read_pickle(stream, path, _builders(path), _is_inert, persistent)

        if load() != _LEGACY_MAGIC:
            damaged(path, "a pickle that torch.save did not write")
        if load() != _LEGACY_PROTOCOL:
            damaged(path, "another version of torch's older format")
        system = load()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            damaged(path, "its numbers are big-endian")
        storages: dict[str, _Storage] = {}

        def find(pid: tuple[Any, ...]) -> _Storage:
            dtype, key, nbytes = _storage_id(pid, 6)
            if pid[5] is not None:
                raise ValueError("a storage that is a view of another")
            storage = storages.setdefault(key, _Storage(dtype, nbytes))
            if (storage.dtype, storage.nbytes) != (dtype, nbytes):
                raise ValueError(f"storage {key[:100]!r} with two types or sizes")
            return storage

        value = load(find)
        keys = load()
        at = stream.tell()
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or len(keys) != len(storages) or set(keys) != set(storages):
        damaged(path, "its list of storages is not that of its tensors")
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(read_exactly(handle, at, 8, path), "little")
        if count * storage.dtype.itemsize != storage.nbytes or at + 8 + storage.nbytes > size:
            damaged(
                path,
                f"storage {key[:100]!r} of {storage.nbytes:,} bytes, of which the file has {size - at:,}",
            )
        storage.start = at + 8
        at += 8 + storage.nbytes
    return value


def _storage_id(pid: tuple[Any, ...], length: int) -> tuple[torch.dtype, str, int]:
    """Type, key and bytes of a storage, from `("storage", type, key, location, count, ...)`."""
    if len(pid) != length or pid[0] != "storage" or not isinstance(pid[1], Name):
        raise ValueError("a persistent id that is no storage")
    dtype = _STORAGE_TYPES.get(pid[1].full)
    if dtype is None:
        raise ValueError(f"a storage of type {pid[1]}, which otau does not read")
    key, count = pid[2], pid[4]
    if not isinstance(key, str) or len(key) > _MAX_KEY_LENGTH or type(count) is not int or count < 0:
        raise ValueError("a storage without a key or a size")
    return dtype, key, count * dtype.itemsize


def _builders(path: Path) -> dict[str, Callable[[tuple[Any, ...]], Any]]:
    """What makes a tensor, a size or a dict of the calls that torch.save writes."""

    def tensor(args: tuple[Any, ...]) -> TorchTensor:
        return _tensor(path, *args[:4])

    def typed_tensor(args: tuple[Any, ...]) -> TorchTensor:
        return _tensor(path, *args[:4], dtype=_DTYPES[args[6].full])

    def parameter(args: tuple[Any, ...]) -> TorchTensor:
        if not isinstance(args[0], TorchTensor):
            raise ValueError("a parameter without a tensor")
        return args[0]

    def subclass(args: tuple[Any, ...]) -> Any:
        rebuild, kind, inner = args[:3]
        if not (isinstance(kind, Name) and kind.full in ("torch.Tensor", "torch.nn.parameter.Parameter")):
            raise ValueError("a tensor of a class that otau does not read")
        if not (isinstance(rebuild, Name) and rebuild.full in tensors and isinstance(inner, tuple)):
            raise ValueError("a tensor that is built in a way that otau does not read")
        return tensors[rebuild.full](inner)

    tensors = {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": typed_tensor,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
    }
    return tensors | {
        "torch._tensor._rebuild_from_type_v2": subclass,
        "torch.Size": lambda args: check_shape(*args),
        "collections.OrderedDict": _ordered_dict,
    }


def _ordered_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    if args:
        # Python 3 fills it afterwards; and a list that is named twice would be copied twice.
        raise ValueError("an OrderedDict with arguments")
    return {}


def _tensor(
    path: Path, storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None
) -> TorchTensor:
    """A tensor within its storage; shape, stride and offset are numbers of elements."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    shape, steps, (offset,) = check_shape(size), check_numbers(stride), check_numbers((offset,))
    dtype = dtype or storage.dtype
    held = storage.nbytes // dtype.itemsize
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) if count else offset - 1
    # The count matters where a stride is zero: one number would be read as billions.
    if last >= held or count > held:
        raise ValueError(
            f"a tensor of shape {list(shape)}, stride {list(steps)}, offset {offset}"
            f" in a storage of {held:,} elements"
        )
    if last - offset >= _MAX_SPREAD * max(count, _SMALL):
        raise ValueError(
            f"a tensor of {count:,} elements that spans {last - offset + 1:,};"
            f" at most {_MAX_SPREAD} times its elements are read: save it with .contiguous()"
        )
    return TorchTensor(path, storage, offset * dtype.itemsize, shape, steps, dtype)


def _read_strided(tensor: TorchTensor) -> Tensor:
    """Reads a transposed or sliced tensor: all that it spans, and then its numbers in order."""
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    spanned = Piece(tensor.path, tensor.start, extent * tensor.dtype.itemsize)
    flat = FileRead((spanned,), (extent,), tensor.dtype)()
    return flat.as_strided(tensor.shape, tensor.stride).contiguous()
