"""pi0.5: flow time through the expert's adaptive norms, real-time chunking, state in the prompt or prefix.

Source: pi0.5 (arXiv 2504.16054), trained real-time chunking (arXiv 2512.05964); shapes and keys as OpenTau
stores them.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from otau.training.policies.config import PolicyConfig
from otau.training.policies.flow import time_sincos
from otau.training.policies.flow_policy import Cache, FlowPolicy, StateTokens
from otau.training.policies.keys import SHARED_KEYS
from otau.training.policies.sizes import PolicyDims

__all__ = ["Pi05"]


class Pi05(FlowPolicy):
    """The pi0.5 policy."""

    type: ClassVar[str] = "pi05"
    adaptive: ClassVar[bool] = True
    real_time_chunking: ClassVar[bool] = True
    state_in_decoder: ClassVar[bool] = False
    keys: ClassVar[dict[str, str]] = SHARED_KEYS | {
        "model.time_mlp_in.": "time_mlp_in.",
        "model.time_mlp_out.": "time_mlp_out.",
        "model.state_proj.": "state_proj.",
    }

    def __init__(self, config: PolicyConfig, dims: PolicyDims) -> None:
        super().__init__(config, dims)
        width = dims.expert.hidden
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)
        if self.state_in_prefix:
            self.state_proj = nn.Linear(config.max_state_dim, dims.vlm.hidden)

    @property
    def state_in_prefix(self) -> bool:
        """Whether the prefix carries the state as a token."""
        return self.config.state_type == "continuous"

    @classmethod
    def prompt_template(cls, config: PolicyConfig) -> str:
        """The prompt OpenTau trains with; its export scripts build another one, which is a known bug."""
        return "Task: {task}, State: {state};\n" if config.state_type == "discrete" else "Task: {task}, "

    @classmethod
    def prompt_length(cls, config: PolicyConfig) -> int:
        """Tokens the prompt is padded to."""
        return config.prompt_max_length

    def conditioning(self, t: Tensor) -> Tensor:
        """The conditioning vectors (..., W) of flow times `t` (...)."""
        weight = self.time_mlp_in.weight
        embedded = time_sincos(t, weight.shape[1]).to(weight.dtype)
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedded))))

    def time_condition(self, t: Tensor) -> list[Tensor]:
        """Scale, shift and gate of every adaptive norm: 2 layers + 1 tensors (..., 3 W)."""
        return self.expert.modulations(self.conditioning(t).to(self.expert.norm.dense.weight.dtype))

    def state_tokens(self, state: StateTokens) -> list[Tensor]:
        """`State: `, one token of the state, `:` and a newline."""
        projected = self.state_proj(state.state.to(self.state_proj.weight.dtype))[:, None]
        batch = projected.shape[0]
        opening = self.embed_text(state.open_ids).expand(batch, -1, -1)
        closing = self.embed_text(state.close_ids).expand(batch, -1, -1)
        return [opening, projected.to(opening.dtype), closing]

    def velocity(
        self,
        x: Tensor,
        condition: list[Tensor],
        cache: Cache,
        prefix_mask: Tensor,
        state: Tensor | None = None,
    ) -> Tensor:
        """The velocity field; see the base class."""
        tokens = self.action_in_proj(x.to(self.action_in_proj.weight.dtype))
        positions = self.suffix_positions(prefix_mask, x.shape[1])
        out = self.expert.decode(tokens, positions, cache, prefix_mask, None, condition)
        return self.action_out_proj(out).float()
