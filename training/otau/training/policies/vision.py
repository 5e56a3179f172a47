"""The vision tower: SigLIP patches projected to the width of the VLM.

The transformer is transformers' own `SiglipVisionModel`: it reproduces the golden embeddings and exports
without a patch. Its parts are called one by one because the patch convolution and the position table stay
float32 in a bfloat16 policy, the cast belonging between them and the encoder, and because its own position
table is made for square pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["VisionDims", "VisionTower"]


@dataclass(frozen=True)
class VisionDims:
    """Sizes of the vision tower."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    height: int
    width: int
    patch: int
    eps: float = 1e-6

    @property
    def tokens(self) -> int:
        """Tokens of one picture."""
        return (self.height // self.patch) * (self.width // self.patch)


class VisionTower(nn.Module):
    """SigLIP and the projector behind it."""

    def __init__(self, dims: VisionDims, width: int) -> None:
        # Here, because it takes seconds, and reading a checkpoint needs none of it.
        from transformers import SiglipVisionConfig, SiglipVisionModel

        super().__init__()
        config = SiglipVisionConfig(
            hidden_size=dims.hidden,
            intermediate_size=dims.mlp,
            num_hidden_layers=dims.layers,
            num_attention_heads=dims.heads,
            image_size=dims.patch,
            patch_size=dims.patch,
            layer_norm_eps=dims.eps,
            hidden_act="gelu_pytorch_tanh",
            vision_use_head=False,
        )
        self.tower = SiglipVisionModel(config)
        self.tower.embeddings.position_embedding = nn.Embedding(dims.tokens, dims.hidden)
        self.projector = nn.Linear(dims.hidden, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed pictures.

        Args:
            pixels: (N, 3, H, W) in [-1, 1].

        Returns:
            (N, tokens, width), not scaled.
        """
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(pixels.to(embeddings.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2) + embeddings.position_embedding.weight
        hidden = self.tower.encoder(inputs_embeds=patches.to(self.projector.weight.dtype)).last_hidden_state
        return self.projector(self.tower.post_layernorm(hidden))
