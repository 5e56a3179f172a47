"""LeRobot's processor pipelines, before and behind the policy, and the buffers that 0.3 has instead.

The formulas (0.4 to 0.6, `processor/normalize_processor.py`; 0.3, `policies/normalize.py`; eps 1e-8):

    MEAN_STD            (x - mean) / (std + eps), back x std + mean
    MIN_MAX, QUANTILES  2 (x - low) / d - 1, back (x + 1) d / 2 + low, d = high - low, or eps where that is 0
    0.3's MIN_MAX       with d = max - min + eps, back with d = max - min
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from otau.runtime.errors import CheckpointError
from otau.runtime.manifest import MAXIMA
from otau.runtime.spec import NormMode
from otau.toolchain.intake.safetensors import read_safetensors
from otau.toolchain.intake.side_file import read_json
from otau.toolchain.intake.statistics import NAMES, above
from otau.training.policies.files import inside
from otau.training.policies.weights import Weights

__all__ = [
    "ACTION",
    "POSTPROCESSOR",
    "PREPROCESSOR",
    "STATE",
    "Normalisation",
    "Processors",
    "buffered_normalisation",
    "read_processors",
]

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"

STATE, ACTION = "observation.state", "action"
_OLD_EPS = 1e-8

_MODES: dict[str, tuple[NormMode, tuple[str, ...]]] = {
    "IDENTITY": ("IDENTITY", ()),
    "MEAN_STD": ("MEAN_STD", ("mean", "std")),
    "MIN_MAX": ("MIN_MAX", ("min", "max")),
    "QUANTILES": ("QUANTILE", ("q01", "q99")),
    "QUANTILE10": ("QUANTILE", ("q10", "q90")),
}
"""LeRobot's mode -> OpenTau's and the names of its statistics; the formulas of both quantiles are one."""

_STATISTICS = {name for _, names in _MODES.values() for name in names}
_MAX_STATISTICS = max(MAXIMA["state.max_dim"], MAXIMA["action.max_dim"])

_TEXT_STEP = {"pi0": "pi0_new_line_processor", "pi05": "pi05_prepare_state_tokenizer_processor_step"}
_BEFORE = ("rename_observations_processor", "to_batch_processor", "relative_actions_processor")
_AFTER = ("absolute_actions_processor", "device_processor")


_Names = Annotated[list[str], msgspec.Meta(max_length=MAXIMA["action.max_dim"])]


class _Settings(msgspec.Struct, frozen=True):
    """What is read of a step's `config`; no two kinds of step share a name."""

    norm_map: dict[str, str] = {}
    normalize_observation_keys: list[str] | None = None
    eps: float = 1e-8
    max_length: int | None = None
    float_dtype: str | None = None
    enabled: bool = False
    exclude_joints: _Names | None = None
    action_names: _Names | None = None


class _Step(msgspec.Struct, frozen=True, rename={"path": "class"}):
    """One step of a pipeline: a registered one, or one by the path of its class."""

    registry_name: str | None = None
    path: str | None = None
    config: _Settings = _Settings()
    state_file: str | None = None

    @property
    def name(self) -> str:
        """What it is called in messages and tables."""
        return self.registry_name or str(self.path)


class _Pipeline(msgspec.Struct, frozen=True):
    """A pipeline's file."""

    steps: Annotated[list[_Step], msgspec.Meta(max_length=64)]


@dataclass(frozen=True)
class Normalisation:
    """Modes and statistics, as OpenTau's formulas with an epsilon of 0 want them."""

    state: NormMode
    action: NormMode
    statistics: dict[str, np.ndarray]
    """`state.<name>` and `action.<name>`, (n,) float32, in OpenTau's names."""


@dataclass(frozen=True)
class Processors:
    """What the pipelines say."""

    normalisation: Normalisation
    prompt_length: int
    relative: Callable[[int], list[int]]
    """Number of actions -> indices of those relative to the state."""
    files: tuple[Path, ...]


def read_processors(folder: Path, family: str) -> Processors:
    """Read the pipelines that LeRobot runs before and behind the policy.

    Raises:
        CheckpointError: A pipeline or its statistics are missing, or have a step that otau does not know.
    """
    before = _steps(folder, PREPROCESSOR)
    after = _steps(folder, POSTPROCESSOR)
    text = _TEXT_STEP[family]
    order = _check_steps(
        before,
        (*_BEFORE, "normalizer_processor", text, "tokenizer_processor", "device_processor"),
        PREPROCESSOR,
    )
    _check_steps(after, ("unnormalizer_processor", *_AFTER), POSTPROCESSOR)
    length = _only(before, "tokenizer_processor", folder / PREPROCESSOR).config.max_length
    _only(before, text, folder / PREPROCESSOR)
    if family == "pi05" and order.index("normalizer_processor") > order.index(text):
        raise CheckpointError(
            "the state is put into the prompt before it is normalised",
            where=folder / PREPROCESSOR,
            expected="normalizer_processor before " + text,
            got=", ".join(order),
        )
    _check_dtype(before, folder)
    state, state_files = _normaliser(folder, before, PREPROCESSOR, "normalizer_processor", STATE)
    action, action_files = _normaliser(folder, after, POSTPROCESSOR, "unnormalizer_processor", ACTION)
    normalisation = Normalisation(state[0], action[0], state[1] | action[1])
    if length is None:
        raise CheckpointError(
            "the prompt's length is not stated", where=f"{folder / PREPROCESSOR}: max_length", got=length
        )
    files = (folder / PREPROCESSOR, *state_files, folder / POSTPROCESSOR, *action_files)
    return Processors(normalisation, length, _relative(folder, before, after), files)


def buffered_normalisation(weights: Weights, modes: Mapping[str, str], where: Path) -> Normalisation:
    """The statistics that LeRobot 0.3 keeps among the weights.

    Raises:
        CheckpointError: They are missing, or their mode is not known.
    """
    found: dict[str, np.ndarray] = {}
    names: dict[str, NormMode] = {}
    for kind, buffer in (
        ("state", "normalize_inputs.buffer_observation_state"),
        ("action", "unnormalize_outputs.buffer_action"),
    ):
        mode = modes.get(kind.upper(), "IDENTITY")
        stored = _read_buffer(weights, buffer, where)
        names[kind], values = _statistics(kind, mode, stored, _OLD_EPS, f"{where}: {buffer}", old=True)
        found |= values
    return Normalisation(names["state"], names["action"], found)


def _read_buffer(tensors: Weights, prefix: str, where: Path) -> dict[str, np.ndarray]:
    """The statistics of a feature by name; those of pictures and of what else is stored are not read."""
    stored = {}
    for key, tensor in tensors.items():
        feature, _, name = key.rpartition(".")
        if feature != prefix or name not in _STATISTICS:
            continue
        if tensor.numel > _MAX_STATISTICS:
            raise CheckpointError(
                "statistics of more numbers than a robot has",
                where=f"{where}: {key}",
                expected=f"at most {_MAX_STATISTICS:,}",
                got=f"{tensor.numel:,}",
                fix="compute the data set's statistics again",
            )
        stored[name] = tensor.read().float().numpy()
    return stored


def _steps(folder: Path, name: str) -> list[_Step]:
    """The steps of a pipeline."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(
            "a pipeline of the checkpoint is missing, and with it the statistics",
            where=folder,
            expected=name,
            got=", ".join(sorted(p.name for p in folder.iterdir())[:10]),
            fix="save the policy together with its processors, or copy the whole pretrained_model folder",
        )
    try:
        return msgspec.convert(read_json(folder, name), _Pipeline).steps
    except msgspec.ValidationError as error:
        raise CheckpointError(
            "a pipeline of the checkpoint is not valid", where=path, got=error, fix="copy it again"
        ) from None


def _check_steps(steps: list[_Step], known: tuple[str, ...], where: str) -> list[str]:
    order = [step.name for step in steps]
    unknown = [name for name in order if name not in known]
    if unknown:
        raise CheckpointError(
            "a pipeline has a step that otau does not know",
            where=where,
            expected=", ".join(known),
            got=", ".join(unknown),
            fix="do what the step does outside of the policy, and remove it",
        )
    return order


def _only(steps: list[_Step], name: str, where: Path) -> _Step:
    """The one step of that name."""
    found = [step for step in steps if step.name == name]
    if len(found) != 1:
        raise CheckpointError(
            "a pipeline has not the steps of this policy",
            where=where,
            expected=f"one {name}",
            got=f"{len(found)} of them among {', '.join(step.name for step in steps) or 'no step'}",
        )
    return found[0]


def _check_dtype(steps: list[_Step], folder: Path) -> None:
    for step in steps:
        if step.config.float_dtype not in (None, "float32"):
            raise CheckpointError(
                "a pipeline rounds its inputs, which otau does not do",
                where=f"{folder / PREPROCESSOR}: float_dtype",
                expected="null or float32",
                got=step.config.float_dtype,
            )


def _normaliser(
    folder: Path, steps: list[_Step], pipeline: str, name: str, feature: str
) -> tuple[tuple[NormMode, dict[str, np.ndarray]], tuple[Path, ...]]:
    """Mode and statistics of the state or the action, and their file."""
    where = folder / pipeline
    step = _only(steps, name, where)
    modes, only = step.config.norm_map, step.config.normalize_observation_keys
    kind = "state" if feature == STATE else "action"
    mode = modes.get(kind.upper(), "IDENTITY")
    if kind == "state" and only is not None and STATE not in only:
        mode = "IDENTITY"
    stored: dict[str, np.ndarray] = {}
    files: tuple[Path, ...] = ()
    if step.state_file is not None:
        files = (inside(folder, step.state_file, pipeline),)
        tensors = read_safetensors(files[0])
        stored = _read_buffer(tensors, feature, files[0])
        seen = {key.rpartition(".")[0] for key in tensors}
        if modes.get("VISUAL", "IDENTITY") != "IDENTITY" and any("image" in key for key in seen):
            raise CheckpointError(
                "the pictures are normalised by statistics, which otau does not do",
                where=f"{where}: norm_map",
                expected="VISUAL: IDENTITY",
                got=modes["VISUAL"],
            )
    eps = step.config.eps
    if not 0 <= eps < 1:
        raise CheckpointError("the normaliser's eps is not valid", where=f"{where}: eps", got=eps)
    return _statistics(kind, mode, stored, eps, f"{where}: {feature}"), files


def _statistics(
    kind: str, mode: str, stored: Mapping[str, np.ndarray], eps: float, where: str, *, old: bool = False
) -> tuple[NormMode, dict[str, np.ndarray]]:
    """OpenTau's mode, and statistics whose differences are LeRobot's denominators."""
    if mode not in _MODES:
        raise CheckpointError(
            "a normalisation is not known", where=where, expected=", ".join(_MODES), got=mode
        )
    ours, names = _MODES[mode]
    missing = [name for name in names if name not in stored]
    if missing:
        raise CheckpointError(
            f"the statistics for {mode} are missing",
            where=where,
            expected=", ".join(names),
            got=", ".join(stored) or "none",
            fix="save the policy together with its data set's statistics",
        )
    if not names:
        return ours, {}
    first, second = (stored[name].reshape(-1).astype(np.float32) for name in names)
    if first.shape != second.shape or (ours != "MEAN_STD" and (second < first).any()):
        raise CheckpointError(
            "the statistics do not fit each other",
            where=where,
            expected=f"{names[0]} and {names[1]} of one length, none of the first above the second",
            got=f"{first.size:,} and {second.size:,} numbers",
            fix="compute the data set's statistics again",
        )
    if ours == "MEAN_STD":
        # Only what is done to it counts: the state is normalised, the action is brought back.
        added = second + np.float32(eps)
        second = added if kind == "state" else np.where(second == 0, added, second)
    elif old and kind == "state":
        with np.errstate(invalid="ignore"):  # 0.3's infinities for "no statistics", which are refused later
            spread = second - first
        added = spread + np.float32(eps)
        second = np.where(added == spread, second, above(first, added))
        second = np.where(spread == 0, above(first, added), second)
    else:
        second = np.where(second == first, above(first, np.full(first.shape, eps)), second)
    low, high = NAMES[ours]
    return ours, {f"{kind}.{low}": first, f"{kind}.{high}": second}


def _relative(
    folder: Path,
    before: list[_Step],
    after: list[_Step],
) -> Callable[[int], list[int]]:
    """Which actions are relative: all but those whose name has an excluded word in it."""
    relative = [step.config for step in before if step.name == "relative_actions_processor"]
    absolute = [step.config for step in after if step.name == "absolute_actions_processor"]
    enabled = [settings.enabled for settings in (*relative, *absolute)]
    if len(set(enabled)) > 1 or len(relative) != len(absolute) or len(relative) > 1:
        raise CheckpointError(
            "the pipelines do not agree on whether actions are relative to the state",
            where=folder,
            expected=f"relative_actions_processor in {PREPROCESSOR} as in {POSTPROCESSOR}",
            got=f"{len(relative)} and {len(absolute)} steps, enabled {enabled}",
        )
    if not any(enabled):
        return lambda count: []
    words = [word.lower() for word in relative[0].exclude_joints or () if word]
    names = [name.lower() for name in relative[0].action_names or ()]

    def indices(count: int) -> list[int]:
        kept = [any(word in name for word in words) for name in names[:count]]
        kept += [False] * (count - len(kept))
        return [index for index, absolute in enumerate(kept) if not absolute]

    return indices
