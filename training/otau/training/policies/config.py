"""The policy's part of an OpenTau-style configuration.

OpenTau writes its whole training pipeline to `train_config.json` and, when it publishes, the policy alone
to `config.json`. Only what the model, the compiler and the runtime need is read; the other keys are left
alone, since OpenTau's versions differ in them.

What OpenTau does in one way only and other trainers in another (prompt, bins, letterbox) are fields too,
which the intake of those trainers' checkpoints fills in. In a file their keys begin with `otau_`, so that no
key of OpenTau's, now or later, sets one by accident.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from otau.runtime.errors import CheckpointError, UsageError, nearest_name
from otau.runtime.manifest import MAXIMA
from otau.training.policies.files import read_text

__all__ = [
    "CONFIG_FILES",
    "MAX_SIZE",
    "OWN_PREFIX",
    "Feature",
    "NormMode",
    "PolicyConfig",
    "check_config",
    "read_config",
]

CONFIG_FILES = ("config.json", "hf_config.json", "train_config.json")
"""Where a policy's configuration is looked for, in this order."""

_RANGES = {
    "chunk_size": (1, MAXIMA["flow.chunk"]),
    "n_action_steps": (1, MAXIMA["flow.n_action_steps"]),
    "max_delay": (0, MAXIMA["flow.chunk"]),
    "num_steps": (1, MAXIMA["flow.num_steps"]),
    "max_state_dim": (1, MAXIMA["state.max_dim"]),
    "max_action_dim": (1, MAXIMA["action.max_dim"]),
    "empty_cameras": (0, MAXIMA["the number of cameras"]),
    "prompt_max_length": (1, MAXIMA["prompt.max_length"]),
    "tokenizer_max_length": (1, MAXIMA["prompt.max_length"]),
    "config_version": (0, 1_000_000),
}
"""What a number may be: no more than the runtime will open."""

_EMPTY_CAMERA = "observation.images.empty_camera_"
_LARGEST_PICTURE = MAXIMA["a camera's height"]

NormMode = Literal["IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILE"]


OWN_PREFIX = "otau_"
"""Of keys that are not OpenTau's, and that every configuration written by otau has."""
_OWN = {
    name: OWN_PREFIX + name
    for name in (
        "prompt_template",
        "clean_task",
        "state_bins",
        "state_text_dims",
        "state_text_dtype",
        "norm_eps",
        "image_padding",
        "image_resize",
        "image_fill",
        "flow_times",
    )
}
"""Field -> key in a file, for what is not OpenTau's."""


MAX_SIZE = 1 << 16
"""Of a shape's numbers, before they are held against tighter bounds: the side of a camera's own picture."""


class Feature(msgspec.Struct, frozen=True):
    """One input or output of the policy."""

    type: str
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(le=MAX_SIZE)], ...], msgspec.Meta(max_length=8)]


class PolicyConfig(msgspec.Struct, frozen=True, kw_only=True, rename=_OWN):
    """What is read of a policy's configuration; defaults are OpenTau's."""

    type: str
    input_features: dict[str, Feature]
    output_features: dict[str, Feature]
    normalization_mapping: dict[str, NormMode]
    chunk_size: int = 50
    n_action_steps: int = 50
    max_delay: int = 0
    num_steps: int = 10
    max_state_dim: int = 32
    max_action_dim: int = 32
    resize_imgs_with_padding: tuple[int, int] | None = (224, 224)
    empty_cameras: int = 0
    proj_width: int | None = None
    config_version: int | None = None
    dataset_names: tuple[str, ...] | None = None
    """Names of the rows of the statistics: "{robot_type}::{control_mode}"."""
    dataset_to_norm_index: dict[str, int] | None = None
    """Data set -> row of the statistics."""
    delta_action_state_map: dict[str, int] | None = None
    state_type: Literal["discrete", "continuous"] = "discrete"
    prompt_max_length: int = 256
    tokenizer_max_length: int = 48
    predict_response: bool = False
    """Whether the policy writes a response first, which its decoder then reads in the KV cache."""
    advantage: Literal["ignore", "on", "use"] = "ignore"
    """pi0's: `ignore` has no label in the prompt; the others are served with a positive one. OpenTau writes
    this key since there are labels, so a configuration without it was trained without them."""

    prompt_template: str | None = None
    """Instead of the family's: with `{task}`, and `{state}` for a state in the prompt."""
    clean_task: bool = False
    """Whether the task is stripped, and its underscores and newlines become spaces."""
    state_bins: Literal["clip", "digitize"] = "clip"
    """How a normalised state becomes bins: see `otau.runtime.prompt.state_bins`."""
    state_text_dims: int | None = None
    """Dimensions of the normalised, zero-padded state in the prompt; None: as many as its statistics have."""
    state_text_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """In which the state of the prompt is normalised; OpenTau trains and serves in bfloat16."""
    norm_eps: float | None = None
    """Instead of the epsilon that `config_version` tells."""
    image_padding: Literal["left_top", "centre"] = "left_top"
    image_resize: Literal["bilinear", "pillow"] = "bilinear"
    image_fill: float = 0.0
    """Value of the letterbox's free part, where pictures are in [0, 1]."""
    flow_times: Literal["sum", "multiples"] = "sum"
    """At which flow times the Euler steps are taken: see `otau.training.policies.flow.flow_times`."""

    def cameras(self) -> dict[str, tuple[int, int]]:
        """Camera name -> (height, width) [px], in the order of the prefix.

        OpenTau adds a feature for each of the `empty_cameras`, which no robot delivers: those are left out.
        """
        empty = {f"{_EMPTY_CAMERA}{number}" for number in range(self.empty_cameras)}
        features = self.input_features.items()
        visual = {name: f for name, f in features if f.type == "VISUAL" and name not in empty}
        flat = [name for name, f in visual.items() if len(f.shape) != 3 or f.shape[0] != 3]
        if flat:
            raise CheckpointError(
                "a camera's shape is not (3, height, width)",
                where=flat[0],
                got=visual[flat[0]].shape,
                fix="correct the shape in input_features",
            )
        return {name: self.resize_imgs_with_padding or (f.shape[1], f.shape[2]) for name, f in visual.items()}

    @property
    def state_dim(self) -> int:
        """Width of the raw state."""
        return self._width(self.input_features, "STATE")

    @property
    def action_dim(self) -> int:
        """Width of the raw actions."""
        return self._width(self.output_features, "ACTION")

    @property
    def eps(self) -> float:
        """Epsilon of the normalisation: 1e-8 for version 0, 1e-6 since and where no version is given."""
        if self.norm_eps is not None:
            return self.norm_eps
        return 1e-8 if self.config_version == 0 else 1e-6

    @property
    def centre_degenerate(self) -> bool:
        """Whether a constant dimension normalises to 0: since version 1, not where no version is given."""
        return (self.config_version or 0) >= 1

    @staticmethod
    def _width(features: dict[str, Feature], kind: str) -> int:
        widths = [f.shape[0] for f in features.values() if f.type == kind and f.shape]
        if len(widths) != 1:
            raise CheckpointError(
                f"the configuration names {len(widths)} features of type {kind}",
                expected=f"exactly one {kind} feature with a shape",
                got=", ".join(features) or "none",
                fix="correct input_features and output_features in the checkpoint's configuration",
            )
        return widths[0]


def read_config(folder: Path, known_types: tuple[str, ...]) -> PolicyConfig:
    """Read the policy's configuration from a checkpoint folder.

    Args:
        folder: The checkpoint.
        known_types: Policy types that can be built.

    Returns:
        The checked configuration.

    Raises:
        UsageError: There is no configuration, or its policy type is not known.
        CheckpointError: The configuration is not valid.
    """
    path = next((folder / name for name in CONFIG_FILES if (folder / name).is_file()), None)
    if path is None:
        raise UsageError(
            "this checkpoint has no configuration",
            where=folder,
            expected=" or ".join(CONFIG_FILES),
            got=", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "an empty folder",
            fix="name the checkpoint folder itself, for example run/checkpoints/000040",
        )
    try:
        document = json.loads(read_text(folder, path.name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "the configuration is not valid JSON", where=path, got=error, fix="copy the checkpoint again"
        ) from None
    policy = document.get("policy", document) if isinstance(document, dict) else document
    kind = policy.get("type") if isinstance(policy, dict) else None
    if kind not in known_types:
        named = kind[:100] if isinstance(kind, str) else type(kind).__name__
        raise UsageError(
            f"unknown policy type {named!r}",
            where=path,
            expected=", ".join(known_types),
            fix=nearest_name(named, known_types),
        )
    for key in policy:
        if key.startswith(OWN_PREFIX) and key not in _OWN.values():
            raise CheckpointError(
                "the configuration has an unknown key of otau's",
                where=path,
                got=key,
                fix=nearest_name(key[:100], _OWN.values()),
            )
    try:
        config = msgspec.convert(policy, PolicyConfig, strict=True)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            "the policy's configuration is not valid", where=path, got=error, fix="correct this key"
        ) from None
    check_config(config, path)
    return config


def check_config(config: PolicyConfig, where: Path) -> None:
    """Refuse values that are out of range or contradict each other.

    Args:
        config: Of a checkpoint.
        where: Named in errors.

    Raises:
        CheckpointError: Names the key, and what it may be.
    """
    for name, (low, high) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise CheckpointError(
                f"{name} is out of range",
                where=where,
                expected=f"{low} to {high}",
                got=value,
                fix=f"correct {name}",
            )
    bounds = [
        ("n_action_steps", config.n_action_steps, "chunk_size", config.chunk_size),
        ("max_delay", config.max_delay, "chunk_size", config.chunk_size),
        ("the state's width", config.state_dim, "max_state_dim", config.max_state_dim),
        ("the actions' width", config.action_dim, "max_action_dim", config.max_action_dim),
    ]
    for name, value, limit_name, limit in bounds:
        if value > limit:
            raise CheckpointError(
                f"{name} is larger than {limit_name}",
                where=where,
                expected=f"<= {limit}",
                got=value,
                fix="correct one of them in the checkpoint's configuration",
            )
    cameras = config.cameras()
    if len(cameras) > MAXIMA["the number of cameras"]:
        raise CheckpointError(
            "the configuration names too many cameras",
            where=f"{where}: input_features",
            expected=f"at most {MAXIMA['the number of cameras']} features of type VISUAL",
            got=len(cameras),
            fix="remove those that the policy was not trained with",
        )
    too_large = [size for size in cameras.values() if not 1 <= min(size) <= max(size) <= _LARGEST_PICTURE]
    if too_large:
        raise CheckpointError(
            "a picture's size is out of range",
            where=where,
            expected=f"1 to {_LARGEST_PICTURE} pixels a side",
            got=too_large[0],
            fix="correct resize_imgs_with_padding or the cameras' shapes",
        )
    if not cameras or len(set(cameras.values())) != 1:
        raise CheckpointError(
            "the cameras do not share one picture size" if cameras else "the configuration names no camera",
            where=where,
            got=cameras or list(config.input_features),
            fix="set resize_imgs_with_padding" if cameras else "add a feature of type VISUAL",
        )
    for action, state in (config.delta_action_state_map or {}).items():
        plain = re.fullmatch(r"0|[1-9][0-9]{0,8}", action)
        if not (plain and int(action) < config.action_dim and 0 <= state < config.state_dim):
            raise CheckpointError(
                "delta_action_state_map names a dimension that is not there",
                where=where,
                expected=f"action index below {config.action_dim} -> state index below {config.state_dim}",
                got=f"{action} -> {state}",
                fix="correct delta_action_state_map, or --action-dims and --state-dims",
            )
    _check_prompt(config, where)
    if not 0 <= config.eps < 1 or not -1 <= config.image_fill <= 1:
        raise CheckpointError(
            "a number of the preprocessing is out of range",
            where=where,
            expected="0 <= otau_norm_eps < 1, -1 <= otau_image_fill <= 1",
            got=f"{config.norm_eps} and {config.image_fill}",
            fix="correct them in the checkpoint's configuration",
        )


def _check_prompt(config: PolicyConfig, where: Path) -> None:
    template, dims = config.prompt_template, config.state_text_dims
    fields = re.findall(r"\{(.*?)\}", template) if template is not None else ["task"]
    if fields.count("task") != 1 or not set(fields) <= {"task", "state"}:
        raise CheckpointError(
            "the prompt's template does not have the task once, or has something else to fill in",
            where=f"{where}: otau_prompt_template",
            expected="{task}, and {state} for a state in the prompt",
            got=template,
            fix="correct otau_prompt_template in the checkpoint's configuration",
        )
    if dims is not None and not 1 <= dims <= config.max_state_dim:
        raise CheckpointError(
            "the prompt lists another number of dimensions than the padded state has",
            where=f"{where}: otau_state_text_dims",
            expected=f"1 to {config.max_state_dim}",
            got=dims,
            fix="correct otau_state_text_dims in the checkpoint's configuration",
        )
