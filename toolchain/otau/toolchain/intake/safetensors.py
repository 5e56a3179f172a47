"""safetensors: one `model.safetensors`, or shards with an index."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from otau.runtime.errors import CheckpointError
from otau.toolchain.intake.files import check_shape
from otau.toolchain.intake.opened import OpenedCheckpoint
from otau.training.policies.files import inside, open_file, read_text
from otau.training.policies.weights import StoredTensor

__all__ = [
    "DTYPES",
    "INDEX_FILE",
    "MAX_HEADER_BYTES",
    "MAX_TENSORS",
    "METADATA_FORMAT",
    "WEIGHTS_FILE",
    "is_safetensors",
    "open_safetensors",
    "read_index",
    "read_safetensors",
]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"

METADATA_FORMAT = "format"
"""The one key of a header's metadata that names no tensor."""

MAX_HEADER_BYTES = 16 << 20
"""Of all shards. A full-size policy has 0.2 MB."""
MAX_TENSORS = 100_000
"""Of a file. A full-size policy has 800."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The format's names of the types."""


def is_safetensors(folder: Path) -> bool:
    """Whether a folder holds a model in safetensors."""
    return (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()


def open_safetensors(folder: Path) -> OpenedCheckpoint:
    """Open `model.safetensors`, or the shards that its index names.

    A tensor that the header's metadata gives another name, as safetensors' `save_model` and `otau convert`
    do with shared ones, is one `StoredTensor` under both.

    Raises:
        CheckpointError: A file is damaged or missing, or the index does not agree with the shards.
    """
    if (folder / WEIGHTS_FILE).is_file():
        path = inside(folder, WEIGHTS_FILE, WEIGHTS_FILE)
        return OpenedCheckpoint(folder, "safetensors", read_safetensors(path), (path,))
    index = read_index(folder, INDEX_FILE)
    paths = {name: inside(folder, name, INDEX_FILE) for name in sorted({*index.values()})}
    _check_header_sizes(paths.values())
    listed: dict[str, dict[str, StoredTensor]] = {name: {} for name in paths}
    weights = {}
    for name, path in paths.items():
        shard = read_safetensors(path)
        listed[name] = {key: tensor for key, tensor in shard.items() if index.get(key) == name}
        known = {id(tensor) for tensor in listed[name].values()}
        unlisted = [key for key, tensor in shard.items() if key not in index and id(tensor) not in known]
        if unlisted:
            raise CheckpointError(
                "a shard has tensors that the index does not name",
                where=folder / INDEX_FILE,
                got=f"{name}: {', '.join(unlisted[:5])}",
                fix="copy the checkpoint again",
            )
        weights |= {key: tensor for key, tensor in shard.items() if index.get(key, name) == name}
    for key, name in index.items():
        if key not in listed[name]:
            raise CheckpointError(
                "the index names a tensor that its shard does not have",
                where=folder / INDEX_FILE,
                expected=f"{key} in {name}",
                got=f"{len(listed[name])} other tensors",
                fix="copy the checkpoint again",
            )
    files = (folder / INDEX_FILE, *paths.values())
    return OpenedCheckpoint(folder, f"safetensors, {len(paths)} shards", weights, files)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, none of them read yet; also under the names that its metadata gives them.

    Raises:
        CheckpointError: The file is truncated, not safetensors, or has a header beyond all bounds.
    """
    _check_header_sizes([path])
    try:
        # The library checks the header: its length, that tensors fit their types and do not overlap, that the
        # file has no byte more or less.
        with safe_open(path, framework="pt") as file:
            file.keys()
        with path.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header: dict[str, Any] = json.loads(raw.read(length))
        metadata = header.pop("__metadata__", None) or {}
        if len(header) > MAX_TENSORS:
            raise ValueError(f"{len(header):,} tensors; at most {MAX_TENSORS:,} are read")
        tensors = {key: _tensor(path, key, 8 + length, entry) for key, entry in header.items()}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            "the weights cannot be read: the file is truncated or not safetensors",
            where=path,
            got=f"{path.stat().st_size} bytes: {str(error)[:300]}",
            fix="copy the checkpoint again",
        ) from None
    for alias, name in metadata.items():
        if alias != METADATA_FORMAT and alias not in tensors and name in header:
            tensors[alias] = tensors[name]
    return tensors


def _tensor(path: Path, key: str, data: int, entry: object) -> StoredTensor:
    """A tensor of a header; the library lets pass what Python cannot hold, and entries in other forms."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise ValueError(f"{key[:100]!r} is not described by dtype, shape and data_offsets")
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            "a tensor has a type that is not read",
            where=f"{path}: {key}",
            expected=", ".join(DTYPES),
            got=entry["dtype"],
        )
    shape, dtype = check_shape(entry["shape"]), DTYPES[entry["dtype"]]
    start = data + entry["data_offsets"][0]
    return StoredTensor(shape, dtype, partial(_read, path, start, shape, dtype))


def _check_header_sizes(paths: Iterable[Path]) -> None:
    """Refuse files whose headers together are beyond all bounds: they become many times their size."""
    total = 0
    for path in paths:
        with open_file(path) as handle:
            total += int.from_bytes(os.pread(handle, 8, 0), "little")
        if total > MAX_HEADER_BYTES:
            raise CheckpointError(
                "the list of tensors of a safetensors file is too long, or it is not one",
                where=path,
                expected=f"at most {MAX_HEADER_BYTES:,} bytes in all",
                got=f"{total:,}",
                fix="copy the checkpoint again",
            )


def read_index(folder: Path, name: str) -> Mapping[str, str]:
    """`weight_map` of a shard index: tensor -> file.

    Raises:
        CheckpointError: It is not a map from names to names.
    """
    try:
        index = json.loads(read_text(folder, name))["weight_map"]
        if not index or not all(isinstance(value, str) for value in index.values()):
            raise ValueError("weight_map is not a map of names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            "the index of the shards is not valid",
            where=folder / name,
            expected='{"weight_map": {TENSOR: FILE}}',
            got=repr(error)[:300],
            fix="copy the checkpoint again",
        ) from None
    return index


def _read(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    buffer = memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
    done = 0
    with path.open("rb", buffering=0) as file:
        os.lseek(file.fileno(), start, os.SEEK_SET)
        while done < len(buffer):
            count = file.readinto(buffer[done:])
            if not count:
                raise CheckpointError(
                    "the file ended within a tensor", where=path, fix="copy the checkpoint again"
                )
            done += count
    return tensor
