r"""LeRobot's pi0 and pi0.5: `config.json`, `model.safetensors`, and since 0.4 two processor pipelines.

Facts read from the releases 0.3.3 to 0.6.1 (`policies/pi0`, `policies/pi05`, `processor`):

    weights     OpenTau's names; those of 0.3 differ, see keys.py
    statistics  0.3: buffers among the weights. Since 0.4: the state of the normaliser's step
    prompt      pi0 `{task}\n`. pi05 `Task: {task}, State: {state};\nAction: `, its task without underscores,
                newlines and blanks around; bins by numpy's digitize; 0.4 bins the zero-padded state
    pictures    bilinear, no antialiasing. 0.3 pads left and above, later ones in halves; 0.4 pads with -1
                before it maps [0, 1] to [-1, 1], the others with 0
    cameras     one that is not in an observation is masked
    flow times  a running sum to 0.4.2, multiples of the step since

0.4 and 0.5 write the same configuration, so where they would act differently and no file tells them apart,
`otau.json` must.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from otau.runtime.errors import CheckpointError, UsageError
from otau.toolchain.intake.keys import opentau_weights
from otau.toolchain.intake.lerobot_config import CONFIG_FILE, LeRobotConfig, read_lerobot_config
from otau.toolchain.intake.lerobot_processors import (
    ACTION,
    STATE,
    Normalisation,
    Processors,
    buffered_normalisation,
    read_processors,
)
from otau.toolchain.intake.opened import OpenedCheckpoint
from otau.toolchain.intake.safetensors import is_safetensors, open_safetensors
from otau.toolchain.intake.side_file import SIDE_FILE, read_json, read_side_file
from otau.toolchain.intake.statistics import statistics_weights
from otau.training.policies.config import OWN_PREFIX, Feature, PolicyConfig, check_config
from otau.training.policies.files import require_inside

__all__ = ["is_lerobot", "open_lerobot"]

_TRAINING_FILE = "train_config.json"
_PROMPT = "Task: {task}, State: {state};\nAction: "
_EARLY, _WITH_MULTIPLES, _LATEST = (0, 4, 0), (0, 4, 3), (0, 5, 0)
"""The releases from which on something is done differently."""
_BUFFERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")


class _LeRobotFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`otau.json` beside a LeRobot checkpoint."""

    lerobot_version: str | None = None
    """The release it was trained with, for example `0.4.4`."""


def is_lerobot(folder: Path) -> bool:
    """Whether a folder, or its `pretrained_model`, holds a policy that LeRobot saved."""
    path = _home(folder) / CONFIG_FILE
    if not path.is_file():
        return False
    try:
        config = read_json(path.parent, CONFIG_FILE)
    except CheckpointError:
        return False
    features = {**_mapping(config.get("input_features")), **_mapping(config.get("output_features"))}
    named = any(name == ACTION or name.startswith("observation.") for name in features)
    converted = any(key.startswith(OWN_PREFIX) for key in config)
    return "type" in config and (named or "paligemma_variant" in config) and not converted


def open_lerobot(folder: Path) -> OpenedCheckpoint:
    """Open a policy that LeRobot saved.

    Raises:
        UsageError: Another policy than pi0 and pi0.5, or no weights.
        CheckpointError: A file is damaged or missing, or says what otau cannot compile.
    """
    folder = _home(folder)
    theirs = read_lerobot_config(folder)
    if not is_safetensors(folder):
        raise UsageError(
            "this checkpoint has no weights that otau reads",
            where=folder,
            expected="model.safetensors",
            got=", ".join(sorted(path.name for path in folder.iterdir())[:10]),
            fix="merge the adapter, if it is one, and save the whole policy",
        )
    stored = open_safetensors(folder)
    weights = opentau_weights(stored.weights, folder, skip=_BUFFERS)
    extra: tuple[Path, ...] = ()
    if theirs.is_old and theirs.type == "pi0":
        generation: tuple[int, int, int] = (0, 3, 0)
        normalisation = buffered_normalisation(stored.weights, theirs.normalization_mapping, folder)
        changes: dict[str, Any] = {"tokenizer_max_length": theirs.tokenizer_max_length}
    else:
        processors = read_processors(folder, theirs.type)
        normalisation, extra = processors.normalisation, processors.files
        generation = _generation(theirs, folder)
        changes = _processed(theirs, processors, generation, folder)
    config = _config(theirs, normalisation, changes)
    check_config(config, folder / CONFIG_FILE)
    weights |= statistics_weights(config, normalisation.statistics, folder)
    major, minor, _ = generation
    name = f"LeRobot {major}.{minor}{' or later' if generation >= _LATEST else ''}"
    return OpenedCheckpoint(folder, name, weights, (*stored.files, *extra), config)


def _home(folder: Path) -> Path:
    """The folder itself, or the policy's in a folder that LeRobot's training wrote."""
    inner = folder / "pretrained_model"
    return require_inside(folder, inner) if (inner / CONFIG_FILE).is_file() else folder


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _config(theirs: LeRobotConfig, normalisation: Normalisation, changes: dict[str, Any]) -> PolicyConfig:
    """OpenTau's configuration of the policy, with what differs from OpenTau's preprocessing."""
    fields: dict[str, Any] = {
        "type": theirs.type,
        "input_features": {STATE: _state(theirs), **_cameras(theirs)},
        "output_features": {ACTION: _action(theirs)},
        "normalization_mapping": {
            "VISUAL": "IDENTITY",
            "STATE": normalisation.state,
            "ACTION": normalisation.action,
        },
        "chunk_size": theirs.chunk_size,
        "n_action_steps": theirs.n_action_steps,
        "num_steps": theirs.num_steps if theirs.is_old else theirs.num_inference_steps,
        "max_state_dim": theirs.max_state_dim,
        "max_action_dim": theirs.max_action_dim,
        "resize_imgs_with_padding": theirs.resize_imgs_with_padding,
        "empty_cameras": theirs.empty_cameras,
        "proj_width": theirs.proj_width,
        "norm_eps": 0.0,
        "state_text_dtype": "float32",
    }
    return PolicyConfig(**fields | changes)


def _processed(
    theirs: LeRobotConfig, processors: Processors, generation: tuple[int, int, int], folder: Path
) -> dict[str, Any]:
    """What LeRobot does since it has pipelines."""
    dim, padded = _state(theirs).shape[0], theirs.max_state_dim
    relative = processors.relative(_action(theirs).shape[0])
    if relative and max(relative) >= dim:
        raise CheckpointError(
            "actions are relative to states that are not there",
            where=folder,
            expected=f"action indices below {dim}, the width of the state",
            got=relative,
        )
    changes: dict[str, Any] = {
        "resize_imgs_with_padding": theirs.image_resolution,
        "image_padding": "centre",
        "image_fill": -1.0 if generation < _LATEST else 0.0,
        "flow_times": "sum" if generation < _WITH_MULTIPLES else "multiples",
        "delta_action_state_map": {str(index): index for index in relative} or None,
        "prompt_max_length": processors.prompt_length,
        "tokenizer_max_length": processors.prompt_length,
    }
    if theirs.type == "pi05":
        changes |= {
            "prompt_template": _PROMPT,
            "clean_task": True,
            "state_bins": "digitize",
            "state_text_dims": padded if generation < _LATEST and dim < padded else None,
        }
    return changes


def _generation(theirs: LeRobotConfig, folder: Path) -> tuple[int, int, int]:
    """The first release that acts as the one that the policy was trained with."""
    facts = read_side_file(folder, _LeRobotFacts)
    if facts is not None and facts.lerobot_version is not None:
        found = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})(\D|$)", facts.lerobot_version)
        release = tuple(map(int, found.groups()[:3])) if found else (0, 0, 0)
        if release < _EARLY:
            raise CheckpointError(
                "the stated release of LeRobot is none that saves pipelines",
                where=f"{folder / SIDE_FILE}: lerobot_version",
                expected="0.4.0 or later, with all three numbers",
                got=facts.lerobot_version,
            )
        return max(known for known in (_EARLY, _WITH_MULTIPLES, _LATEST) if known <= release)
    if theirs.use_relative_actions is not None:
        return _LATEST
    if theirs.freeze_vision_encoder is None:
        return _EARLY
    if (folder / _TRAINING_FILE).is_file():
        return _LATEST if "cudnn_deterministic" in read_json(folder, _TRAINING_FILE) else _WITH_MULTIPLES
    dim = _state(theirs).shape[0]
    differences = []
    if theirs.type == "pi05" and dim < theirs.max_state_dim:
        differences.append(f"the prompt has {dim} bins of the state, or {theirs.max_state_dim}")
    height, width = theirs.image_resolution
    for name, camera in _cameras(theirs).items():
        if camera.shape[1] * width != camera.shape[2] * height:
            differences.append(f"{name} {camera.shape[1:]} is padded with 0, or with -1")
    if differences:
        raise CheckpointError(
            "LeRobot 0.4 and 0.5 would act differently with this checkpoint, and it does not say which it is",
            where=folder,
            got="; ".join(differences),
            expected=f"{_TRAINING_FILE} beside it, or {SIDE_FILE}",
            fix=f'state the release it was trained with in {SIDE_FILE}: {{"lerobot_version": "0.4.4"}}',
        )
    return _LATEST


def _state(theirs: LeRobotConfig) -> Feature:
    return theirs.input_features.get(STATE, Feature("STATE", (theirs.max_state_dim,)))


def _action(theirs: LeRobotConfig) -> Feature:
    return theirs.output_features.get(ACTION, Feature("ACTION", (theirs.max_action_dim,)))


def _cameras(theirs: LeRobotConfig) -> dict[str, Feature]:
    """The pictures, with the always masked `empty_camera`s, which `PolicyConfig.cameras` leaves out."""
    return {name: feature for name, feature in theirs.input_features.items() if feature.type == "VISUAL"}
