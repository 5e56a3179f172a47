"""OpenTau-style checkpoint folders: a configuration and `model.safetensors`, read strictly.

Strictly: a key that is missing, unexpected or of another shape, and a value that is not finite, is an error
that lists the keys. Weights keep their exact values; OpenTau's own loader rounds most of them to bfloat16
on the way in, which moves actions by up to 0.036 on the golden cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from otau.runtime.errors import CheckpointError, UsageError
from otau.training.policies.config import PolicyConfig, read_config
from otau.training.policies.flow_policy import FlowPolicy
from otau.training.policies.keys import EMBED_TOKENS, LM_HEAD, TRAINING_ONLY
from otau.training.policies.pi0 import Pi0
from otau.training.policies.pi05 import Pi05
from otau.training.policies.sizes import PolicyDims, infer_dims, read_head_dims

__all__ = [
    "FAMILIES",
    "WEIGHTS_FILE",
    "Checkpoint",
    "build_policy",
    "checkpoint_key",
    "load_checkpoint",
    "statistics_keys",
]

FAMILIES: dict[str, type[FlowPolicy]] = {family.type: family for family in (Pi0, Pi05)}
"""The policies by the name in a configuration's `type`."""

WEIGHTS_FILE = "model.safetensors"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_STATISTICS = {
    "IDENTITY": (),
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILE": ("q01", "q99"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    folder: Path
    policy: FlowPolicy
    statistics: dict[str, np.ndarray]
    """`state.<name>` (heads, state width) and `action.<name>` (heads, action width), float32."""

    @property
    def config(self) -> PolicyConfig:
        """The policy's configuration."""
        return self.policy.config


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a checkpoint folder into a float32 policy, ready to evaluate.

    Args:
        folder: Holds a configuration, `model.safetensors` and, for other than full size, `model_dims.json`.

    Returns:
        The policy and its normalisation statistics.

    Raises:
        UsageError: The folder is not there, or has no configuration or no weights, or an unknown policy type.
        CheckpointError: The contents are not those of the policy.
    """
    if not folder.is_dir():
        raise UsageError("there is no such checkpoint folder", where=folder, fix="check the path")
    config = read_config(folder, tuple(FAMILIES))
    tensors = _read_weights(folder)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    dims = infer_dims(shapes, config, read_head_dims(folder), folder / WEIGHTS_FILE)
    policy = build_policy(config, dims)
    _check_keys(policy, tensors, folder / WEIGHTS_FILE)
    statistics = _statistics(config, tensors, folder / WEIGHTS_FILE)
    weights = {}
    for name in policy.state_dict():
        key = checkpoint_key(policy, name)
        weights[name] = tensors[key if key in tensors else LM_HEAD].float()
    policy.load_state_dict(weights, strict=True, assign=True)
    return Checkpoint(folder, policy.eval().requires_grad_(False), statistics)


def build_policy(config: PolicyConfig, dims: PolicyDims) -> FlowPolicy:
    """An empty policy: its parameters have shapes and no memory, and are to be assigned."""
    with torch.device("meta"):
        return FAMILIES[config.type](config, dims)


def checkpoint_key(policy: FlowPolicy, name: str) -> str:
    """The checkpoint's key of a module parameter."""
    theirs, ours = next((theirs, ours) for theirs, ours in policy.keys.items() if name.startswith(ours))
    return theirs + name.removeprefix(ours)


def statistics_keys(config: PolicyConfig) -> dict[str, tuple[str, int]]:
    """Checkpoint key -> (name in a bundle's statistics, width).

    `normalize_targets` and `unnormalize_outputs` hold the same numbers under two keys.
    """
    modes = config.normalization_mapping
    keys = {}
    for name in _STATISTICS[modes.get("STATE", "IDENTITY")]:
        keys[f"normalize_inputs.buffer_state.{name}"] = (f"state.{name}", config.state_dim)
    for buffer in ("normalize_targets", "unnormalize_outputs"):
        for name in _STATISTICS[modes.get("ACTION", "IDENTITY")]:
            keys[f"{buffer}.buffer_actions.{name}"] = (f"action.{name}", config.action_dim)
    return keys


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir())
        sharded = "latest" in found or "pytorch_model" in found
        raise UsageError(
            "this checkpoint has no weights that otau reads",
            where=folder,
            expected=WEIGHTS_FILE,
            got="a DeepSpeed ZeRO checkpoint" if sharded else ", ".join(found[:10]),
            fix=f"merge the shards into {WEIGHTS_FILE} first"
            if sharded
            else "name a complete checkpoint folder",
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            "the weights cannot be read: the file is truncated or not safetensors",
            where=path,
            got=f"{path.stat().st_size} bytes: {error}",
            fix="copy the checkpoint again",
        ) from None


def _check_keys(policy: FlowPolicy, tensors: Mapping[str, Tensor], where: Path) -> None:
    expected = {checkpoint_key(policy, name): tuple(t.shape) for name, t in policy.state_dict().items()}
    expected[LM_HEAD] = expected[EMBED_TOKENS]
    config = policy.config
    heads = {
        tensors[key].shape[0] for key in statistics_keys(config) if key in tensors and tensors[key].dim() == 2
    }
    rows = max(heads, default=len(config.dataset_names or ("",)))
    expected |= {key: (rows, width) for key, (_, width) in statistics_keys(config).items()}

    given = {key: t for key, t in tensors.items() if not key.startswith(TRAINING_ONLY)}
    missing = [key for key in expected if key not in given]
    if LM_HEAD in given or EMBED_TOKENS in given:
        # One table under two names: a checkpoint may store either.
        missing = [key for key in missing if key not in (LM_HEAD, EMBED_TOKENS)]
    unexpected = [key for key in given if key not in expected]
    misshapen = [
        f"{key}: expected {list(expected[key])}, got {list(t.shape)}"
        for key, t in given.items()
        if key in expected and tuple(t.shape) != expected[key]
    ]
    not_float = [f"{key}: {t.dtype}" for key, t in given.items() if t.dtype not in _FLOATS]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshapen,
        "not of a floating-point type that is read": not_float,
        "not finite": [
            k for k, t in given.items() if t.dtype in _FLOATS and not bool(torch.isfinite(t).all())
        ],
        "empty": [key for key, t in given.items() if t.numel() == 0],
    }
    if LM_HEAD in given and EMBED_TOKENS in given and not torch.equal(given[LM_HEAD], given[EMBED_TOKENS]):
        problems["tied, but different"] = [LM_HEAD, EMBED_TOKENS]
    _refuse(problems, where)


def _refuse(problems: Mapping[str, Iterable[str]], where: Path) -> None:
    lines, kinds = [], []
    for kind, keys in problems.items():
        listed = sorted(keys)
        if listed:
            kinds.append(f"{len(listed)} {kind}")
            lines += [f"{kind}: {key}" for key in listed[:20]]
            lines += [f"{kind}: and {len(listed) - 20} more"] if len(listed) > 20 else []
    if kinds:
        raise CheckpointError(
            f"the weights are not those of this policy: {', '.join(kinds)}",
            where=where,
            got="\n    " + "\n    ".join(lines),
            fix="export the checkpoint again, or correct the configuration beside it",
        )


def _statistics(config: PolicyConfig, tensors: Mapping[str, Tensor], where: Path) -> dict[str, np.ndarray]:
    statistics: dict[str, np.ndarray] = {}
    for key, (name, _) in statistics_keys(config).items():
        value = tensors[key].float().numpy()
        if name in statistics and not np.array_equal(statistics[name], value):
            _refuse({"different in normalize_targets and unnormalize_outputs": [name]}, where)
        statistics[name] = value
    return statistics
