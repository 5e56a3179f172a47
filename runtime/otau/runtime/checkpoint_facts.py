"""Facts about a checkpoint folder, read from its configuration and its tensors' headers only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from otau.runtime.errors import CheckpointError, UsageError

__all__ = ["CheckpointFacts", "TensorGroup", "read_checkpoint_facts"]

_CONFIGS = ("config.json", "hf_config.json", "train_config.json")
_POLICY_KEYS = (
    "chunk_size",
    "n_action_steps",
    "num_steps",
    "max_delay",
    "max_state_dim",
    "max_action_dim",
    "proj_width",
    "state_type",
    "resize_imgs_with_padding",
    "empty_cameras",
    "prompt_max_length",
    "tokenizer_max_length",
    "normalization_mapping",
    "config_version",
    "delta_action_state_map",
)
_MAX_CONFIG_BYTES = 64 * 1024 * 1024
"""Largest configuration that is read: that of a whole training run takes 0.1 MB."""
_GROUP_DEPTH = 4
"""How many parts of a key name a group: enough to tell VLM, expert and projections apart."""


class TensorGroup(msgspec.Struct, frozen=True):
    """Tensors whose keys begin alike."""

    name: str
    tensors: int
    parameters: int


class CheckpointFacts(msgspec.Struct, frozen=True):
    """What a checkpoint folder holds."""

    path: str
    policy: str
    config_file: str
    config: dict[str, Any]
    """The keys of the policy's configuration that shape a bundle."""
    cameras: dict[str, list[int]]
    """Name -> (channels, height, width)."""
    state_dim: int | None
    action_dim: int | None
    weights: list[str]
    """Files of weights."""
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    """Number of parameters by dtype, as stored."""
    groups: list[TensorGroup]


def read_checkpoint_facts(path: Path) -> CheckpointFacts:
    """Reads what a checkpoint folder says about itself; no tensor is loaded and no pickle opened.

    Raises:
        UsageError: The folder is not a checkpoint.
        CheckpointError: Its configuration or the header of its weights cannot be read.
    """
    file, config = _policy_config(path)
    # Other safetensors files (an optimizer's state, recordings) may lie beside the weights.
    weights = sorted(path.glob("model*.safetensors"))
    shapes = [entry for weight in weights for entry in _headers(weight)]
    dtypes: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for name, dtype, size in shapes:
        group = ".".join(name.split(".")[:-1][:_GROUP_DEPTH]) or name
        dtypes[dtype] += size
        parameters[group] += size
        tensors[group] += 1
    features = _mapping(config, "input_features")
    zero = ["latest (DeepSpeed ZeRO)"] if (path / "latest").is_file() else []
    return CheckpointFacts(
        path=str(path),
        policy=str(config.get("type", "unknown")),
        config_file=file.name,
        config={key: config[key] for key in _POLICY_KEYS if key in config},
        cameras={name: _shape(feature) for name, feature in features.items() if _kind(feature) == "VISUAL"},
        state_dim=_width(features.get("state")),
        action_dim=_width(_mapping(config, "output_features").get("actions")),
        weights=[weight.name for weight in weights] + zero,
        tensors=len(shapes),
        parameters=sum(parameters.values()),
        dtypes=dict(dtypes.most_common()),
        groups=[TensorGroup(name, tensors[name], count) for name, count in parameters.most_common()],
    )


def _policy_config(path: Path) -> tuple[Path, dict[str, Any]]:
    """The configuration's file and the policy's part of it."""
    for name in _CONFIGS:
        file = path / name
        if not file.is_file():
            continue
        try:
            with file.open("rb") as opened:
                data = opened.read(_MAX_CONFIG_BYTES + 1)
            if len(data) > _MAX_CONFIG_BYTES:
                raise ValueError(f"more than {_MAX_CONFIG_BYTES} bytes")
            config = json.loads(data)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                "the checkpoint's configuration cannot be read", where=file, got=error
            ) from error
        policy = config.get("policy") if name == "train_config.json" and isinstance(config, dict) else config
        if not isinstance(policy, dict):
            raise CheckpointError(
                "the checkpoint's configuration has no policy", where=file, expected="a mapping of keys"
            )
        return file, policy
    raise UsageError(
        "this is neither a bundle nor a checkpoint",
        where=path,
        expected=f"manifest.json, or one of {', '.join(_CONFIGS)}",
    )


def _headers(file: Path) -> Iterator[tuple[str, str, int]]:
    """Key, dtype and number of elements of every tensor of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                tensor = tensors.get_slice(key)
                size = 1
                for length in tensor.get_shape():
                    size *= length
                yield key, str(tensor.get_dtype()), size
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "the checkpoint's weights cannot be read",
            where=file,
            got=error,
            fix="check that the file was copied whole",
        ) from error


def _mapping(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _kind(feature: Any) -> Any:
    return feature.get("type") if isinstance(feature, dict) else None


def _shape(feature: Any) -> list[int]:
    """A feature's shape; empty where it has none."""
    shape = feature.get("shape") if isinstance(feature, dict) else None
    return shape if isinstance(shape, list) and all(isinstance(size, int) for size in shape) else []


def _width(feature: Any) -> int | None:
    """The last size of a feature's shape."""
    shape = _shape(feature)
    return shape[-1] if shape else None
