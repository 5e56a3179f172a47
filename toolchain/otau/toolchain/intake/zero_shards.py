"""The files of a DeepSpeed ZeRO checkpoint: which there are, and what each holds."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from otau.runtime.errors import CheckpointError
from otau.toolchain.intake.files import check_shape, read_exactly
from otau.toolchain.intake.pickles import Record
from otau.toolchain.intake.torch_file import TorchTensor, read_torch_file
from otau.training.policies.files import inside, open_file, require_inside

__all__ = [
    "LATEST",
    "OPTIMIZER_FILE",
    "ModelStates",
    "OptimizerStates",
    "agree",
    "find_shards",
    "is_flat",
    "list_shards",
    "read_model_states",
    "read_optimizer_states",
    "refuse",
]

LATEST = "latest"
_MAX_TAG_BYTES = 255
_MAX_PARAMETERS = 100_000
"""Of all groups of a rank. A full-size policy has 800."""

OPTIMIZER_FILE = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:[a-z0-9]+_)?(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,6})_model_states\.pt")
_GROUPS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}

_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class OptimizerStates:
    """The masters that a rank holds."""

    path: Path
    stage: int
    ranks: int
    groups: tuple[TorchTensor, ...]
    paddings: tuple[tuple[int, ...], ...] | None
    """ZeRO-1 and 2 since 0.19: numbers to skip after each parameter of each group."""
    version: str | None


@dataclass(frozen=True)
class ModelStates:
    """A rank's names, shapes, buffers and frozen parameters."""

    path: Path
    module: Mapping[str, TorchTensor]
    buffers: tuple[str, ...]
    groups: tuple[_Shapes, ...]
    frozen: _Shapes
    fragments: Mapping[str, TorchTensor]
    shared: Mapping[str, str]
    version: str | None


def find_shards(folder: Path) -> tuple[Path, Path]:
    """The folder with the shards, and the one with the configuration.

    Raises:
        CheckpointError: `latest` names anything but a folder beside it.
    """
    latest = folder / LATEST
    if not latest.is_file():
        home = folder.resolve().parent
        return folder, home if (home / LATEST).is_file() else folder
    with open_file(inside(folder, LATEST, LATEST)) as handle:
        size = min(latest.stat().st_size, _MAX_TAG_BYTES + 1)
        tag = read_exactly(handle, 0, size, latest).decode("utf-8", "replace").strip()
    plain = tag and tag not in (".", "..") and not re.search(r"[/\\\x00-\x1f]", tag)
    if not plain or len(tag) > _MAX_TAG_BYTES:
        refuse("`latest` names no folder beside it", latest, "a plain name", repr(tag[:80]))
    path = folder / tag
    if not os.path.isdir(path):  # Unlike Path.is_dir, no error where a name is too long.
        refuse("the folder that `latest` names is missing", latest, f"a folder {tag!r}", "no such folder")
    return require_inside(folder, path), folder


def list_shards(tag: Path) -> tuple[list[Path], list[Path]]:
    """The files of optimizer states and of model states, each in the order of ranks.

    Raises:
        CheckpointError: A rank is missing, or there are files of another kind of parallelism.
    """
    optimizers: dict[int, Path] = {}
    states: dict[int, Path] = {}
    for name in sorted(path.name for path in tag.iterdir()):
        if name.endswith("_optim_states.pt"):
            found, match = optimizers, OPTIMIZER_FILE.fullmatch(name)
        elif name.endswith("_model_states.pt"):
            found, match = states, _MODEL_FILE.fullmatch(name)
        else:
            continue
        rank = int(match[1] or 0) if match else -1
        if match is None or int(match[2]) or rank in found:
            refuse(
                "a shard that otau does not merge: tensor, expert or pipeline parallel, or two of a rank",
                tag,
                "[bf16_]zero_pp_rank_N_mp_rank_00_optim_states.pt and *mp_rank_00_model_states.pt",
                name,
            )
        found[rank] = inside(tag, name, name)
    for kind, found in (("_optim_states.pt", optimizers), ("_model_states.pt", states)):
        absent = [rank for rank in range(max(1, len(found))) if rank not in found]
        if absent:
            refuse("shards are missing", tag, f"*{kind} of every rank", f"none of rank {absent[0]}")
    return [optimizers[r] for r in sorted(optimizers)], [states[r] for r in sorted(states)]


def read_optimizer_states(path: Path) -> OptimizerStates:
    """Reads what a `*_optim_states.pt` says; no tensor.

    Raises:
        CheckpointError: It is damaged, hostile, or not what DeepSpeed writes.
    """
    document = _mapping(read_torch_file(path), path, "the file")
    states = _mapping(document.get("optimizer_state_dict"), path, "optimizer_state_dict")
    stage = states.get("zero_stage")
    if isinstance(stage, Record) and stage.args:
        stage = stage.args[0]
    if type(stage) is not int or stage not in _GROUPS:
        refuse("a ZeRO stage that otau does not merge", path, "1, 2 or 3", type(stage).__name__)
    count = states.get("partition_count")
    counts = count if isinstance(count, list) else [count]
    if not counts or any(type(n) is not int or n != counts[0] or n < 1 for n in counts):
        refuse("parameter groups of different ranks", path, "one partition_count", "several, or none")
    groups = states.get(_GROUPS[stage])
    if not isinstance(groups, list) or not all(is_flat(group) for group in groups) or not groups:
        refuse(
            "masters that are no flat vectors", f"{path}: {_GROUPS[stage]}", "1-D tensors", "something else"
        )
    if any(group.dtype != groups[0].dtype for group in groups):
        refuse("masters of several types", f"{path}: {_GROUPS[stage]}", groups[0].dtype, "others too")
    paddings = states.get("param_alignment_paddings")
    if paddings is not None:
        rows = paddings if isinstance(paddings, list) else [None]
        _check_count(rows, path, "param_alignment_paddings")
        if not all(isinstance(row, list) and all(type(n) is int and n >= 0 for n in row) for row in rows):
            refuse("paddings that are no numbers", path, "lists of numbers", "something else")
        paddings = tuple(map(tuple, rows))
    return OptimizerStates(path, stage, counts[0], tuple(groups), paddings, _version(document))


def read_model_states(path: Path) -> ModelStates:
    """Reads what a `*_model_states.pt` says; no tensor.

    Raises:
        CheckpointError: It is damaged, hostile, or not what DeepSpeed writes.
    """
    document = _mapping(read_torch_file(path), path, "the file")
    module = _mapping(document.get("module"), path, "module")
    names = document.get("buffer_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        refuse("no model states of DeepSpeed", path, "buffer_names", "none")
    groups = document.get("param_shapes")
    if not isinstance(groups, list):
        refuse("no model states of DeepSpeed", path, "param_shapes", "none")
    _check_count(groups, path, "param_shapes")
    shared = _mapping(document.get("shared_params"), path, "shared_params")
    if not all(isinstance(name, str) for name in shared.values()):
        refuse("shared parameters that are no names", path, "names", "something else")
    fragments = _mapping(document.get("frozen_param_fragments") or {}, path, "frozen_param_fragments")
    if not all(isinstance(tensor, TorchTensor) for tensor in fragments.values()):
        refuse("frozen parameters that are no tensors", path, "tensors", "something else")
    return ModelStates(
        path,
        {name: value for name, value in module.items() if isinstance(value, TorchTensor)},
        tuple(names),
        tuple(_shapes(group, path, "param_shapes") for group in groups),
        _shapes(document.get("frozen_param_shapes") or {}, path, "frozen_param_shapes"),
        fragments,
        shared,
        _version(document),
    )


def is_flat(value: Any) -> bool:
    """Whether it is a vector whose numbers lie one after the other."""
    return isinstance(value, TorchTensor) and len(value.shape) == 1 and value.is_contiguous


def _mapping(value: Any, path: Path, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        refuse("no shard of DeepSpeed ZeRO", f"{path}: {what}", "a dict of names", type(value).__name__)
    return value


def _check_count(groups: list[Any], path: Path, what: str) -> None:
    """Refuse lists of lists that are beyond all bounds: a pickle may name one list a million times."""
    count = len(groups) + sum(len(group) for group in groups if isinstance(group, (dict, list)))
    if count > _MAX_PARAMETERS:
        where = f"{path}: {what}"
        refuse("more parameters than are read", where, f"at most {_MAX_PARAMETERS:,}", f"{count:,}")


def _shapes(value: Any, path: Path, what: str) -> _Shapes:
    shapes = _mapping(value, path, what)
    try:
        return {name: check_shape(shape) for name, shape in shapes.items()}
    except ValueError as error:
        return refuse("a shape that is none", f"{path}: {what}", "numbers", error)


def _version(document: Mapping[str, Any]) -> str | None:
    version = document.get("ds_version")
    return version if isinstance(version, str) else None


def agree(path: Path, other: Path, what: str, expected: Any, got: Any) -> None:
    """Raises where two shards that must say the same do not."""
    if expected != got:
        refuse(
            f"shards of different runs: their {what} differs",
            other,
            f"{reprlib.repr(expected)}, as in {path.name}",
            reprlib.repr(got),
        )


def refuse(what: str, where: object, expected: object, got: object) -> NoReturn:
    """Raises the error for shards that cannot be merged."""
    raise CheckpointError(what, where=where, expected=expected, got=got, fix="copy the checkpoint again")
