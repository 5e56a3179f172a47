"""Other projects' key names of pi0's and pi0.5's weights, as OpenTau's.

LeRobot and openpi share OpenTau's names but for the leading `model.`, which openpi leaves out, and for what
their versions of transformers put between the towers. Source of the older names: LeRobot 0.3.3,
`PI0Policy._transform_state_dict_keys`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from otau.runtime.errors import CheckpointError
from otau.training.policies.keys import TOWERS, VLM
from otau.training.policies.weights import StoredTensor, Weights

__all__ = ["opentau_key", "opentau_weights"]

_PALIGEMMA = f"{TOWERS}paligemma."
_MOVED = (
    (f"{_PALIGEMMA}language_model.lm_head.", f"{_PALIGEMMA}lm_head."),
    (f"{_PALIGEMMA}language_model.model.", f"{VLM}language_model."),
    (f"{_PALIGEMMA}vision_tower.", f"{VLM}vision_tower."),
    (f"{_PALIGEMMA}multi_modal_projector.", f"{VLM}multi_modal_projector."),
)
"""Where transformers before 4.52 had PaliGemma's parts -> where they are since."""

_VISION = f"{VLM}vision_tower."
_UNUSED = (f"{TOWERS}gemma_expert.lm_head.",)
"""Saved because the expert is a language model by its class; no action depends on it."""

_ADAPTERS = ("lora_", ".base_layer.", "_lora.")


def opentau_key(key: str) -> str:
    """The name that OpenTau gives to a weight of LeRobot's or openpi's."""
    if not key.startswith("model."):
        key = f"model.{key}"
    for old, new in _MOVED:
        if key.startswith(old):
            key = new + key.removeprefix(old)
    if key.startswith(_VISION) and not key.startswith(f"{_VISION}vision_model."):
        key = f"{_VISION}vision_model.{key.removeprefix(_VISION)}"
    return key


def opentau_weights(weights: Weights, where: Path, skip: Iterable[str] = ()) -> dict[str, StoredTensor]:
    """Weights by OpenTau's names, without those that no action depends on.

    Args:
        weights: By LeRobot's or openpi's names.
        where: Named in errors.
        skip: Prefixes of other keys to leave out.

    Raises:
        CheckpointError: There are adapters that are not merged, or two weights have one name.
    """
    adapters = [key for key in weights if any(mark in key for mark in _ADAPTERS)]
    if adapters:
        raise CheckpointError(
            "the checkpoint has LoRA adapters, which otau does not merge",
            where=where,
            expected="plain weights",
            got=", ".join(sorted(adapters)[:3]),
            fix="merge the adapters into the weights where they were trained, and save them again",
        )
    renamed: dict[str, StoredTensor] = {}
    for key, tensor in weights.items():
        if key.startswith(tuple(skip)):
            continue
        name = opentau_key(key)
        if name.startswith(_UNUSED):
            continue
        if name in renamed:
            raise CheckpointError(
                "two weights of the checkpoint are one weight of the policy",
                where=f"{where}: {key}",
                got=name,
                fix="export the checkpoint again",
            )
        renamed[name] = tensor
    return renamed
