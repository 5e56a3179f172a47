"""The key names of OpenTau's checkpoints that both families share.

openpi's PyTorch checkpoints have the same names without the leading `model.`.
"""

from __future__ import annotations

__all__ = ["EMBED_TOKENS", "EXPERT", "LM_HEAD", "SHARED_KEYS", "TOWERS", "TRAINING_ONLY", "VLM"]

TOWERS = "model.paligemma_with_expert."
VLM = f"{TOWERS}paligemma.model."
EXPERT = f"{TOWERS}gemma_expert.model."

LM_HEAD = f"{TOWERS}paligemma.lm_head.weight"
EMBED_TOKENS = f"{VLM}language_model.embed_tokens.weight"
"""Tied to `LM_HEAD`: a safetensors checkpoint stores one of them, a ZeRO merge both."""

SHARED_KEYS = {
    f"{VLM}vision_tower.vision_model.": "vision.tower.",
    f"{VLM}multi_modal_projector.linear.": "vision.projector.",
    f"{VLM}language_model.embed_tokens.": "embed_tokens.",
    f"{VLM}language_model.": "vlm.",
    EXPERT: "expert.",
    "model.action_in_proj.": "action_in_proj.",
    "model.action_out_proj.": "action_out_proj.",
}
"""Prefix of a checkpoint's key -> prefix of the module's parameter; the first that fits counts."""

TRAINING_ONLY = (
    f"{TOWERS}da_head.",
    f"{TOWERS}discrete_action_embedding.",
    "normalize_discrete_actions.",
)
"""Keys of the loss on discrete action tokens, which nothing needs to act."""
