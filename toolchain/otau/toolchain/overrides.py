"""What the user knows of a checkpoint and the checkpoint does not say: its robot.

OpenTau pads states and actions to 32 dimensions and stores the padded width, and one checkpoint may hold the
statistics of several robots. Each choice is the user's; where the checkpoint shows that one is missing, a
warning names the flag, and nothing is guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from otau.runtime.errors import UsageError, nearest_name
from otau.runtime.normalise import find_head
from otau.toolchain.manifest import head_names
from otau.training.policies import Checkpoint
from otau.training.policies.config import Feature, PolicyConfig, check_config

__all__ = ["Overrides", "apply_overrides", "padded_dims", "select_head"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Overrides:
    """What to compile otherwise than the checkpoint says."""

    norm_head: str | None = None
    """The one row of the statistics to keep: its name, its number, or a data set that was trained with it."""
    action_dims: int | None = None
    """True width of the actions."""
    state_dims: int | None = None
    """True width of the state."""
    absent_cameras: tuple[str, ...] = ()
    """Cameras that the robot does not have: the prefix goes without them."""
    without_response: bool = False
    """Compile a policy that writes a response before it acts as one that does not."""


def apply_overrides(checkpoint: Checkpoint, overrides: Overrides) -> Checkpoint:
    """The checkpoint as it is to be compiled.

    The weights stay as they are, and so does the width of the statistics: what a padded dimension is once
    normalised (-1 for a constant one of version 0) is part of what the policy saw in training.

    Args:
        checkpoint: As it was checked.
        overrides: The user's choices; without any, warnings and refusals are all that happens.

    Raises:
        UsageError: A choice does not fit the checkpoint, or it predicts a response and that was not left out.
        CheckpointError: The choices contradict the configuration, for example its delta_action_state_map.
    """
    _check_response(checkpoint, overrides)
    if overrides.norm_head is not None:
        checkpoint = select_head(checkpoint, overrides.norm_head)
    elif len(head_names(checkpoint)) > 1:
        _LOG.warning(
            "the statistics have %d heads, of which every observation must name one: %s;"
            " to compile for one robot, give --norm-head NAME",
            len(head_names(checkpoint)),
            ", ".join(head_names(checkpoint)),
        )
    config = _without_cameras(checkpoint.config, overrides.absent_cameras)
    if overrides.state_dims is not None:
        # A prompt goes on listing the padded dimensions, as it did in training.
        listed = config.state_text_dims or _width(checkpoint.statistics, "state", config.state_dim)
        config = msgspec.structs.replace(config, state_text_dims=listed)
    for kind, given in (("action", overrides.action_dims), ("state", overrides.state_dims)):
        config = _narrowed(checkpoint, config, kind, given)
    check_config(config, checkpoint.folder)
    return replace(checkpoint, config=config)


def select_head(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint with one row of its statistics; the others are gone.

    Args:
        checkpoint: With one head or several.
        name: A head's name "{robot_type}::{control_mode}", its number, or a data set of the configuration.

    Raises:
        UsageError: There is no such head.
    """
    heads, datasets = head_names(checkpoint), checkpoint.config.dataset_to_norm_index or {}
    if name in datasets and name not in heads and 0 <= datasets[name] < len(heads):
        row = datasets[name]
    else:
        row = find_head(name, heads, "--norm-head")
    config = msgspec.structs.replace(
        checkpoint.config, dataset_names=(heads[row],), dataset_to_norm_index=None
    )
    statistics = {key: value[row : row + 1].copy() for key, value in checkpoint.statistics.items()}
    return replace(checkpoint, config=config, statistics=statistics)


def padded_dims(statistics: Mapping[str, np.ndarray], kind: str) -> int:
    """How many of the last dimensions are padding by the look of it: constant zero in every head.

    Args:
        statistics: `<kind>.<name>` (heads, width), as a checkpoint has them.
        kind: `state` or `action`.
    """
    width = _width(statistics, kind, 0)
    padding = np.ones(width, bool)
    for key, value in statistics.items():
        if key.startswith(f"{kind}."):
            # A padded dimension's deviation may have been set to 1, so that it divides by something.
            blank = (value == 0) | (value == 1) if key.endswith(".std") else value == 0
            padding &= blank.all(axis=0)
    real = np.flatnonzero(~padding)
    return width - (int(real[-1]) + 1 if len(real) else 0)


def _check_response(checkpoint: Checkpoint, overrides: Overrides) -> None:
    if not checkpoint.config.predict_response:
        return
    if not overrides.without_response:
        raise UsageError(
            "this policy writes a text response before it acts, and its decoder reads the response in the KV"
            " cache: otau does not compile that, and without it the actions are others",
            where=f"{checkpoint.folder}: predict_response",
            expected="false",
            got="true",
            fix="to compile it without a response all the same, and judge its actions on the robot, give"
            " --without-response",
        )
    _LOG.warning(
        "the response that this policy was trained to write before it acts is left out: its actions are not"
        " those of the policy with a response, and no gate compares them"
    )


def _without_cameras(config: PolicyConfig, absent: tuple[str, ...]) -> PolicyConfig:
    cameras = config.cameras()
    for name in absent:
        if name not in cameras:
            raise UsageError(
                "the policy has no such camera",
                where="--absent-camera",
                got=name,
                fix=nearest_name(name, cameras),
            )
    if absent and set(absent) == set(cameras):
        raise UsageError(
            "no camera would be left",
            where="--absent-camera",
            expected=f"at least one of {', '.join(cameras)}",
            fix="leave out the flag for a camera that the robot has",
        )
    features = {name: f for name, f in config.input_features.items() if name not in absent}
    return msgspec.structs.replace(config, input_features=features)


def _narrowed(checkpoint: Checkpoint, config: PolicyConfig, kind: str, given: int | None) -> PolicyConfig:
    """The configuration with the true width of state or actions; a warning where that seems to be missing."""
    stored = config.action_dim if kind == "action" else config.state_dim
    real = _width(checkpoint.statistics, kind, 0) - padded_dims(checkpoint.statistics, kind)
    if given is None:
        if 0 < real < stored:
            _LOG.warning(
                "the last %d of %d %s dimensions are constant zero in the statistics: padding, it seems;"
                " if the robot has %d, give --%s-dims %d",
                stored - real,
                stored,
                kind,
                real,
                kind,
                real,
            )
        return config
    if not 1 <= given <= stored:
        raise UsageError(
            f"the {kind} does not have that many dimensions",
            where=f"--{kind}-dims",
            expected=f"1 to {stored}",
            got=given,
            fix="give the number of the robot's own dimensions",
        )
    if given < real:
        _LOG.warning(
            "--%s-dims %d leaves out dimensions that are not constant in the statistics: %d of them are used",
            kind,
            given,
            real,
        )
    return _with_width(config, kind, given)


def _with_width(config: PolicyConfig, kind: str, width: int) -> PolicyConfig:
    field = "output_features" if kind == "action" else "input_features"
    features = {
        name: Feature(feature.type, (width,)) if feature.type == kind.upper() else feature
        for name, feature in getattr(config, field).items()
    }
    return msgspec.structs.replace(config, **{field: features})


def _width(statistics: Mapping[str, np.ndarray], kind: str, otherwise: int) -> int:
    """Dimensions of the statistics; IDENTITY has none."""
    return next((v.shape[1] for key, v in statistics.items() if key.startswith(f"{kind}.")), otherwise)
