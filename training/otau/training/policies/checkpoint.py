"""Checkpoints, checked strictly: a configuration, and weights by OpenTau's key names.

Strictly: a key that is missing, unexpected or of another shape, and a value that is not finite, is an error
that lists the keys. Weights keep their exact values; OpenTau's own loader rounds most of them to bfloat16
on the way in, which moves actions by up to 0.036 on the golden cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from otau.runtime.errors import CheckpointError
from otau.training.policies.config import PolicyConfig, read_config
from otau.training.policies.flow_policy import FlowPolicy
from otau.training.policies.keys import EMBED_TOKENS, LM_HEAD, TRAINING_ONLY
from otau.training.policies.pi0 import Pi0
from otau.training.policies.pi05 import Pi05
from otau.training.policies.sizes import HeadDims, PolicyDims, infer_dims, read_head_dims
from otau.training.policies.weights import StoredTensor, Weights

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "build_policy",
    "check_checkpoint",
    "check_values",
    "checkpoint_key",
    "statistics_keys",
]

FAMILIES: dict[str, type[FlowPolicy]] = {family.type: family for family in (Pi0, Pi05)}
"""The policies by the name in a configuration's `type`."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_STATISTICS = {
    "IDENTITY": (),
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILE": ("q01", "q99"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint, whose weights are read when a policy is asked for."""

    folder: Path
    config: PolicyConfig
    dims: PolicyDims
    weights: Weights
    """By the name of the module's parameter."""
    statistics: dict[str, np.ndarray]
    """`state.<name>` (heads, state width) and `action.<name>` (heads, action width), float32."""
    stored: Weights
    """By the checkpoint's own key, what only training needs left out."""
    format: str = ""
    """What it is stored as, for people."""

    @cached_property
    def empty(self) -> FlowPolicy:
        """The policy without its weights: what there is to ask of it but running."""
        return build_policy(self.config, self.dims)

    def load(self, part: str | None = None) -> FlowPolicy:
        """The policy in float32, ready to evaluate.

        Args:
            part: `prefix` or `decoder` reads only the weights that this program needs, and leaves the others
                without memory: 11.7 and 1.7 of 13.4 GB at full size. None: all.
        """
        policy = build_policy(self.config, self.dims)
        prefix = {name for name in self.weights if name.startswith(policy.prefix_parameters)}
        wanted = {"prefix": prefix, "decoder": self.weights.keys() - prefix, None: self.weights.keys()}[part]
        loaded = {name: self.weights[name].read().float() for name in self.weights if name in wanted}
        policy.load_state_dict(loaded, strict=part is None, assign=True)
        return policy.eval().requires_grad_(False)


def check_checkpoint(
    folder: Path, weights: Weights, config: PolicyConfig | None = None, head_dims: HeadDims | None = None
) -> Checkpoint:
    """Check names and shapes of weights against the policy they are said to be; see `check_values`.

    Args:
        folder: Holds a configuration and, for other than full size, `model_dims.json`.
        weights: By OpenTau's key.
        config: None reads the folder's.
        head_dims: None reads the folder's.

    Raises:
        UsageError: There is no configuration, or an unknown policy type.
        CheckpointError: The contents are not those of the policy.
    """
    config = config or read_config(folder, tuple(FAMILIES))
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    dims = infer_dims(shapes, config, head_dims or read_head_dims(folder), folder)
    policy = build_policy(config, dims)
    stored = {key: tensor for key, tensor in weights.items() if not key.startswith(TRAINING_ONLY)}
    _check_keys(policy, stored, folder)
    statistics = _statistics(config, weights, folder)
    named = {}
    for name in policy.state_dict():
        key = checkpoint_key(policy, name)
        named[name] = weights[key if key in weights else LM_HEAD]
    return Checkpoint(folder, config, dims, named, statistics, stored)


def check_values(checkpoint: Checkpoint) -> None:
    """Read every weight once, a tensor at a time, and refuse what no policy was trained to.

    Raises:
        CheckpointError: A value is not finite, or the two names of the token table hold two tables.
    """
    stored = checkpoint.stored
    problems = {"not finite": [key for key, tensor in stored.items() if not _is_finite(tensor)]}
    if LM_HEAD in stored and EMBED_TOKENS in stored:
        tied = torch.equal(stored[LM_HEAD].read(), stored[EMBED_TOKENS].read())
        problems["tied, but different"] = [] if tied else [LM_HEAD, EMBED_TOKENS]
    _refuse(problems, checkpoint.folder)


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


def _check_keys(policy: FlowPolicy, given: Weights, where: Path) -> None:
    expected = {checkpoint_key(policy, name): tuple(t.shape) for name, t in policy.state_dict().items()}
    expected[LM_HEAD] = expected[EMBED_TOKENS]
    config = policy.config
    heads = {
        given[key].shape[0] for key in statistics_keys(config) if key in given and len(given[key].shape) == 2
    }
    rows = max(heads, default=len(config.dataset_names or ("",)))
    expected |= {key: (rows, width) for key, (_, width) in statistics_keys(config).items()}

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
        "empty": [key for key, t in given.items() if 0 in t.shape],
    }
    _refuse(problems, where)


def _is_finite(tensor: StoredTensor) -> bool:
    # In pieces: the masks of the token table would be another gigabyte.
    return all(bool(piece.isfinite().all()) for piece in tensor.read().reshape(-1).split(1 << 24))


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


def _statistics(config: PolicyConfig, tensors: Weights, where: Path) -> dict[str, np.ndarray]:
    statistics: dict[str, np.ndarray] = {}
    for key, (name, _) in statistics_keys(config).items():
        value = tensors[key].read().float().numpy()
        if name in statistics and not np.array_equal(statistics[name], value):
            _refuse({"different in normalize_targets and unnormalize_outputs": [name]}, where)
        statistics[name] = value
    return statistics
