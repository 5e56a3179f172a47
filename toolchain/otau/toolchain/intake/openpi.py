r"""openpi's PyTorch checkpoints: `model.safetensors`, `assets/<id>/norm_stats.json`, often `config.json`.

Facts read from Physical-Intelligence/openpi (`models_pytorch/`, `examples/convert_jax_model_to_pytorch.py`,
`scripts/train_pytorch.py`, `transforms.py`, `models/tokenizer.py`, `policies/policy_config.py`):

    weights     OpenTau's names without the leading `model.`
    statistics  pi0 (x - mean) / (std + 1e-6); pi0.5 (x - q01) / (q99 - q01 + 1e-6) 2 - 1; back with the same
                denominators, all in float64. They may be longer than the robot's vectors
    prompt      the task without underscores, newlines and blanks around; pi0 `{task}\n`, 48 tokens; pi0.5
                `Task: {task}, State: {state};\nAction: `, 200 tokens, with a bin for each true dimension by
                numpy's digitize, or pi0's prompt where `discrete_state_input` is off
    pictures    Pillow's bilinear to 224x224 on bytes, black around it in halves
    cameras     up to three with fixed names; the others are black and masked
    schedule    10 Euler steps

The rest is in the Python code of the training run: which cameras, which widths, whether actions are relative
to the state. `otau.json` beside the weights must say it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from otau.runtime.errors import CheckpointError, UsageError, nearest_name
from otau.toolchain.intake.keys import opentau_weights
from otau.toolchain.intake.opened import OpenedCheckpoint
from otau.toolchain.intake.safetensors import is_safetensors, open_safetensors
from otau.toolchain.intake.side_file import SIDE_FILE, read_json, read_side_file
from otau.toolchain.intake.statistics import NAMES, above, statistics_weights
from otau.training.policies.config import Feature, NormMode, PolicyConfig, check_config
from otau.training.policies.files import require_inside
from otau.training.policies.keys import VLM
from otau.training.policies.weights import Weights

__all__ = ["CAMERAS", "OpenpiFacts", "is_openpi", "open_openpi"]

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""openpi's cameras, in the order of its prefix."""

_CONFIG_FILE = "config.json"
_STATISTICS_FILE = "norm_stats.json"
_EPS = 1e-6
_PROMPT = "Task: {task}, State: {state};\nAction: "
_PROMPT_LENGTHS = {"pi0": 48, "pi05": 200}
_STATISTICS_NAMES = {"state": "state", "action": "actions"}


class OpenpiFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`otau.json` beside an openpi checkpoint."""

    cameras: tuple[str, ...]
    """Those of `CAMERAS` that the robot has."""
    delta_action_state_map: dict[str, int]
    """Action index -> state index of openpi's DeltaActions; empty where actions are absolute."""
    state_dim: int | None = None
    """Width of the robot's state; None: that of the statistics."""
    action_dim: int | None = None
    """Width of the robot's actions; None: that of the statistics."""
    chunk_size: int | None = None
    """openpi's action_horizon; None: config.json states it."""
    n_action_steps: int | None = None
    """Actions of a chunk to execute; None: all."""
    discrete_state_input: bool | None = None
    """Whether the prompt of a pi0.5 has the state in it; required there."""
    use_quantile_norm: bool | None = None
    """None: as the family, on for pi0.5."""
    max_token_len: int | None = None
    """None: as the family, 48 or 200."""
    num_steps: int = 10
    asset_id: str | None = None
    """Which folder of `assets` has the statistics, where there are several."""


class _Converted(msgspec.Struct, frozen=True, kw_only=True):
    """`config.json` as openpi's converter writes it."""

    action_dim: int | None = None
    action_horizon: int | None = None
    paligemma_variant: str = "gemma_2b"
    action_expert_variant: str = "gemma_300m"


def is_openpi(folder: Path) -> bool:
    """Whether a folder holds a policy that openpi's PyTorch code saved: keys without a leading `model.`."""
    if not is_safetensors(folder):
        return False
    keys = open_safetensors(folder).weights
    named = "action_in_proj.weight" in keys and any(key.startswith("paligemma_with_expert.") for key in keys)
    config = folder / _CONFIG_FILE
    return named and not (config.is_file() and "type" in read_json(folder, _CONFIG_FILE))


def open_openpi(folder: Path) -> OpenedCheckpoint:
    """Open a policy that openpi's PyTorch code saved.

    Raises:
        UsageError: The weights are of neither pi0 nor pi0.5, or a needed fact is not stated.
        CheckpointError: A file is damaged or missing, or says what otau cannot compile.
    """
    stored = open_safetensors(folder)
    weights = opentau_weights(stored.weights, folder)
    family = _family(weights, folder)
    converted = _converted(folder)
    facts = _facts(folder, family, converted)
    quantiles = family == "pi05" if facts.use_quantile_norm is None else facts.use_quantile_norm
    mode: NormMode = "QUANTILE" if quantiles else "MEAN_STD"
    path = _statistics_file(folder, facts)
    known = _statistics(path, mode)
    padded = weights["model.action_in_proj.weight"].shape[-1]
    side = _picture_side(weights)
    dims = {
        kind: _width(kind, stated, known[kind][0], padded, path)
        for kind, stated in (("state", facts.state_dim), ("action", facts.action_dim))
    }
    config = PolicyConfig(
        type=family,
        input_features={
            "state": Feature("STATE", (dims["state"],)),
            **{name: Feature("VISUAL", (3, side, side)) for name in CAMERAS if name in facts.cameras},
        },
        output_features={"actions": Feature("ACTION", (dims["action"],))},
        normalization_mapping={"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        max_state_dim=padded,
        max_action_dim=padded,
        resize_imgs_with_padding=(side, side),
        num_steps=facts.num_steps,
        delta_action_state_map=facts.delta_action_state_map or None,
        norm_eps=0.0,
        state_text_dtype="float32",
        image_padding="centre",
        image_resize="pillow",
        clean_task=True,
        **_prompt(family, facts),
        **_chunk(facts, converted, folder),
    )
    check_config(config, folder)
    statistics = {}
    for kind, dim in dims.items():
        first, second = (values[:dim] for values in known[kind])
        low, high = NAMES[mode]
        statistics[f"{kind}.{low}"] = first
        added = second + _EPS if mode == "MEAN_STD" else above(first, second - first + _EPS)
        statistics[f"{kind}.{high}"] = added
    weights |= statistics_weights(config, statistics, path)
    files = (*stored.files, path, folder / SIDE_FILE)
    return OpenedCheckpoint(folder, "openpi PyTorch", weights, files, config)


def _family(weights: Weights, folder: Path) -> str:
    if "model.time_mlp_in.weight" in weights:
        return "pi05"
    if "model.action_time_mlp_in.weight" in weights:
        return "pi0"
    raise UsageError(
        "these weights are of a policy that otau does not compile",
        where=folder,
        expected="pi0, with action_time_mlp_in, or pi0.5, with time_mlp_in",
        got="neither",
    )


def _picture_side(weights: Weights) -> int:
    """Height and width [px] of a picture, which is square: 224 for PaliGemma's 16x16 patches of 14."""
    embeddings = f"{VLM}vision_tower.vision_model.embeddings."
    shapes = [
        weights[key].shape
        for key in (f"{embeddings}position_embedding.weight", f"{embeddings}patch_embedding.weight")
        if key in weights
    ]
    # What is missing or misshapen is named when the weights are checked.
    return math.isqrt(shapes[0][0]) * shapes[1][-1] if len(shapes) == 2 and all(shapes) else 224


def _converted(folder: Path) -> _Converted:
    """What `config.json` says, if it is there."""
    path = folder / _CONFIG_FILE
    if not path.is_file():
        return _Converted()
    try:
        converted = msgspec.convert(read_json(folder, _CONFIG_FILE), _Converted)
    except msgspec.ValidationError as error:
        raise CheckpointError("the configuration is not valid", where=path, got=error) from None
    lora = [v for v in (converted.paligemma_variant, converted.action_expert_variant) if "lora" in v]
    if lora:
        raise CheckpointError(
            "the policy was trained with LoRA, whose adapters openpi's converter does not keep",
            where=path,
            expected="a variant without LoRA",
            got=", ".join(lora),
            fix="merge the adapters before converting, and state the plain variant",
        )
    return converted


def _facts(folder: Path, family: str, converted: _Converted) -> OpenpiFacts:
    """`otau.json`, checked; where it is missing, the message says what to write."""
    facts = read_side_file(folder, OpenpiFacts)
    if facts is None:
        template: dict[str, Any] = {"cameras": list(CAMERAS), "delta_action_state_map": {}}
        template |= {"state_dim": 8, "action_dim": 7}
        if converted.action_horizon is None:
            template["chunk_size"] = 50
        if family == "pi05":
            template["discrete_state_input"] = True
        raise UsageError(
            "an openpi checkpoint does not say what robot it is for",
            where=folder,
            expected=f"{SIDE_FILE} beside the weights",
            got=", ".join(sorted(path.name for path in folder.iterdir())[:10]),
            fix=f"write it as the training configuration has it, for example {json.dumps(template)}",
        )
    path = folder / SIDE_FILE
    for name in facts.cameras:
        if name not in CAMERAS:
            raise CheckpointError(
                "openpi has no such camera",
                where=f"{path}: cameras",
                got=name,
                fix=nearest_name(name, CAMERAS),
            )
    if family == "pi05" and facts.discrete_state_input is None:
        raise CheckpointError(
            "it is not stated whether the prompt of this pi0.5 has the state in it",
            where=f"{path}: discrete_state_input",
            expected="true, or false as in openpi's pi05_libero",
            got="nothing",
            fix="state discrete_state_input as the training configuration has it",
        )
    if family == "pi0" and facts.discrete_state_input:
        raise CheckpointError(
            "a pi0 with the state in its prompt is not compiled",
            where=f"{path}: discrete_state_input",
            expected="false, or nothing",
            got="true",
        )
    return facts


def _prompt(family: str, facts: OpenpiFacts) -> dict[str, Any]:
    length = facts.max_token_len or _PROMPT_LENGTHS[family]
    fields: dict[str, Any] = {"prompt_max_length": length, "tokenizer_max_length": length}
    if family == "pi05":
        fields["prompt_template"] = _PROMPT if facts.discrete_state_input else "{task}\n"
        fields["state_bins"] = "digitize"
    return fields


def _chunk(facts: OpenpiFacts, converted: _Converted, folder: Path) -> dict[str, int]:
    stated = {facts.chunk_size, converted.action_horizon} - {None}
    if len(stated) != 1:
        raise CheckpointError(
            "the length of the action chunk is not stated, or twice",
            where=folder,
            expected=f"chunk_size in {SIDE_FILE}, or action_horizon in {_CONFIG_FILE}",
            got=f"chunk_size {facts.chunk_size}, action_horizon {converted.action_horizon}",
            fix=f"state chunk_size in {SIDE_FILE} as the training configuration has it",
        )
    (chunk,) = stated
    return {"chunk_size": int(chunk or 0), "n_action_steps": facts.n_action_steps or int(chunk or 0)}


def _statistics_file(folder: Path, facts: OpenpiFacts) -> Path:
    """The one `norm_stats.json` below `assets`, or that of the stated asset."""
    assets = require_inside(folder, folder / "assets")
    found = sorted(path for path in assets.rglob(_STATISTICS_FILE) if path.is_file())
    named = {path.parent.relative_to(assets).as_posix(): require_inside(folder, path) for path in found}
    chosen = list(named) if facts.asset_id is None else [name for name in named if name == facts.asset_id]
    if len(chosen) != 1:
        raise CheckpointError(
            "the checkpoint has not one set of normalisation statistics",
            where=folder / "assets",
            expected=f"assets/{facts.asset_id or 'NAME'}/{_STATISTICS_FILE}",
            got=", ".join(list(named)[:10]) or "none",
            fix=f"name one in {SIDE_FILE}: asset_id" if named else "copy the assets of the training run, too",
        )
    return named[chosen[0]]


def _statistics(path: Path, mode: NormMode) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The two statistics of state and action, (n,) float64."""
    document = read_json(path.parent, path.name)
    statistics = {}
    for kind, theirs in _STATISTICS_NAMES.items():
        try:
            arrays = [np.asarray(document["norm_stats"][theirs][name], np.float64) for name in NAMES[mode]]
            if arrays[0].ndim != 1 or arrays[0].shape != arrays[1].shape or not arrays[0].size:
                raise ValueError(f"shapes {arrays[0].shape} and {arrays[1].shape}")
            if not (np.abs(arrays) < np.finfo(np.float32).max).all():
                raise ValueError("numbers that are not finite in float32")
            if mode == "QUANTILE" and (arrays[1] < arrays[0]).any():
                raise ValueError("an upper quantile below the lower")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the statistics of the {kind} are not those of {mode}",
                where=f"{path}: norm_stats.{theirs}",
                expected=f"{' and '.join(NAMES[mode])}, a list of numbers each",
                got=repr(error),
                fix="compute them again with openpi's compute_norm_stats.py",
            ) from None
        statistics[kind] = (arrays[0], arrays[1])
    return statistics


def _width(kind: str, stated: int | None, known: np.ndarray, padded: int, path: Path) -> int:
    """Width of the robot's vector: as stated, or that of statistics that are not padded."""
    width = len(known)
    if stated is None and width < padded:
        return width
    if stated is None or not 1 <= stated <= min(width, padded):
        raise CheckpointError(
            f"the width of the robot's {kind} is not stated"
            if stated is None
            else f"{kind}_dim does not fit",
            where=path.name,
            expected=f"{kind}_dim in {SIDE_FILE}, at most {min(width, padded)}",
            got="statistics padded to the model's width" if stated is None else stated,
            fix=f"state {kind}_dim in {SIDE_FILE} as the robot has it",
        )
    return stated
