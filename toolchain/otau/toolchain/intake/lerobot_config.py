"""LeRobot's `config.json` of a pi0 or pi0.5, read so that no setting is overlooked.

Source: `configuration_pi0.py`, `configuration_pi05.py` and `configs/policies.py` of LeRobot 0.3.3 to 0.6.1.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, Any

import msgspec

from otau.runtime.errors import CheckpointError, UsageError, nearest_name
from otau.toolchain.intake.side_file import read_json
from otau.training.policies.config import MAX_SIZE, Feature

__all__ = ["CONFIG_FILE", "FAMILIES", "LeRobotConfig", "read_lerobot_config"]

CONFIG_FILE = "config.json"
FAMILIES = ("pi0", "pi05")


_Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]


class LeRobotConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of it; defaults are LeRobot's."""

    type: str
    input_features: dict[str, Feature]
    output_features: dict[str, Feature]
    normalization_mapping: dict[str, str] = {}
    n_obs_steps: int = 1
    chunk_size: int = 50
    n_action_steps: int = 50
    max_state_dim: _Size = 32
    max_action_dim: _Size = 32
    num_inference_steps: int = 10
    num_steps: int = 10
    """0.3's name of `num_inference_steps`."""
    image_resolution: tuple[int, int] = (224, 224)
    resize_imgs_with_padding: tuple[int, int] | None = (224, 224)
    """0.3's name of `image_resolution`."""
    tokenizer_max_length: int = 48
    empty_cameras: int = 0
    proj_width: int | None = None
    min_period: float = 4e-3
    max_period: float = 4.0
    paligemma_variant: str | None = None
    """None: written by 0.3."""
    action_expert_variant: str | None = None
    use_relative_actions: bool | None = None
    """None: written before 0.5.1."""
    freeze_vision_encoder: bool | None = None
    """None: written by 0.4.0 to 0.4.2."""
    adapt_to_pi_aloha: bool = False
    use_delta_joint_actions_aloha: bool = False
    use_peft: bool = False
    rtc_config: dict[str, Any] | None = None

    @property
    def is_old(self) -> bool:
        """Whether LeRobot 0.3 or older wrote it."""
        return self.paligemma_variant is None


_NOT_ABOUT_ACTING = {
    *("action_feature_names", "attention_implementation", "compile_mode", "compile_model", "device", "dtype"),
    *("gradient_checkpointing", "license", "pretrained_path", "pretrained_revision", "private"),
    *("push_to_hub", "relative_exclude_joints", "repo_id", "tags", "train_expert_only", "train_state_proj"),
    *("use_amp", "use_cache"),
}
_NOT_ABOUT_ACTING_PREFIXES = ("optimizer_", "scheduler_", "time_sampling_")


def read_lerobot_config(folder: Path) -> LeRobotConfig:
    """Read `config.json`, and refuse what otau would compile to something else.

    Raises:
        UsageError: Another policy than pi0 and pi0.5.
        CheckpointError: A setting is not valid, not known, or asks for what otau does not do.
    """
    path = folder / CONFIG_FILE
    document = read_json(folder, CONFIG_FILE)
    kind = document.get("type")
    if kind not in FAMILIES:
        named = kind[:100] if isinstance(kind, str) else type(kind).__name__
        raise UsageError(
            f"this is LeRobot's policy {named!r}, which otau does not compile",
            where=path,
            expected=" or ".join(FAMILIES),
            fix=nearest_name(named, FAMILIES),
        )
    known = set(LeRobotConfig.__struct_fields__) | _NOT_ABOUT_ACTING
    unknown = [
        f"{key[:100]} = {reprlib.repr(value)}"
        for key, value in document.items()
        if value and key not in known and not key.startswith(_NOT_ABOUT_ACTING_PREFIXES)
    ]
    if unknown:
        raise CheckpointError(
            "the configuration has settings that otau does not know",
            where=path,
            expected="what LeRobot 0.3 to 0.6 writes for pi0 and pi0.5",
            got=", ".join(unknown)[:500],
            fix="remove those that change nothing about how the policy acts",
        )
    try:
        config = msgspec.convert(document, LeRobotConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            "the policy's configuration is not valid", where=path, got=error, fix="correct this key"
        ) from None
    for name, feature in (config.input_features | config.output_features).items():
        if len(feature.shape) != (3 if feature.type == "VISUAL" else 1) or min(feature.shape) < 1:
            raise CheckpointError(
                "a feature's shape is not valid",
                where=f"{path}: {name}",
                expected="(channels, height, width) for VISUAL, else (dimensions,)",
                got=feature.shape,
                fix="correct the configuration's features",
            )
    _refuse(config, path)
    return config


def _refuse(config: LeRobotConfig, path: Path) -> None:
    """Refuse what is configured and would be lost."""
    sizes = config.resize_imgs_with_padding if config.is_old else config.image_resolution
    rtc = config.rtc_config or {}
    demands: dict[str, tuple[bool, object, object, str]] = {
        "use_peft": (config.use_peft, False, True, "merge the adapter and save the whole policy"),
        "adapt_to_pi_aloha": (
            config.adapt_to_pi_aloha,
            False,
            True,
            "convert states and actions outside of the policy",
        ),
        "use_delta_joint_actions_aloha": (
            config.use_delta_joint_actions_aloha,
            False,
            True,
            "set it to false",
        ),
        "n_obs_steps": (config.n_obs_steps != 1, 1, config.n_obs_steps, "train with one observation"),
        "min_period": (config.min_period != 4e-3, 4e-3, config.min_period, "train with LeRobot's value"),
        "max_period": (config.max_period != 4.0, 4.0, config.max_period, "train with LeRobot's value"),
        "rtc_config": (
            bool(rtc.get("enabled")),
            "not enabled",
            "enabled: guidance by the last chunk, at inference",
            "set enabled to false",
        ),
        "the pictures' size": (
            sizes is not None and sizes[0] != sizes[1],
            "a square",
            sizes,
            "correct image_resolution",
        ),
    }
    for name, (refused, expected, got, fix) in demands.items():
        if refused:
            raise CheckpointError(
                f"the policy is configured with {name}, which otau does not compile",
                where=f"{path}: {name}",
                expected=expected,
                got=got,
                fix=fix,
            )
