"""What pi0 and pi0.5 share: the prefix, the cache, and the Euler steps.

A policy is two programs. `prefix` turns pictures and prompt into the KV cache; `decode` denoises an action
chunk against it. A family (`pi05.py`, `pi0.py`) says how flow time and state enter the velocity field.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from otau.training.policies.config import PolicyConfig
from otau.training.policies.flow import euler_dt, flow_times
from otau.training.policies.gemma import GemmaTower
from otau.training.policies.sizes import PolicyDims
from otau.training.policies.vision import VisionTower

__all__ = [
    "Cache",
    "FlowPolicy",
    "PrefixInputs",
    "StateTokens",
    "freeze",
    "frozen_rows",
    "lay_out",
    "prefix_attention_mask",
    "prefix_positions",
    "select_rows",
]

Cache = list[tuple[Tensor, Tensor]]
"""K (B, Hkv, D, P) and V (B, Hkv, P, D) of each layer: the cache as the decoder reads it."""


class StateTokens(NamedTuple):
    """The state as part of the prefix (pi0.5 with `state_type="continuous"`)."""

    state: Tensor
    """(B, S) normalised and zero-padded."""
    open_ids: Tensor
    """(O,) int64, the tokens of the text before the state token."""
    close_ids: Tensor
    """(C,) int64, the tokens of the text after it."""


class PrefixInputs(NamedTuple):
    """What the VLM sees."""

    images: Tensor
    """(B, N, 3, H, W) in [-1, 1]."""
    image_masks: Tensor
    """(B, N) bool, False for a placeholder."""
    tokens: Tensor
    """(B, L) int64."""
    token_masks: Tensor
    """(B, L) bool."""
    state: StateTokens | None = None


def lay_out(keys: Tensor, values: Tensor) -> Cache:
    """Turn the cache (layers, B, P, Hkv, D) into the layout of the decoder's products."""
    return [(k.permute(0, 2, 3, 1), v.transpose(1, 2)) for k, v in zip(keys, values, strict=True)]


class FlowPolicy(nn.Module, ABC):
    """Base of the flow-matching policies."""

    type: ClassVar[str]
    """The name in a configuration's `type`."""
    keys: ClassVar[dict[str, str]]
    """Prefix of a checkpoint's key -> prefix of the module's parameter."""
    adaptive: ClassVar[bool]
    """Whether flow time enters through the expert's norms."""
    real_time_chunking: ClassVar[bool]
    """Whether `action_prefix` and `delay` are understood."""
    state_in_decoder: ClassVar[bool]
    """Whether the velocity field takes a fresh state."""

    def __init__(self, config: PolicyConfig, dims: PolicyDims) -> None:
        super().__init__()
        self.config = config
        self.dims = dims
        self.vision = VisionTower(dims.vision, dims.vlm.hidden)
        self.embed_tokens = nn.Embedding(dims.vocab, dims.vlm.hidden)
        self.vlm = GemmaTower(dims.vlm)
        self.expert = GemmaTower(dims.expert, adaptive=self.adaptive)
        self.action_in_proj = nn.Linear(config.max_action_dim, dims.expert.hidden)
        self.action_out_proj = nn.Linear(dims.expert.hidden, config.max_action_dim)

    @classmethod
    @abstractmethod
    def prompt_template(cls, config: PolicyConfig) -> str:
        """The prompt, with `{task}` and, where the state is text, `{state}`."""

    @classmethod
    @abstractmethod
    def prompt_length(cls, config: PolicyConfig) -> int:
        """Tokens the prompt is padded to."""

    @property
    def state_in_prefix(self) -> bool:
        """Whether the prefix carries the state as a token."""
        return False

    @property
    def prefix_parameters(self) -> tuple[str, ...]:
        """How the names of the prefix's parameters begin; all others are the decoder's."""
        return ("vision.", "embed_tokens.", "vlm.") + ("state_proj.",) * self.state_in_prefix

    @abstractmethod
    def time_condition(self, t: Tensor) -> list[Tensor]:
        """What the velocity field needs of flow time: the part that the compiler folds to constants.

        Args:
            t: (...) flow time.

        Returns:
            Tensors (..., width).
        """

    @abstractmethod
    def velocity(
        self, x: Tensor, condition: list[Tensor], cache: Cache, prefix_mask: Tensor, state: Tensor | None
    ) -> Tensor:
        """The velocity field.

        Args:
            x: (B, T, A) the noisy chunk, float32.
            condition: As `time_condition` gives it, broadcastable to (B, T, width).
            cache: The laid-out KV cache.
            prefix_mask: (B, P) bool.
            state: (B, S) normalised and padded, for policies with `state_in_decoder`.

        Returns:
            (B, T, A) float32.
        """

    def to_bfloat16(self) -> FlowPolicy:
        """Cast to bfloat16 as served, in place: all but the patch convolution and the position table."""
        for name, parameter in self.named_parameters():
            if not name.startswith("vision.tower.embeddings."):
                parameter.data = parameter.data.bfloat16()
        return self

    def state_tokens(self, state: StateTokens) -> list[Tensor]:
        """Embeddings that close the prefix, for policies that read the state there."""
        raise NotImplementedError(f"{self.type} does not read the state in its prefix")

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Scaled token embeddings (..., W)."""
        embedded = self.embed_tokens(tokens)
        return embedded * torch.tensor(self.dims.vlm.hidden**0.5, dtype=embedded.dtype)

    def embed_prefix(self, inputs: PrefixInputs) -> tuple[Tensor, Tensor]:
        """Embeddings (B, P, W) and validity (B, P) of pictures, prompt and, if it is there, state."""
        batch, cameras = inputs.images.shape[:2]
        pictures = self.vision(inputs.images.flatten(0, 1))
        tokens_each = self.dims.vision.tokens
        pictures = pictures.reshape(batch, cameras * tokens_each, self.dims.vlm.hidden)
        picture_mask = inputs.image_masks[:, :, None].expand(batch, cameras, tokens_each)
        parts = [pictures, self.embed_text(inputs.tokens)]
        masks = [picture_mask.reshape(batch, cameras * tokens_each), inputs.token_masks]
        if inputs.state is not None:
            for part in self.state_tokens(inputs.state):
                parts.append(part)
                masks.append(torch.ones_like(part[..., 0], dtype=torch.bool))
        return torch.cat(parts, dim=1), torch.cat(masks, dim=1)

    def prefix(self, inputs: PrefixInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The KV cache of an observation.

        Returns:
            Keys and values (layers, B, P, Hkv, D), keys after RoPE, and the validity mask (B, P).
        """
        embedded, mask = self.embed_prefix(inputs)
        keys, values, _ = self.vlm.encode(embedded, prefix_positions(mask), prefix_attention_mask(mask))
        return torch.stack(keys), torch.stack(values), mask

    def suffix_positions(self, prefix_mask: Tensor, length: int) -> Tensor:
        """Positions (B, length) of the decoder's tokens, behind the valid prefix tokens."""
        return prefix_mask.sum(-1, keepdim=True) + torch.arange(length, device=prefix_mask.device)

    def decode(
        self,
        cache: Cache,
        prefix_mask: Tensor,
        noise: Tensor,
        *,
        num_steps: int | None = None,
        action_prefix: Tensor | None = None,
        delay: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Tensor:
        """Denoise an action chunk.

        Args:
            cache: The laid-out KV cache.
            prefix_mask: (B, P) bool.
            noise: (B, T, A) float32, the chunk at flow time 1.
            num_steps: Euler steps; None takes the configuration's.
            action_prefix: (B, T, A) normalised actions already committed.
            delay: (B,) int64, how many of them are frozen.
            state: (B, S) normalised and padded, for policies with `state_in_decoder`.

        Returns:
            (B, T, A) normalised actions, float32.
        """
        num_steps = num_steps or self.config.num_steps
        frozen = frozen_rows(delay, noise) if delay is not None else None
        x = freeze(noise, action_prefix, frozen)
        for t in flow_times(num_steps, self.config.flow_times):
            condition = self.time_condition(t.expand(1, noise.shape[1]))
            if frozen is not None:
                # A frozen row is clean, and is told so: its flow time is 0.
                clean = self.time_condition(torch.zeros(1, noise.shape[1]))
                condition = select_rows(frozen, clean, condition)
            v = self.velocity(x, condition, cache, prefix_mask, state)
            x = freeze(x + euler_dt(num_steps) * v, action_prefix, frozen)
        return x


def prefix_positions(mask: Tensor) -> Tensor:
    """RoPE positions (B, P) int64: valid tokens are counted, padding is not."""
    return mask.long().cumsum(-1) - 1


def prefix_attention_mask(mask: Tensor) -> Tensor:
    """(B, P, P) bool, [query, key]: every valid token sees every valid token."""
    return mask[:, None, :] & mask[:, :, None]


def frozen_rows(delay: Tensor, noise: Tensor) -> Tensor:
    """(B, T, 1) bool, True for the rows below `delay`."""
    return (torch.arange(noise.shape[1], device=noise.device) < delay[:, None])[..., None]


def freeze(x: Tensor, action_prefix: Tensor | None, frozen: Tensor | None) -> Tensor:
    """Put the committed actions back into the frozen rows of `x` (B, T, A)."""
    return x if frozen is None else torch.where(frozen, action_prefix, x)


def select_rows(frozen: Tensor, clean: list[Tensor], noisy: list[Tensor]) -> list[Tensor]:
    """Conditioning a row: `clean` where the row is frozen, `noisy` elsewhere."""
    return [torch.where(frozen, c, n) for c, n in zip(clean, noisy, strict=True)]
