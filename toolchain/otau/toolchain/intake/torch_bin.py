"""PyTorch's own files: `pytorch_model.bin` and its like, one or sharded with an index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from otau.runtime.errors import CheckpointError
from otau.toolchain.intake.opened import OpenedCheckpoint
from otau.toolchain.intake.safetensors import read_index
from otau.toolchain.intake.torch_file import TorchTensor, read_torch_file
from otau.training.policies.files import inside
from otau.training.policies.weights import StoredTensor

__all__ = ["TORCH_FILES", "TORCH_INDEX_FILE", "is_torch_bin", "open_torch_bin"]

TORCH_FILES = ("pytorch_model.bin", "model.bin", "model.pt", "pytorch_model.pt", "model.pth")
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")


def is_torch_bin(folder: Path) -> bool:
    """Whether a folder holds a model in files of torch.save."""
    return any((folder / name).is_file() for name in (*TORCH_FILES, TORCH_INDEX_FILE))


def open_torch_bin(folder: Path) -> OpenedCheckpoint:
    """Open a file of torch.save, or the shards that its index names; nothing in them is run.

    The weights may be wrapped, as `{"state_dict": ...}`, `{"model": ...}` or `{"module": ...}`. A tensor
    under several names is one `StoredTensor` under all of them.

    Raises:
        CheckpointError: A file is damaged, missing or asks to run code, or the index does not agree with it.
    """
    present = [name for name in TORCH_FILES if (folder / name).is_file()]
    if present:
        path = inside(folder, present[0], present[0])
        return OpenedCheckpoint(folder, "PyTorch", _stored(_read_weights(path).items()), (path,))
    index = read_index(folder, TORCH_INDEX_FILE)
    shards = {name: inside(folder, name, TORCH_INDEX_FILE) for name in sorted({*index.values()})}
    held = {name: _read_weights(path) for name, path in shards.items()}
    unlisted = {key for shard in held.values() for key in shard} - set(index)
    absent = {key for key, name in index.items() if key not in held[name]}
    if absent or unlisted:
        raise CheckpointError(
            "the index and the shards have different tensors",
            where=folder / TORCH_INDEX_FILE,
            got=", ".join(
                [f"{key[:100]} not in its shard" for key in sorted(absent)[:3]]
                + [f"{key[:100]} not in the index" for key in sorted(unlisted)[:3]]
            ),
            fix="copy the checkpoint again",
        )
    weights = _stored((key, held[name][key]) for key, name in index.items())
    files = (folder / TORCH_INDEX_FILE, *shards.values())
    return OpenedCheckpoint(folder, f"PyTorch, {len(shards)} shards", weights, files)


def _read_weights(path: Path) -> Mapping[str, TorchTensor]:
    """The tensors of a file by name, out of what they are wrapped in."""
    value: Any = read_torch_file(path)
    for _ in _WRAPPERS:
        if isinstance(value, dict):
            value = next((value[key] for key in _WRAPPERS if isinstance(value.get(key), dict)), value)
    if not isinstance(value, dict) or not value:
        _refuse(path, f"a {type(value).__name__}" if value else "no tensors")
    # Modules may save more than tensors in their state (`_extra_state`), which is of no use to a policy.
    tensors = {key: entry for key, entry in value.items() if isinstance(entry, TorchTensor)}
    others = [key for key in value if key not in tensors and not str(key)[-200:].endswith("_extra_state")]
    if others or not all(isinstance(key, str) for key in tensors):
        _refuse(path, f"also {str(others[0])[:100]!r}" if others else "names that are no text")
    return tensors


def _stored(tensors: Iterable[tuple[str, TorchTensor]]) -> dict[str, StoredTensor]:
    seen: dict[Any, StoredTensor] = {}
    return {key: seen.setdefault(tensor.identity, tensor.stored()) for key, tensor in tensors}


def _refuse(path: Path, got: str) -> None:
    raise CheckpointError(
        "the file holds no weights by name",
        where=path,
        expected="a dict of tensors, or one under " + ", ".join(_WRAPPERS),
        got=got,
        fix="save the weights: torch.save(model.state_dict(), FILE)",
    )
