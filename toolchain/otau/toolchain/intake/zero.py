"""DeepSpeed ZeRO-1, 2 and 3: the shards of all ranks, as one set of weights.

Where things are, as DeepSpeed 0.18 and 0.19 write them (and their `zero_to_fp32` reads them):
- `*_optim_states.pt`, one a rank: the float32 masters of the trained parameters, as flat vectors. ZeRO-1 and
  2 cut the vector of each parameter group in as many parts as there are ranks. ZeRO-3 cuts every parameter,
  padded to a multiple of the ranks, and lays a rank's parts one after the other.
- `*_model_states.pt`, one (ZeRO-3: one a rank): names and shapes, buffers, and frozen parameters, the last
  in ZeRO-3 cut likewise. ZeRO-1 lists no frozen ones; they are in `module`, from where `zero_to_fp32` drops
  them.
Optimizer moments are never read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from otau.toolchain.intake.files import FileRead, Piece
from otau.toolchain.intake.opened import OpenedCheckpoint
from otau.toolchain.intake.torch_file import TorchTensor
from otau.toolchain.intake.zero_shards import (
    LATEST,
    OPTIMIZER_FILE,
    ModelStates,
    OptimizerStates,
    agree,
    find_shards,
    is_flat,
    list_shards,
    read_model_states,
    read_optimizer_states,
    refuse,
)
from otau.training.policies.weights import StoredTensor

__all__ = ["is_zero", "open_zero"]


def is_zero(folder: Path) -> bool:
    """Whether a folder is a DeepSpeed checkpoint, or the tag folder within one."""
    if (folder / LATEST).is_file():
        return True
    return folder.is_dir() and any(OPTIMIZER_FILE.fullmatch(path.name) for path in folder.iterdir())


def open_zero(folder: Path) -> OpenedCheckpoint:
    """Open a DeepSpeed ZeRO checkpoint: trained parameters as their float32 masters, the rest as saved.

    Buffers of floating point come as float32, which loses nothing and is what DeepSpeed's own merge gives.
    A parameter under several names is one `StoredTensor` under all of them.

    Args:
        folder: Holds `latest` and the folder that it names, or is that folder.

    Raises:
        CheckpointError: A shard is missing or damaged, asks to run code, or the shards are not of one run.
    """
    tag, home = find_shards(folder)
    ranks, states = list_shards(tag)
    optimizers = [read_optimizer_states(path) for path in ranks]
    first = optimizers[0]
    for other in optimizers[1:]:
        agree(first.path, other.path, "zero_stage", first.stage, other.stage)
        agree(first.path, other.path, "partition_count", first.ranks, other.ranks)
        agree(first.path, other.path, "ds_version", first.version, other.version)
        agree(first.path, other.path, "number of groups", len(first.groups), len(other.groups))
    if first.ranks != len(ranks):
        refuse("shards are missing, or left over from another run", tag, first.ranks, f"{len(ranks)} ranks")
    wanted = len(ranks) if first.stage == 3 else 1
    if len(states) != wanted:
        refuse("model states are missing", tag, f"{wanted} *_model_states.pt", f"{len(states)}")
    models = [read_model_states(path) for path in states]
    if first.version and models[0].version:
        agree(first.path, models[0].path, "ds_version", first.version, models[0].version)
    merge = _merge_cut_parameters if first.stage == 3 else _merge_cut_groups
    weights = _weights(models, merge(optimizers, models))
    name = f"DeepSpeed ZeRO-{first.stage}, {len(ranks)} rank{'s' if len(ranks) > 1 else ''}"
    latest = [folder / LATEST] if (folder / LATEST).is_file() else []
    return OpenedCheckpoint(home, name, weights, (*latest, *states, *ranks))


def _merge_cut_groups(
    optimizers: Sequence[OptimizerStates], models: Sequence[ModelStates]
) -> dict[str, StoredTensor]:
    """ZeRO-1 and 2: the parts of all ranks make a group's vector, in which parameters follow each other."""
    shapes, first = models[0].groups, optimizers[0]
    agree(models[0].path, first.path, "number of groups", len(shapes), len(first.groups))
    if first.paddings and [len(row) for row in first.paddings] != [len(group) for group in shapes]:
        refuse("paddings of other parameters", first.path, [len(g) for g in shapes], "other numbers")
    merged = {}
    for index, group in enumerate(shapes):
        parts = [optimizer.groups[index] for optimizer in optimizers]
        paddings = first.paddings[index] if first.paddings else (0,) * len(group)
        dtype = _one_dtype(parts)
        at = 0
        for (name, shape), padding in zip(group.items(), paddings, strict=True):
            merged[name] = FileRead(_cut(parts, at, at + math.prod(shape)), shape, dtype).stored()
            at += math.prod(shape) + padding
        # What is left over is padding: of a rank to an even number, and of the ranks to one length.
        held, align = sum(part.numel for part in parts), 2 * len(parts)
        if -(-at // align) != -(-held // align):
            refuse("masters of other parameters", first.path, f"{at:,} numbers", f"{held:,}")
    return merged


def _merge_cut_parameters(
    optimizers: Sequence[OptimizerStates], models: Sequence[ModelStates]
) -> dict[str, StoredTensor]:
    """ZeRO-3: of each parameter every rank has a part, at the same place in its vector."""
    first, states = optimizers[0], models[0]
    sizes = [group.numel for group in first.groups]
    for other in optimizers[1:]:
        agree(first.path, other.path, "sizes of groups", sizes, [group.numel for group in other.groups])
    for state in models[1:]:
        # As lists: also the order must be one.
        for what, mine, theirs in (
            ("param_shapes", [[*g.items()] for g in states.groups], [[*g.items()] for g in state.groups]),
            ("frozen_param_shapes", [*states.frozen.items()], [*state.frozen.items()]),
            ("ds_version", states.version, state.version),
        ):
            agree(states.path, state.path, what, mine, theirs)
    merged = {}
    at, dtype = 0, _one_dtype([group for optimizer in optimizers for group in optimizer.groups])
    for name, shape in (item for group in states.groups for item in group.items()):
        count = math.prod(shape)
        part = -(-count // len(optimizers))
        pieces: list[Piece] = []
        for rank, optimizer in enumerate(optimizers):
            # The last ones may have less than a part, or nothing: the rest is padding.
            pieces += _cut(optimizer.groups, at, at + max(0, min(part, count - rank * part)))
        merged[name] = FileRead(tuple(pieces), shape, dtype).stored()
        at += part
    if at != sum(sizes):
        refuse("masters of other parameters", first.path, f"{at:,} numbers a rank", f"{sum(sizes):,}")
    return merged


def _weights(models: Sequence[ModelStates], trained: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Buffers, frozen and trained parameters, and the other names of shared ones."""
    first = models[0]
    weights = {}
    for name in first.buffers:
        if name in first.module:  # The others are not persistent.
            weights[name] = _as_float32(first.module[name].stored())
    for name, shape in first.frozen.items():
        weights[name] = _merge_frozen(models, name, shape)
    weights |= trained
    seen = {}
    for name, tensor in first.module.items():
        if name in weights or name in first.shared:
            continue
        if len(models) > 1 and not tensor.numel:
            refuse("a parameter of which no rank has a part", first.path, f"{name} in param_shapes", "none")
        # ZeRO-1's frozen parameters; one that is there under two names is one.
        weights[name] = seen.setdefault(tensor.identity, tensor.stored())
    for name, source in first.shared.items():
        if source not in weights:
            refuse("a shared parameter without its source", f"{first.path}: {name}", source, "no such name")
        weights[name] = weights[source]
    return weights


def _merge_frozen(models: Sequence[ModelStates], name: str, shape: tuple[int, ...]) -> StoredTensor:
    where = f"{models[0].path}: {name}"
    parts = [model.fragments[name] for model in models if name in model.fragments]
    if len(parts) != len(models):
        refuse("a frozen parameter without its values", where, f"{len(models)} parts", len(parts))
    if len(models) == 1 and parts[0].shape == shape:
        return parts[0].stored()
    count = math.prod(shape)
    if not all(is_flat(part) and part.numel == -(-count // len(models)) for part in parts):
        refuse("a frozen parameter of another size", where, list(shape), [list(p.shape) for p in parts])
    dtype = _one_dtype(parts)
    return FileRead(_cut(parts, 0, count), shape, dtype).stored()


def _cut(vectors: Sequence[TorchTensor], begin: int, end: int) -> tuple[Piece, ...]:
    """Where the numbers from `begin` to `end` of several vectors in a row lie."""
    pieces: list[Piece] = []
    at = 0
    for vector in vectors:
        pieces += vector.pieces(max(begin - at, 0), min(end - at, vector.numel))
        at += vector.numel
    if end > at:
        refuse("masters of other parameters", vectors[0].path, f"{end:,} numbers", f"{at:,}")
    return tuple(pieces)


def _as_float32(tensor: StoredTensor) -> StoredTensor:
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize >= 4:
        return tensor
    return StoredTensor(tensor.shape, torch.float32, lambda: tensor.read().float())


def _one_dtype(parts: Sequence[TorchTensor]) -> torch.dtype:
    for part in parts[1:]:
        agree(parts[0].path, part.path, "type", parts[0].dtype, part.dtype)
    return parts[0].dtype
