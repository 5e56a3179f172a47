"""pi0: flow time mixed into the action tokens, a fresh state token at the head of the suffix.

Source: pi0 (arXiv 2410.24164); shapes and keys as OpenTau stores them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otau.training.policies.config import PolicyConfig
from otau.training.policies.flow import time_sincos
from otau.training.policies.flow_policy import Cache, FlowPolicy
from otau.training.policies.keys import SHARED_KEYS
from otau.training.policies.sizes import PolicyDims

__all__ = ["Pi0", "suffix_mask"]


class Pi0(FlowPolicy):
    """The pi0 policy."""

    type: ClassVar[str] = "pi0"
    adaptive: ClassVar[bool] = False
    real_time_chunking: ClassVar[bool] = False
    state_in_decoder: ClassVar[bool] = True
    keys: ClassVar[dict[str, str]] = SHARED_KEYS | {
        "model.action_time_mlp_in.": "action_time_mlp_in.",
        "model.action_time_mlp_out.": "action_time_mlp_out.",
        "model.state_proj.": "state_proj.",
    }

    def __init__(self, config: PolicyConfig, dims: PolicyDims) -> None:
        super().__init__(config, dims)
        width = dims.expert.hidden
        self.state_proj = nn.Linear(config.max_state_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)

    @classmethod
    def prompt_template(cls, config: PolicyConfig) -> str:
        """The task, closed by one newline."""
        return "{task}\n"

    @classmethod
    def prompt_length(cls, config: PolicyConfig) -> int:
        """Tokens the prompt is padded to."""
        return config.tokenizer_max_length

    def time_condition(self, t: Tensor) -> list[Tensor]:
        """The part of `action_time_mlp_in` that flow time contributes, bias included: one tensor (..., W)."""
        layer = self.action_time_mlp_in
        width = layer.out_features
        embedded = time_sincos(t, width).to(layer.weight.dtype)
        return [F.linear(embedded, layer.weight[:, width:], layer.bias)]

    def velocity(
        self, x: Tensor, condition: list[Tensor], cache: Cache, prefix_mask: Tensor, state: Tensor | None
    ) -> Tensor:
        """The velocity field; see the base class."""
        layer = self.action_time_mlp_in
        actions = self.action_in_proj(x.to(self.action_in_proj.weight.dtype))
        mixed = F.linear(actions, layer.weight[:, : layer.out_features]) + condition[0]
        actions = self.action_time_mlp_out(F.silu(mixed))
        state_token = self.state_proj(state.to(self.state_proj.weight.dtype))[:, None]
        tokens = torch.cat([state_token, actions], dim=1)
        positions = self.suffix_positions(prefix_mask, tokens.shape[1])
        out = self.expert.decode(tokens, positions, cache, prefix_mask, suffix_mask(tokens.shape[1]))
        return self.action_out_proj(out[:, 1:]).float()


def suffix_mask(length: int) -> Tensor:
    """(T, T) bool, [query, key]: the state token sees itself; the action tokens see everything."""
    rows = torch.arange(length)
    return (rows[:, None] > 0) | (rows[None, :] == 0)
