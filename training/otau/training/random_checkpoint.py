"""A randomly initialised policy in OpenTau's layout: for demos, tests and benchmarks.

The folder is what OpenTau would have saved before its first step, plus `model_dims.json` and, but for the
full size, a tokenizer. State and actions are those of a Panda arm as LIBERO has them.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from otau.runtime.errors import UsageError, nearest_name
from otau.training.policies import FAMILIES, FlowPolicy
from otau.training.policies.checkpoint import build_policy, checkpoint_key, statistics_keys
from otau.training.policies.config import PolicyConfig
from otau.training.policies.gemma import GemmaDims
from otau.training.policies.keys import EMBED_TOKENS, LM_HEAD, TOWERS
from otau.training.policies.sizes import DIMS_FILE, HeadDims, PolicyDims
from otau.training.policies.vision import VisionDims
from otau.training.tokenizer import train_tokenizer

__all__ = ["SIZES", "Size", "random_config", "write_random_checkpoint"]

_WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Size:
    """A policy's sizes, and how its checkpoint is stored."""

    dims: PolicyDims
    cameras: int
    max_dim: int
    """Width of padded states and actions."""
    chunk: int
    prompt: int
    """Tokens of a prompt."""
    dtype: torch.dtype
    tokenizer: bool


def _size(
    vision: tuple[int, int, int, int, int],
    vlm: tuple[int, int, int],
    expert: tuple[int, int],
    heads: tuple[int, int],
    vocab: int,
    **rest: Any,
) -> Size:
    layers, hidden, mlp = vlm
    vision_layers, vision_hidden, vision_mlp, vision_heads, picture = vision
    dims = PolicyDims(
        vision=VisionDims(vision_layers, vision_hidden, vision_mlp, vision_heads, picture, picture, 14),
        vlm=GemmaDims(layers, hidden, mlp, heads[0], 1, heads[1]),
        expert=GemmaDims(layers, *expert, heads[0], 1, heads[1]),
        vocab=vocab,
    )
    return Size(dims=dims, **rest)


SIZES = {
    "tiny": _size(
        vision=(2, 32, 64, 2, 56), vlm=(2, 64, 128), expert=(48, 96), heads=(4, 16), vocab=1024,
        cameras=2, max_dim=8, chunk=10, prompt=96, dtype=torch.float32, tokenizer=True,
    ),
    "small": _size(
        vision=(4, 192, 768, 6, 224), vlm=(6, 256, 1024), expert=(192, 768), heads=(4, 64), vocab=2048,
        cameras=2, max_dim=32, chunk=50, prompt=256, dtype=torch.float32, tokenizer=True,
    ),
    "full": _size(
        vision=(27, 1152, 4304, 16, 224), vlm=(18, 2048, 16384), expert=(1024, 4096), heads=(8, 256),
        vocab=257152,
        cameras=3, max_dim=32, chunk=50, prompt=256, dtype=torch.bfloat16, tokenizer=False,
    ),
}  # fmt: skip
"""Sizes by name; `full` is PaliGemma 3B with a 300M expert, in bfloat16 as OpenTau trains it."""

# A Panda as LIBERO has it: gripper position [m], its axis-angle [rad], the two fingers [m].
_STATE_MIN = (-0.5, -0.5, 0.6, -3.2, -3.2, -3.2, 0.0, -0.04)
_STATE_MAX = (0.5, 0.5, 1.6, 3.2, 3.2, 3.2, 0.04, 0.0)
# Six deltas of the pose and the gripper, in [-1, 1]: small enough that a random arm stays in sight.
_ACTION_STD = (0.3, 0.3, 0.3, 0.1, 0.1, 0.1, 0.5)

_DISCRETE_ACTIONS = 64
"""Tokens of the training-only head on discrete actions."""


def write_random_checkpoint(out: Path, policy: str, size: str, seed: int = 0) -> dict[str, Any]:
    """Write a checkpoint folder, whole or not at all.

    Args:
        out: The folder to make; must not exist, or be empty.
        policy: A name of `FAMILIES`.
        size: A name of `SIZES`.
        seed: Of the weights.

    Returns:
        What was written: folder, policy, size, parameters, bytes of the weights, dtype, tokenizer.

    Raises:
        UsageError: An unknown name, or the folder is taken.
    """
    for name, valid, flag in ((policy, FAMILIES, "--policy"), (size, SIZES, "--size")):
        if name not in valid:
            raise UsageError(f"unknown name {name!r}", where=flag, fix=nearest_name(name, valid))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("the output folder is taken", where=out, fix="choose another, or remove it first")
    sizes = SIZES[size]
    config = random_config(policy, sizes)
    module = build_policy(config, sizes.dims)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UsageError(
            "the checkpoint cannot be written there",
            where=out,
            got=error,
            fix="choose a folder that you may write to",
        ) from None
    try:
        tensors = _weights(module, sizes, seed)
        save_file(tensors, folder / _WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / _WEIGHTS_FILE).chmod(0o644)
        _write_json(folder / "train_config.json", {"policy": msgspec.to_builtins(config), "seed": seed})
        _write_json(folder / "training_step.json", {"step": 0})
        _write_json(folder / DIMS_FILE, msgspec.to_builtins(_head_dims(sizes.dims)))
        if sizes.tokenizer:
            train_tokenizer(sizes.dims.vocab).save(str(folder / "tokenizer.json"))
        folder.chmod(0o755)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "checkpoint": str(out),
        "policy": policy,
        "size": size,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "bytes": (out / _WEIGHTS_FILE).stat().st_size,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "tokenizer": sizes.tokenizer,
        "seed": seed,
    }


def random_config(policy: str, size: Size) -> PolicyConfig:
    """The configuration of a randomly initialised policy."""
    picture = (size.dims.vision.height, size.dims.vision.width)
    cameras = {f"camera{i}": {"type": "VISUAL", "shape": (3, *picture)} for i in range(size.cameras)}
    return msgspec.convert(
        {
            "type": policy,
            "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MEAN_STD"},
            "input_features": {"state": {"type": "STATE", "shape": (len(_STATE_MIN),)}, **cameras},
            "output_features": {"actions": {"type": "ACTION", "shape": (len(_ACTION_STD),)}},
            "chunk_size": size.chunk,
            "n_action_steps": size.chunk,
            "max_delay": size.chunk // 5 if FAMILIES[policy].real_time_chunking else 0,
            "max_state_dim": size.max_dim,
            "max_action_dim": size.max_dim,
            "resize_imgs_with_padding": picture,
            "proj_width": size.dims.expert.hidden,
            "config_version": 1,
            "dataset_names": ("panda::osc_pose",),
            "prompt_max_length": size.prompt,
            "tokenizer_max_length": min(size.prompt, 48),
        },
        PolicyConfig,
    )


def _head_dims(dims: PolicyDims) -> HeadDims:
    vlm = dims.vlm
    return HeadDims(
        heads=vlm.heads, kv_heads=vlm.kv_heads, head_dim=vlm.head_dim, vis_heads=dims.vision.heads
    )


def _weights(module: FlowPolicy, size: Size, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in module.state_dict().items():
        key = checkpoint_key(module, name)
        # OpenTau's safetensors hold the tied token table under the head's name alone.
        tensors[LM_HEAD if key == EMBED_TOKENS else key] = _random(name, parameter.shape, random).to(
            size.dtype
        )
    statistics = {
        "state.min": torch.tensor(_STATE_MIN),
        "state.max": torch.tensor(_STATE_MAX),
        "action.mean": torch.zeros(len(_ACTION_STD)),
        "action.std": torch.tensor(_ACTION_STD),
    }
    for key, (name, _) in statistics_keys(module.config).items():
        tensors[key] = statistics[name][None].clone()
    if module.real_time_chunking:
        width = size.dims.vlm.hidden
        tensors[f"{TOWERS}discrete_action_embedding.weight"] = _random("", (_DISCRETE_ACTIONS, width), random)
        tensors[f"{TOWERS}da_head.weight"] = _random("", (_DISCRETE_ACTIONS, width), random)
        tensors[f"{TOWERS}da_head.bias"] = torch.zeros(_DISCRETE_ACTIONS)
        tensors["normalize_discrete_actions.buffer_actions.min"] = -torch.ones(1, len(_ACTION_STD))
        tensors["normalize_discrete_actions.buffer_actions.max"] = torch.ones(1, len(_ACTION_STD))
    return tensors


def _random(name: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Weights that keep activations at the size of one, and norms near the identity."""
    noise = torch.randn(shape, generator=random)
    if len(shape) == 1:
        # SigLIP's norms multiply by the weight, Gemma's by one more than it.
        is_scale = name.startswith("vision.") and "norm" in name and name.endswith(".weight")
        return 0.1 * noise + float(is_scale)
    return noise / math.sqrt(math.prod(shape[1:]))


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=4) + "\n", encoding="utf-8")
