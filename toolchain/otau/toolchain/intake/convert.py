"""Any checkpoint -> a complete checkpoint folder in safetensors, written a tensor at a time."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from otau.runtime.errors import CheckpointError, UsageError
from otau.runtime.permissions import make_as_readable_as_others
from otau.toolchain.intake import OpenedCheckpoint, open_checkpoint
from otau.toolchain.intake.safetensors import INDEX_FILE, MAX_TENSORS, METADATA_FORMAT, WEIGHTS_FILE
from otau.toolchain.intake.safetensors_writer import stored_as, write_safetensors
from otau.toolchain.memory import peak_rss_mb
from otau.toolchain.tokenizer import TOKENIZER_FILES
from otau.training.policies.config import CONFIG_FILES
from otau.training.policies.files import inside
from otau.training.policies.keys import LM_HEAD
from otau.training.policies.sizes import DIMS_FILE
from otau.training.policies.weights import StoredTensor, Weights

_LOG = logging.getLogger(__name__)

__all__ = ["DTYPES", "convert_checkpoint", "parse_size"]

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16}
"""What `--dtype` may be: the type that floating-point tensors are written in."""

_COPIED = (
    *CONFIG_FILES,
    DIMS_FILE,
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "generation_config.json",
    "training_step.json",
)
"""What belongs to a checkpoint beside its weights."""

_METADATA = "__metadata__"
"""The header's own entry of a safetensors file."""

_MAX_COPIED_BYTES = 256 << 20
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class _Plan:
    """What to write."""

    shards: tuple[dict[str, StoredTensor], ...]
    shared: Mapping[str, str]
    """Name that is not stored -> name of the same tensor, which is."""
    nbytes: int


def convert_checkpoint(
    source: Path,
    destination: Path,
    dtype: str = "keep",
    max_shard_size: str = "5GB",
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write any checkpoint as a folder in safetensors, or nothing.

    A tensor under several names is stored once: under `lm_head.weight`, as OpenTau stores its own tied
    tables, else under its first name. The header's metadata maps the other names to that one.

    Args:
        source: A checkpoint folder of any format.
        destination: A new folder, or an empty one.
        dtype: One of `DTYPES`.
        max_shard_size: For example `5GB`; more is written as several files with an index.
        on_tensor: Called after each tensor with the bytes written, and those of all.

    Returns:
        What was written: format, files, numbers, seconds, peak memory [MiB].

    Raises:
        UsageError: An argument is not possible, or the disk is too small.
        CheckpointError: The checkpoint is damaged or hostile.
    """
    started = time.monotonic()
    if dtype not in DTYPES:
        raise UsageError("there is no such type", where="--dtype", expected=", ".join(DTYPES), got=dtype)
    limit = parse_size(max_shard_size)
    opened = open_checkpoint(source)
    plan = _plan(opened.weights, DTYPES[dtype], limit)
    _check_names(plan, source)
    if opened.config is None and not any((opened.folder / name).is_file() for name in CONFIG_FILES):
        _LOG.warning(
            "%s has no configuration (%s): what is converted cannot be compiled until there is one beside it",
            source,
            ", ".join(CONFIG_FILES),
        )
    with _new_folder(destination, plan.nbytes) as folder:
        _write_weights(folder, plan, on_tensor)
        _write_companions(folder, opened)
        files = sorted(path.name for path in folder.iterdir())
    return {
        "checkpoint": str(source),
        "format": opened.format,
        "out": str(destination),
        "files": files,
        "tensors": sum(len(shard) for shard in plan.shards),
        "bytes": plan.nbytes,
        "dtype": dtype,
        "shared": dict(plan.shared),
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_mb": peak_rss_mb(),
    }


def parse_size(text: str) -> int:
    """A size in bytes, from a number with a unit such as `5GB` or `500MiB`.

    Raises:
        UsageError: It is none, or not positive.
    """
    match = re.fullmatch(r"(\d{1,12})\s*([KMG]?I?B|)", text.strip().upper())
    if match is None or match[2] not in _UNITS or not int(match[1]):
        raise UsageError(
            "this is no size", where="--max-shard-size", expected="for example 5GB or 500MB", got=text
        )
    return int(match[1]) * _UNITS[match[2]]


def _plan(weights: Weights, dtype: torch.dtype | None, limit: int) -> _Plan:
    names: dict[int, list[str]] = {}
    for key, tensor in weights.items():
        names.setdefault(id(tensor), []).append(key)
    kept = {id_: LM_HEAD if LM_HEAD in keys else keys[0] for id_, keys in names.items()}
    shared = {key: kept[id(t)] for key, t in weights.items() if kept[id(t)] != key}
    shards: list[dict[str, StoredTensor]] = [{}]
    filled = total = 0
    for id_, name in kept.items():
        tensor = stored_as(weights[names[id_][0]], dtype)
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
        total += tensor.nbytes
    return _Plan(tuple(shards), shared, total)


def _check_names(plan: _Plan, source: Path) -> None:
    """Refuse what a safetensors file could not hold, before anything is written."""
    stored = [name for shard in plan.shards for name in shard]
    if len(stored) > MAX_TENSORS:
        raise CheckpointError(
            "the checkpoint has more tensors than otau would read again",
            where=source,
            expected=f"at most {MAX_TENSORS:,}",
            got=f"{len(stored):,}",
        )
    for name in (*stored, *plan.shared):
        reserved = name == _METADATA or (name == METADATA_FORMAT and name in plan.shared)
        if reserved or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise CheckpointError(
                "a tensor has a name that a safetensors file cannot hold",
                where=source,
                expected=f"Unicode text, and not {_METADATA}; for a shared tensor not {METADATA_FORMAT}",
                got=ascii(name[:100]),
                fix="rename it where the checkpoint was saved",
            )


def _write_weights(folder: Path, plan: _Plan, on_tensor: Callable[[int, int], None]) -> None:
    count, done = len(plan.shards), 0
    index: dict[str, str] = {}
    for number, tensors in enumerate(plan.shards, 1):
        name = WEIGHTS_FILE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        metadata = {METADATA_FORMAT: "pt"} | {key: to for key, to in plan.shared.items() if to in tensors}
        for nbytes in write_safetensors(folder / name, tensors, metadata):
            done += nbytes
            on_tensor(done, plan.nbytes)
        index |= dict.fromkeys(tensors, name)
    if count > 1:
        document = {"metadata": {"total_size": plan.nbytes}, "weight_map": index}
        _write_file(folder / INDEX_FILE, json.dumps(document, indent=2).encode())


def _write_companions(folder: Path, opened: OpenedCheckpoint) -> None:
    """Configuration, sizes and tokenizer: copied, or written where the format says them otherwise."""
    written = {}
    if opened.config is not None:
        written[CONFIG_FILES[0]] = msgspec.json.encode(opened.config)
    if opened.head_dims is not None:
        written[DIMS_FILE] = msgspec.json.encode(opened.head_dims)
    for name in _COPIED:
        if name in written or (opened.config is not None and name in CONFIG_FILES):
            continue
        if (opened.folder / name).exists():
            path = inside(opened.folder, name, name)
            if path.stat().st_size > _MAX_COPIED_BYTES:
                raise CheckpointError("a file of the checkpoint is too large", where=path, expected="256 MiB")
            written[name] = path.read_bytes()
    for name, data in written.items():
        _write_file(folder / name, data)


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _new_folder(destination: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside the destination, which takes its place when the block is left without an error."""
    destination = Path(os.path.abspath(destination))
    if destination.is_symlink() or (
        destination.exists() and not (destination.is_dir() and not any(destination.iterdir()))
    ):
        raise UsageError(
            "the destination exists",
            where=destination,
            expected="a new path, or an empty directory",
            fix="choose another path, or remove it yourself",
        )
    folder = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(destination.parent).free
        if free < nbytes:
            raise UsageError(
                "the disk is too small",
                where=destination.parent,
                expected=f"{nbytes / 1e9:,.1f} GB free",
                got=f"{free / 1e9:,.1f} GB",
                fix="choose another disk",
            )
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        make_as_readable_as_others(folder)
        yield folder
        _flush(folder)
        folder.rename(destination)
        _flush(destination.parent)
    except OSError as error:
        raise UsageError(
            "the checkpoint cannot be written there",
            where=destination,
            got=error,
            fix="choose a directory that you may write to, on a disk with room",
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
