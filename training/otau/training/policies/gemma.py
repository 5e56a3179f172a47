"""Gemma blocks as pi0 and pi0.5 use them: one tower for the VLM, one for the action expert.

Both towers share the layout of their KV cache, `(B, P, Hkv, D)` a layer, keys after RoPE. Queries are
grouped by KV head instead of repeating K and V (multi-query attention: Hkv is 1 at full size), and the
expert's scores against the prefix and against its own tokens are two products, so that the cached K and V
are read where they lie.

Formulas: RMSNorm `x * rsqrt(mean(x^2) + eps) * (1 + w)`; adaptive `xhat * (1 + scale) + shift` with
`scale, shift, gate = dense(cond)` in equal parts and residual `x + gate * branch`; split-half RoPE in
float32; tanh-GELU; softmax in float32 with a finite mask value. Source: Gemma (arXiv 2403.08295), adaptive
norm after DiT (arXiv 2212.09748).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "MASKED",
    "MLP",
    "AdaptiveRMSNorm",
    "Attention",
    "Block",
    "GemmaDims",
    "GemmaTower",
    "RMSNorm",
    "rotary_angles",
]

MASKED = -2.3819763e38
"""Score of a key that may not be seen: finite, so that a row with no valid key stays defined."""


@dataclass(frozen=True)
class GemmaDims:
    """Sizes of one tower."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float = 1e-6
    rope_theta: float = 10_000.0


class RMSNorm(nn.Module):
    """Root-mean-square norm with Gemma's `1 + weight`, computed in float32."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor, modulation: None = None) -> tuple[Tensor, None]:
        """Normalise `x` (..., W); there is no gate."""
        normed = _rms_normalise(x, self.eps) * (1.0 + self.weight.float())
        return normed.to(x.dtype), None


class AdaptiveRMSNorm(nn.Module):
    """RMS norm whose scale and shift, and the gate of its branch, come from the flow time."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise `x` (B, T, W) with `modulation` = `dense(cond)`, broadcastable to (B, T, 3 W).

        Returns:
            The normalised tensor and the gate of the branch behind this norm.
        """
        scale, shift, gate = modulation.chunk(3, dim=-1)
        normed = _rms_normalise(x, self.eps) * (1.0 + scale.float()) + shift.float()
        return normed.to(x.dtype), gate


def _rms_normalise(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary embedding.

    Args:
        positions: (B, T) int64, position of each token.
        head_dim: D, even.
        theta: Base of the frequencies.

    Returns:
        Two tensors (B, T, 1, D / 2), float32.
    """
    # The frequencies in float64, rounded once: float32 powers differ by a unit in the last place from library
    # to library, which a position of 1000 turns into keys that are 1e-4 apart.
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angle = positions.float()[:, :, None, None] * (theta**-exponent).float()
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention over an optional cached prefix and the tokens themselves."""

    def __init__(self, dims: GemmaDims) -> None:
        super().__init__()
        self.dims = dims
        width, kv_width = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
        self.q_proj = nn.Linear(dims.hidden, width, bias=False)
        self.k_proj = nn.Linear(dims.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(dims.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, dims.hidden, bias=False)

    def keys_values(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """K (rotated) and V of `x` (B, T, W): two tensors (B, T, Hkv, D)."""
        shape = (*x.shape[:2], self.dims.kv_heads, self.dims.head_dim)
        return _rotate(self.k_proj(x).reshape(shape), rotary), self.v_proj(x).reshape(shape)

    def grouped_queries(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Scaled queries of `x` (B, T, W), a group's heads side by side: (B, Hkv, G T, D) float32."""
        dims = self.dims
        batch, length = x.shape[:2]
        q = _rotate(self.q_proj(x).reshape(batch, length, dims.heads, dims.head_dim), rotary)
        q = q.transpose(1, 2).float() * dims.head_dim**-0.5
        return q.reshape(batch, dims.kv_heads, dims.heads // dims.kv_heads * length, dims.head_dim)

    def project(self, grouped: Tensor, length: int) -> Tensor:
        """Undo the grouping of (B, Hkv, G T, D) and apply the output projection: (B, T, W)."""
        dims = self.dims
        heads = grouped.reshape(grouped.shape[0], dims.heads, length, dims.head_dim).transpose(1, 2)
        return self.o_proj(heads.reshape(grouped.shape[0], length, dims.heads * dims.head_dim))

    def within(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Attend to the tokens themselves.

        Args:
            q: (B, Hkv, G T, D) as `grouped_queries` gives it.
            k: (B, T, Hkv, D).
            v: (B, T, Hkv, D).
            bias: (B, 1, 1, T, T) float32, 0 or `MASKED`.

        Returns:
            (B, Hkv, G T, D).
        """
        batch, kv_heads, rows, _ = q.shape
        length = k.shape[1]
        scores = q @ k.permute(0, 2, 3, 1).float()
        scores = scores.reshape(batch, kv_heads, self.dims.heads // kv_heads, length, length) + bias
        weights = scores.softmax(-1).reshape(batch, kv_heads, rows, length)
        return weights.to(v.dtype) @ v.transpose(1, 2)

    def with_prefix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        cached: tuple[Tensor, Tensor],
        cached_bias: Tensor,
    ) -> Tensor:
        """Attend to a cached prefix and to the tokens themselves.

        Args:
            q: (B, Hkv, G T, D) as `grouped_queries` gives it.
            k: (B, T, Hkv, D).
            v: (B, T, Hkv, D).
            bias: (1, 1, G T, T) float32 over the own tokens, or None where all see all.
            cached: K (B, Hkv, D, P) and V (B, Hkv, P, D) of the prefix.
            cached_bias: (B, 1, 1, P) float32.

        Returns:
            (B, Hkv, G T, D).
        """
        cached_k, cached_v = cached
        scores = q @ k.permute(0, 2, 3, 1).float()
        if bias is not None:
            scores = scores + bias
        cached_scores = q @ cached_k.float() + cached_bias
        weights = torch.cat([cached_scores, scores], dim=-1).softmax(-1).to(v.dtype)
        prefix_length = cached_k.shape[-1]
        cached_weights, weights = weights[..., :prefix_length], weights[..., prefix_length:]
        return cached_weights @ cached_v + weights @ v.transpose(1, 2)


class MLP(nn.Module):
    """Gated tanh-GELU feed-forward."""

    def __init__(self, dims: GemmaDims) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dims.hidden, dims.mlp, bias=False)
        self.up_proj = nn.Linear(dims.hidden, dims.mlp, bias=False)
        self.down_proj = nn.Linear(dims.mlp, dims.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, W) -> (B, T, W)."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual."""

    def __init__(self, dims: GemmaDims, norm: type[RMSNorm] | type[AdaptiveRMSNorm]) -> None:
        super().__init__()
        self.input_layernorm = norm(dims.hidden, dims.eps)
        self.self_attn = Attention(dims)
        self.post_attention_layernorm = norm(dims.hidden, dims.eps)
        self.mlp = MLP(dims)


class GemmaTower(nn.Module):
    """A stack of blocks and a final norm; the token table, if any, belongs to the policy."""

    def __init__(self, dims: GemmaDims, *, adaptive: bool = False) -> None:
        super().__init__()
        norm = AdaptiveRMSNorm if adaptive else RMSNorm
        self.dims = dims
        self.layers = nn.ModuleList(Block(dims, norm) for _ in range(dims.layers))
        self.norm = norm(dims.hidden, dims.eps)

    def encode(self, x: Tensor, positions: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Run a prefix and keep its KV cache.

        Args:
            x: (B, P, W) embeddings.
            positions: (B, P) int64.
            mask: (B, P, P) bool, [query, key], True = may attend.

        Returns:
            Keys and values of each layer, (B, P, Hkv, D), and the final output (B, P, W).
        """
        rotary = rotary_angles(positions, self.dims.head_dim, self.dims.rope_theta)
        bias = torch.where(mask, 0.0, MASKED)[:, None, None]
        keys, values = [], []
        for layer in self.layers:
            normed, _ = layer.input_layernorm(x)
            attention = layer.self_attn
            k, v = attention.keys_values(normed, rotary)
            keys.append(k)
            values.append(v)
            attended = attention.within(attention.grouped_queries(normed, rotary), k, v, bias)
            x = x + attention.project(attended, x.shape[1])
            normed, _ = layer.post_attention_layernorm(x)
            x = x + layer.mlp(normed)
        return keys, values, self.norm(x)[0]

    def modulations(self, cond: Tensor) -> list[Tensor]:
        """`dense(cond)` of every adaptive norm, in the order in which `decode` uses them.

        Args:
            cond: (..., W) conditioning vectors.

        Returns:
            2 layers + 1 tensors (..., 3 W).
        """
        norms = [
            norm for layer in self.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        return [norm.dense(cond) for norm in (*norms, self.norm)]

    def decode(
        self,
        x: Tensor,
        positions: Tensor,
        cached: list[tuple[Tensor, Tensor]],
        prefix_mask: Tensor,
        own_mask: Tensor | None,
        modulations: list[Tensor] | None = None,
    ) -> Tensor:
        """Run a suffix against a cached prefix.

        Args:
            x: (B, T, W) embeddings.
            positions: (B, T) int64.
            cached: K (B, Hkv, D, P) and V (B, Hkv, P, D) of each layer.
            prefix_mask: (B, P) bool, True = valid.
            own_mask: (T, T) bool, [query, key], or None where all tokens see each other.
            modulations: As `modulations` gives them, broadcastable to (B, T, 3 W); None with plain norms.

        Returns:
            (B, T, W) after the final norm.
        """
        dims = self.dims
        rotary = rotary_angles(positions, dims.head_dim, dims.rope_theta)
        cached_bias = torch.where(prefix_mask, 0.0, MASKED)[:, None, None]
        bias = None
        if own_mask is not None:
            bias = torch.where(own_mask, 0.0, MASKED).repeat(dims.heads // dims.kv_heads, 1)
        modulation = iter(modulations or [None] * (2 * dims.layers + 1))
        for layer, layer_cache in zip(self.layers, cached, strict=True):
            normed, gate = layer.input_layernorm(x, next(modulation))
            attention = layer.self_attn
            k, v = attention.keys_values(normed, rotary)
            q = attention.grouped_queries(normed, rotary)
            attended = attention.with_prefix(q, k, v, bias, layer_cache, cached_bias)
            x = _gated_residual(x, attention.project(attended, x.shape[1]), gate)
            normed, gate = layer.post_attention_layernorm(x, next(modulation))
            x = _gated_residual(x, layer.mlp(normed), gate)
        return self.norm(x, next(modulation))[0]


def _gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + branch if gate is None else x + branch * gate
