"""safetensors: one `model.safetensors`, or shards with an index."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from otau.runtime.errors import CheckpointError
from otau.toolchain.intake.opened import OpenedCheckpoint
from otau.training.policies.weights import StoredTensor

__all__ = [
    "DTYPES",
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "inside",
    "is_safetensors",
    "open_safetensors",
    "read_index",
    "read_safetensors",
]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"

_MAX_INDEX_BYTES = 64 << 20

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

    Raises:
        CheckpointError: A file is damaged or missing, or the index does not agree with the shards.
    """
    if (folder / WEIGHTS_FILE).is_file():
        path = folder / WEIGHTS_FILE
        return OpenedCheckpoint(folder, "safetensors", read_safetensors(path), (path,))
    index = read_index(folder, INDEX_FILE)
    shards = {name: read_safetensors(inside(folder, name, INDEX_FILE)) for name in sorted({*index.values()})}
    weights = {}
    for key, name in index.items():
        if key not in shards[name]:
            raise CheckpointError(
                "the index names a tensor that its shard does not have",
                where=folder / INDEX_FILE,
                expected=f"{key} in {name}",
                got=f"{len(shards[name])} other tensors",
                fix="copy the checkpoint again",
            )
        weights[key] = shards[name][key]
    unlisted = sorted({key for shard in shards.values() for key in shard} - set(index))
    if unlisted:
        raise CheckpointError(
            "a shard has tensors that the index does not name",
            where=folder / INDEX_FILE,
            got=", ".join(unlisted[:5]),
            fix="copy the checkpoint again",
        )
    files = (folder / INDEX_FILE, *(folder / name for name in shards))
    return OpenedCheckpoint(folder, f"safetensors, {len(shards)} shards", weights, files)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, none of them read yet.

    Raises:
        CheckpointError: The file is truncated, or not safetensors.
    """
    try:
        # The library checks the header: its length, that tensors fit their types and do not overlap, that the
        # file has no byte more or less.
        with safe_open(path, framework="pt") as file:
            file.keys()
        with path.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header: dict[str, Any] = json.loads(raw.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            "the weights cannot be read: the file is truncated or not safetensors",
            where=path,
            got=f"{path.stat().st_size} bytes: {error}",
            fix="copy the checkpoint again",
        ) from None
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                "a tensor has a type that is not read",
                where=f"{path}: {key}",
                expected=", ".join(DTYPES),
                got=entry["dtype"],
            )
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        start = 8 + length + entry["data_offsets"][0]
        tensors[key] = StoredTensor(shape, dtype, partial(_read, path, start, shape, dtype))
    return tensors


def read_index(folder: Path, name: str) -> Mapping[str, str]:
    """`weight_map` of a shard index: tensor -> file.

    Raises:
        CheckpointError: It is not a map from names to names.
    """
    path = folder / name
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
        index = document["weight_map"]
        if not index or not all(isinstance(value, str) for value in index.values()):
            raise ValueError("weight_map is not a map of names")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(
            "the index of the shards is not valid",
            where=path,
            expected='{"weight_map": {TENSOR: FILE}}',
            got=repr(error),
            fix="copy the checkpoint again",
        ) from None
    return index


def inside(folder: Path, name: str, where: str) -> Path:
    """The path of a file that an index names: a plain file of the folder, or an error.

    Raises:
        CheckpointError: The name leaves the folder, or there is no such file.
    """
    plain = PurePosixPath(name)
    if len(plain.parts) != 1 or name in (".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(
            "a file name in the checkpoint leaves its folder",
            where=folder / where,
            expected="the name of a file beside it",
            got=repr(name),
            fix="do not use this checkpoint",
        )
    path = folder / name
    if not path.is_file():
        raise CheckpointError(
            "a file of the checkpoint is missing",
            where=folder / where,
            expected=name,
            got="no such file",
            fix="copy the checkpoint again",
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            "a file of the checkpoint is a link that leaves its folder",
            where=path,
            got=path.resolve(),
            fix="replace the link by the file",
        )
    return path


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
