"""The twin of a policy: as deep, with the same options, and narrow; and what its graphs answer on a probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from otau.training.policies import FAMILIES, FlowPolicy
from otau.training.policies.gemma import GemmaDims
from otau.training.policies.sizes import PolicyDims

__all__ = ["decoder_answer", "ingest_answer", "narrow_twin", "prefix_answer", "run_graph"]

_HIDDEN, _VISION_HEAD_DIM, _VOCAB = 32, 4, 512


def narrow_twin(policy: FlowPolicy, seed: int = 0) -> FlowPolicy:
    """A policy of the same family, configuration, depth, heads and pictures; narrow, with random weights.

    Widths stay in proportion, so that what differs in the policy differs in its twin. The width of a head
    stays as it is, since the rotary frequencies depend on it: folded in numpy's float32 they are a unit in
    the last place off, which at head width 256 turns keys by 5e-5, and at 16 by nothing.
    """
    dims = policy.dims
    vision = dims.vision
    hidden = vision.heads * _VISION_HEAD_DIM
    twin_dims = PolicyDims(
        vision=replace(vision, hidden=hidden, mlp=_proportional(vision.mlp, hidden, vision.hidden)),
        vlm=_narrow(dims.vlm, dims.vlm.hidden),
        expert=_narrow(dims.expert, dims.vlm.hidden),
        vocab=min(dims.vocab, _VOCAB),
    )
    twin = FAMILIES[policy.type](policy.config, twin_dims)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.copy_(torch.randn(parameter.shape, generator=random) / math.sqrt(fan_in))
    return twin.eval().requires_grad_(False)


def run_graph(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a small graph in ONNX Runtime as it is written, not optimised, on those feeds that it takes."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    # A stored weight would be packed, and its product summed in another order than that of a computed one.
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [node.name for node in session.get_outputs()]
    taken = {node.name: feeds[node.name] for node in session.get_inputs()}
    return dict(zip(names, session.run(names, taken), strict=True))


def prefix_answer(feeds: Mapping[str, np.ndarray]) -> Callable[[ir.Model], dict[str, np.ndarray]]:
    """The prefix's answer to a probe: the mask, and keys and values (layers, valid tokens, Hkv, D).

    Args:
        feeds: The prefix's inputs. Padded tokens and absent cameras belong among them; what a graph makes of
            those positions is left out, since nothing reads it.
    """

    def answer(model: ir.Model) -> dict[str, np.ndarray]:
        given = run_graph(model, feeds)
        valid = given["prefix_mask"]
        return {"prefix_mask": valid} | {name: given[name][:, valid] for name in ("keys", "values")}

    return answer


def ingest_answer(policy: FlowPolicy, seed: int = 0) -> Callable[[ir.Model], dict[str, np.ndarray]]:
    """The ingest's answer to a random cache of two rows and 11 tokens."""
    vlm, random = policy.dims.vlm, np.random.default_rng(seed)
    shape = (vlm.layers, 2, 11, vlm.kv_heads, vlm.head_dim)
    feeds = {name: random.standard_normal(shape, np.float32) for name in ("keys", "values")}
    return lambda model: run_graph(model, feeds)


def decoder_answer(
    policy: FlowPolicy, feeds: Mapping[str, np.ndarray], num_steps: int, seed: int = 0
) -> Callable[[ir.Model], dict[str, np.ndarray]]:
    """The decoder's answer to a probe, be it one step, the loop or the unrolled steps.

    Args:
        policy: Whose decoder it is.
        feeds: Its inputs but the cache; `noise` (B, T, A) is `x` of a single step's first call.
        num_steps: Steps that a single step is called for.
        seed: Of the cache of 11 tokens, the last three of them padding.
    """
    vlm, random = policy.dims.vlm, np.random.default_rng(seed)
    batch = len(feeds["noise"])
    cache = {}
    for layer in range(vlm.layers):
        cache[f"key_{layer}"] = random.standard_normal((batch, vlm.kv_heads, vlm.head_dim, 11), np.float32)
        cache[f"value_{layer}"] = random.standard_normal((batch, vlm.kv_heads, 11, vlm.head_dim), np.float32)
    mask = np.broadcast_to(np.arange(11) < 8, (batch, 11))
    given = {**feeds, **cache, "prefix_mask": np.ascontiguousarray(mask)}

    def answer(model: ir.Model) -> dict[str, np.ndarray]:
        if any(value.name == "noise" for value in model.graph.inputs):
            return run_graph(model, given)
        x = given["noise"]
        for step in range(num_steps):
            x = run_graph(model, {**given, "x": x, "step": np.array(step)})["x_next"]
        return {"actions": x}

    return answer


def _narrow(dims: GemmaDims, widest: int) -> GemmaDims:
    hidden, mlp = (_proportional(size, _HIDDEN, widest) for size in (dims.hidden, dims.mlp))
    return replace(dims, hidden=hidden, mlp=mlp)


def _proportional(size: int, narrow: int, wide: int) -> int:
    return max(2, math.ceil(size * narrow / wide))
