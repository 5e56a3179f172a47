"""The sizes of a policy, read off its weights.

OpenTau hard-codes the sizes of PaliGemma 3B and does not store them. Widths and depths follow from the
shapes of the weights; the number of heads does not, and comes from `model_dims.json` beside the weights, or
is that of the full-size model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from otau.runtime.errors import CheckpointError, nearest_name
from otau.runtime.manifest import MAXIMA
from otau.training.policies.config import PolicyConfig
from otau.training.policies.files import read_text
from otau.training.policies.gemma import GemmaDims
from otau.training.policies.keys import EMBED_TOKENS, EXPERT, LM_HEAD, VLM
from otau.training.policies.vision import VisionDims

__all__ = ["DIMS_FILE", "FULL_HEADS", "HeadDims", "PolicyDims", "infer_dims", "read_head_dims"]

DIMS_FILE = "model_dims.json"
_MAX_LAYERS = MAXIMA["kv_layers"]


class HeadDims(msgspec.Struct, frozen=True, kw_only=True):
    """`model_dims.json`: what the shapes of the weights don't tell, and what they must agree with."""

    heads: int
    kv_heads: int
    head_dim: int
    vis_heads: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    siglip_layer_norm_eps: float = 1e-6
    layers: int | None = None
    vlm_hidden: int | None = None
    vlm_mlp: int | None = None
    exp_hidden: int | None = None
    exp_mlp: int | None = None
    vis_layers: int | None = None
    vis_hidden: int | None = None
    vis_mlp: int | None = None
    vocab: int | None = None
    patch: int | None = None


FULL_HEADS = HeadDims(heads=8, kv_heads=1, head_dim=256, vis_heads=16)


@dataclass(frozen=True)
class PolicyDims:
    """Sizes of the three networks and of the token table."""

    vision: VisionDims
    vlm: GemmaDims
    expert: GemmaDims
    vocab: int


def read_head_dims(folder: Path) -> HeadDims | None:
    """`model_dims.json` of a checkpoint, or None where there is none.

    Raises:
        CheckpointError: The file is not valid.
    """
    path = folder / DIMS_FILE
    if not os.path.lexists(path):  # What is no plain file is refused, not overlooked.
        return None
    try:
        dims = msgspec.convert(json.loads(read_text(folder, DIMS_FILE)), HeadDims)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("the model's sizes are not valid", where=path, got=error) from None
    counts = {
        "heads": dims.heads,
        "kv_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "vis_heads": dims.vis_heads,
    }
    for name, value in counts.items():
        if value < 1:
            raise CheckpointError(f"{name} must be at least 1", where=path, got=value)
    for name in ("rope_theta", "rms_norm_eps", "siglip_layer_norm_eps"):
        if not 0 < getattr(dims, name) < float("inf"):
            raise CheckpointError(f"{name} must be positive", where=path, got=getattr(dims, name))
    if dims.heads % dims.kv_heads or dims.head_dim % 2:
        raise CheckpointError(
            "the numbers of heads do not fit each other",
            where=path,
            expected="heads a multiple of kv_heads, head_dim even",
            got=f"heads {dims.heads}, kv_heads {dims.kv_heads}, head_dim {dims.head_dim}",
        )
    return dims


def infer_dims(
    shapes: Mapping[str, tuple[int, ...]], config: PolicyConfig, heads: HeadDims | None, where: object
) -> PolicyDims:
    """Read the sizes off the weights.

    Args:
        shapes: Checkpoint key -> shape.
        config: The policy's configuration.
        heads: What the weights don't tell; None: the full-size model's.
        where: The checkpoint, for messages.

    Returns:
        The sizes; whether every weight agrees with them is checked when the weights are loaded.

    Raises:
        CheckpointError: A weight that tells a size is missing, or the heads do not divide the widths.
    """
    vision_tower = f"{VLM}vision_tower.vision_model."
    head_dims = heads or FULL_HEADS

    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in shapes:
            alike = [known for known in shapes if abs(len(known) - len(key)) < 40][:1000]
            raise CheckpointError(
                "the checkpoint lacks a weight that tells the model's size",
                where=where,
                expected=key,
                got=f"{len(shapes)} other keys",
                fix=nearest_name(key, alike).split("? Valid")[0],
            )
        if len(shapes[key]) != rank:
            raise CheckpointError(
                "a weight has the wrong rank", where=f"{where}: {key}", expected=rank, got=shapes[key]
            )
        return shapes[key]

    def depth(prefix: str) -> int:
        numbers = {key.removeprefix(prefix).partition(".")[0] for key in shapes if key.startswith(prefix)}
        if len(numbers) > _MAX_LAYERS or numbers != {str(number) for number in range(len(numbers))}:
            raise CheckpointError(
                "the layers are not numbered from 0 on, or too many",
                where=f"{where}: {prefix}",
                expected=f"0, 1, 2 and so on, at most {_MAX_LAYERS}",
                got=f"{len(numbers)}: {', '.join(sorted(numbers)[:20])}",
                fix="export the checkpoint again",
            )
        return len(numbers)

    def gemma(prefix: str) -> GemmaDims:
        mlp, hidden = shape(f"{prefix}layers.0.mlp.gate_proj.weight", 2)
        queries = shape(f"{prefix}layers.0.self_attn.q_proj.weight", 2)[0]
        rows = head_dims.heads * head_dims.head_dim
        if queries != rows:
            raise CheckpointError(
                "the heads do not fit the width of the queries",
                where=f"{where}: {prefix}layers.0.self_attn.q_proj.weight",
                expected=f"{head_dims.heads} heads x {head_dims.head_dim} = {rows} rows",
                got=f"{queries} rows",
                fix=f"state heads, kv_heads, head_dim and vis_heads in {DIMS_FILE} beside the weights",
            )
        return GemmaDims(
            layers=depth(f"{prefix}layers."),
            hidden=hidden,
            mlp=mlp,
            heads=head_dims.heads,
            kv_heads=head_dims.kv_heads,
            head_dim=head_dims.head_dim,
            eps=head_dims.rms_norm_eps,
            rope_theta=head_dims.rope_theta,
        )

    patch = shape(f"{vision_tower}embeddings.patch_embedding.weight", 4)
    height, width = next(iter(config.cameras().values()))
    vision = VisionDims(
        layers=depth(f"{vision_tower}encoder.layers."),
        hidden=patch[0],
        mlp=shape(f"{vision_tower}encoder.layers.0.mlp.fc1.weight", 2)[0],
        heads=head_dims.vis_heads,
        height=height,
        width=width,
        patch=patch[2],
        eps=head_dims.siglip_layer_norm_eps,
    )
    if vision.hidden % vision.heads:
        raise CheckpointError(
            "the vision heads do not divide the vision tower's width",
            where=where,
            expected=f"a multiple of {vision.heads}",
            got=vision.hidden,
            fix=f"state vis_heads in {DIMS_FILE} beside the weights",
        )
    vlm, expert = gemma(f"{VLM}language_model."), gemma(EXPERT)
    if vlm.layers != expert.layers:
        raise CheckpointError(
            "the expert does not have as many layers as the VLM, whose cache it reads layer by layer",
            where=where,
            expected=f"{vlm.layers} layers",
            got=f"{expert.layers} layers",
        )
    table = LM_HEAD if LM_HEAD in shapes else EMBED_TOKENS
    dims = PolicyDims(vision=vision, vlm=vlm, expert=expert, vocab=shape(table, 2)[0])
    _check_agreement(dims, config, head_dims, where)
    return dims


def _check_agreement(dims: PolicyDims, config: PolicyConfig, stated: HeadDims, where: object) -> None:
    """Refuse weights of other sizes than the files beside them state."""
    found = {
        "layers": dims.vlm.layers,
        "vlm_hidden": dims.vlm.hidden,
        "vlm_mlp": dims.vlm.mlp,
        "exp_hidden": dims.expert.hidden,
        "exp_mlp": dims.expert.mlp,
        "vis_layers": dims.vision.layers,
        "vis_hidden": dims.vision.hidden,
        "vis_mlp": dims.vision.mlp,
        "vocab": dims.vocab,
        "patch": dims.vision.patch,
    }
    claims = {f"{name} in {DIMS_FILE}": (getattr(stated, name), size) for name, size in found.items()}
    claims["proj_width in the configuration"] = (config.proj_width, dims.expert.hidden)
    for name, (claimed, size) in claims.items():
        if claimed is not None and claimed != size:
            raise CheckpointError(
                "the weights have another size than is stated",
                where=f"{where}: {name}",
                expected=claimed,
                got=size,
            )
