"""The three programs of a bundle as modules that can be exported.

`Prefix` and `Ingest` are the policy's own parts behind flat tensor inputs. `DenoiseStep` is one Euler step
with flow time folded away: what the decoder needs of flow time depends on the step alone, so it is computed
here once and kept as a table of constants. At full size that removes pi0.5's 37 adaptive-norm dense layers,
116.5 of the decoder's 430 million parameters, and the time MLP.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from otau.training.policies import FlowPolicy, PrefixInputs, StateTokens, lay_out
from otau.training.policies.flow import flow_times
from otau.training.policies.flow_policy import Cache, freeze, frozen_rows, select_rows

__all__ = ["DenoiseStep", "Ingest", "Prefix"]


class Prefix(nn.Module):
    """Observation -> KV cache."""

    def __init__(self, policy: FlowPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        images: Tensor,
        image_masks: Tensor,
        tokens: Tensor,
        token_masks: Tensor,
        state: Tensor | None = None,
        state_open: Tensor | None = None,
        state_close: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (layers, B, P, Hkv, D) and the validity mask (B, P)."""
        state_tokens = None if state is None else StateTokens(state, state_open, state_close)
        return self.policy.prefix(PrefixInputs(images, image_masks, tokens, token_masks, state_tokens))


class Ingest(nn.Module):
    """KV cache as it travels -> K (B, Hkv, D, P) and V (B, Hkv, P, D) of each layer."""

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """K of every layer, then V of every layer."""
        cache = lay_out(keys, values)
        return (*(k.contiguous() for k, _ in cache), *(v.contiguous() for _, v in cache))


class DenoiseStep(nn.Module):
    """One Euler step of the decoder, at a step number instead of a flow time."""

    def __init__(self, policy: FlowPolicy, num_steps: int) -> None:
        super().__init__()
        self.policy = policy
        with torch.no_grad():
            schedule = policy.time_condition(flow_times(num_steps, policy.config.flow_times))
            self.register_buffer("schedule", torch.stack(schedule, dim=1))
            clean = policy.time_condition(torch.zeros(()))
            self.register_buffer("clean", torch.stack(clean) if policy.real_time_chunking else None)
        self.dt = float(np.float32(-1.0 / num_steps))

    def tables(self) -> dict[str, Tensor]:
        """What flow time was folded to, by the name in the graph."""
        return {name: table for name, table in self.named_buffers(recurse=False) if table is not None}

    def forward(
        self,
        x: Tensor,
        step: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        prefix_mask: Tensor,
        action_prefix: Tensor | None = None,
        delay: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Tensor:
        """The chunk (B, T, A) after step number `step` (int64 scalar)."""
        cache: Cache = list(zip(keys, values, strict=True))
        condition = list(self.schedule[step].unbind(0))
        frozen = None
        if delay is not None:
            frozen = frozen_rows(delay, x)
            condition = select_rows(frozen, list(self.clean.unbind(0)), condition)
        x = freeze(x, action_prefix, frozen)
        velocity = self.policy.velocity(x, condition, cache, prefix_mask, state)
        return freeze(x + self.dt * velocity, action_prefix, frozen)
