"""Policy -> the graphs as torch exports them.

Every size that may differ at run time is a named dynamic dimension: `B` batch, `N` cameras, `L` prompt
tokens, `P` prefix tokens. The examples have a batch of two, because torch.export bakes in a size of one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from otau.toolchain.graph.patches import applied
from otau.toolchain.graph.programs import DenoiseStep, Ingest, Prefix
from otau.training.policies import FlowPolicy

__all__ = [
    "DecoderStepFromProgram",
    "IngestFromPolicy",
    "PrefixFromPolicy",
    "decoder_inputs",
    "prefix_inputs",
]

_BATCH, _CAMERAS, _TOKENS, _PREFIX = 2, 3, 7, 11
"""Sizes of the examples; none of them means anything."""


def prefix_inputs(
    policy: FlowPolicy, batch: int, cameras: int, tokens: int, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs of the prefix graph by name, every camera and token valid."""
    dims, config = policy.dims, policy.config
    random = torch.Generator().manual_seed(seed)
    pixels = torch.rand(batch, cameras, 3, dims.vision.height, dims.vision.width, generator=random)
    inputs = {
        "images": pixels * 2 - 1,
        "image_masks": torch.ones(batch, cameras, dtype=torch.bool),
        "tokens": torch.randint(0, dims.vocab, (batch, tokens), generator=random),
        "token_masks": torch.ones(batch, tokens, dtype=torch.bool),
    }
    if policy.state_in_prefix:
        inputs["state"] = torch.randn(batch, config.max_state_dim, generator=random)
        inputs["state_open"] = torch.randint(0, dims.vocab, (3,), generator=random)
        inputs["state_close"] = torch.randint(0, dims.vocab, (2,), generator=random)
    return inputs


def decoder_inputs(policy: FlowPolicy, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of the decoder graph by name, all but the cache."""
    config = policy.config
    random = torch.Generator().manual_seed(seed)
    chunk = (batch, config.chunk_size, config.max_action_dim)
    inputs = {"noise": torch.randn(chunk, generator=random)}
    if policy.real_time_chunking:
        inputs["action_prefix"] = torch.randn(chunk, generator=random)
        inputs["delay"] = torch.zeros(batch, dtype=torch.int64)
    if policy.state_in_decoder:
        inputs["state"] = torch.randn(batch, config.max_state_dim, generator=random)
    return inputs


def PrefixFromPolicy(policy: FlowPolicy) -> ir.Model:  # noqa: N802 (converters are named <Target>From<Source>)
    """Export observation -> KV cache."""
    inputs = prefix_inputs(policy, _BATCH, _CAMERAS, _TOKENS)
    dynamic = {
        "images": {0: "B", 1: "N"},
        "image_masks": {0: "B", 1: "N"},
        "tokens": {0: "B", 1: "L"},
        "token_masks": {0: "B", 1: "L"},
        "state": {0: "B"},
        "state_open": {0: "O"},
        "state_close": {0: "C"},
    }
    model = _export(Prefix(policy), inputs, {name: dynamic[name] for name in inputs})
    cache = ir.Shape([policy.dims.vlm.layers, "B", "P", policy.dims.vlm.kv_heads, policy.dims.vlm.head_dim])
    for output, name, shape in zip(
        model.graph.outputs,
        ("keys", "values", "prefix_mask"),
        (cache, cache.copy(), ir.Shape(["B", "P"])),
        strict=True,
    ):
        output.name, output.shape = name, shape
    return model


def IngestFromPolicy(policy: FlowPolicy) -> ir.Model:  # noqa: N802
    """Export the layout of the KV cache as the decoder reads it."""
    vlm = policy.dims.vlm
    cache = torch.randn(vlm.layers, _BATCH, _PREFIX, vlm.kv_heads, vlm.head_dim)
    dynamic = {1: "B", 2: "P"}
    model = _export(Ingest(), {"keys": cache, "values": cache.clone()}, {"keys": dynamic, "values": dynamic})
    names = [f"{kind}_{layer}" for kind in ("key", "value") for layer in range(vlm.layers)]
    for output, name in zip(model.graph.outputs, names, strict=True):
        output.name = name
    return model


def DecoderStepFromProgram(program: DenoiseStep) -> ir.Model:  # noqa: N802
    """Export one Euler step; inputs `x`, `step` and those of the decoder, output `x_next`."""
    policy = program.policy
    vlm = policy.dims.vlm
    inputs: dict[str, Any] = decoder_inputs(policy, _BATCH)
    dynamic: dict[str, Any] = {name: {0: "B"} for name in inputs}
    inputs = {"x": inputs.pop("noise"), "step": torch.tensor(0), **inputs}
    dynamic = {"x": dynamic.pop("noise"), "step": {}, **dynamic}
    inputs["keys"] = [torch.randn(_BATCH, vlm.kv_heads, vlm.head_dim, _PREFIX) for _ in range(vlm.layers)]
    inputs["values"] = [torch.randn(_BATCH, vlm.kv_heads, _PREFIX, vlm.head_dim) for _ in range(vlm.layers)]
    inputs["prefix_mask"] = torch.ones(_BATCH, _PREFIX, dtype=torch.bool)
    dynamic["keys"] = [{0: "B", 3: "P"}] * vlm.layers
    dynamic["values"] = [{0: "B", 2: "P"}] * vlm.layers
    dynamic["prefix_mask"] = {0: "B", 1: "P"}
    model = _export(program, inputs, dynamic)
    for value in model.graph.inputs:
        kind, _, layer = str(value.name).partition("s_")
        if layer.isdecimal():
            value.name = f"{kind}_{layer}"
    model.graph.outputs[0].name = "x_next"
    return model


def _export(program: nn.Module, inputs: dict[str, Any], dynamic: dict[str, Any]) -> ir.Model:
    with applied(), _quiet(), torch.no_grad():
        exported = torch.onnx.export(
            program.eval(),
            (),
            kwargs=inputs,
            dynamic_shapes=dynamic,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert exported is not None
    # A copy, because the exporter's own graph remembers every parameter of the policy, used in it or not.
    model = exported.model.clone()
    _detach_weights(model, program)
    return model


def _detach_weights(model: ir.Model, program: nn.Module) -> None:
    """Let a graph read its weights from the program when they are asked for, instead of holding them.

    onnxscript's rewrite rules keep the last graph that they matched for the life of the process; at full size
    that is 13 GB. This way the weights go when the program lets go of them.
    """
    weights = program.state_dict().keys()
    for name, value in model.graph.initializers.items():
        if name in weights:
            given = value.const_value
            value.const_value = ir.LazyTensor(
                lambda name=name: ir.tensor(program.state_dict()[name], name=name),
                dtype=given.dtype,
                shape=given.shape,
                name=name,
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's talk about itself away from the user.

    It warns that torchvision is missing, which otau does not use, that torch's own copy of a tree
    specification uses a deprecated check, and that two inputs share a dimension, which is meant.
    """
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*treespec.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
            yield
    finally:
        logger.setLevel(level)
