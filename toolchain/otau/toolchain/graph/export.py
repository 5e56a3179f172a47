"""Policy -> the graphs as torch exports them, without its weights.

A graph follows from the policy's configuration and sizes. It is traced on fake tensors, which have shapes and
no memory, and its initializers read the checkpoint when they are written: the full-size prefix is exported in
0.6 GB of memory.

Every size that may differ at run time is a named dynamic dimension: `B` batch, `N` cameras, `L` prompt
tokens, `P` prefix tokens. The examples have a batch of two, because torch.export bakes in a size of one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from otau.toolchain.graph.patches import applied
from otau.toolchain.graph.programs import DenoiseStep, Ingest, Prefix
from otau.training.policies import FlowPolicy, build_policy
from otau.training.policies.weights import StoredTensor, Weights

__all__ = [
    "DecoderStepFromPolicy",
    "IngestFromPolicy",
    "PrefixFromPolicy",
    "decoder_inputs",
    "prefix_inputs",
    "weights_of",
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


def weights_of(module: nn.Module) -> Weights:
    """The weights of a module that has them in memory."""
    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in module.state_dict().items()
    }


def PrefixFromPolicy(policy: FlowPolicy, weights: Weights) -> ir.Model:  # noqa: N802 (<Target>From<Source>)
    """Export observation -> KV cache.

    Args:
        policy: Its parameters need no memory.
        weights: By parameter name.
    """
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
    model = _export(lambda fake: Prefix(fake), policy, inputs, {name: dynamic[name] for name in inputs})
    _attach_weights(model, {f"policy.{name}": weight for name, weight in weights.items()})
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
    inputs = {"keys": cache, "values": cache.clone()}
    model = _export(lambda fake: Ingest(), policy, inputs, {"keys": dynamic, "values": dynamic})
    names = [f"{kind}_{layer}" for kind in ("key", "value") for layer in range(vlm.layers)]
    for output, name in zip(model.graph.outputs, names, strict=True):
        output.name = name
    return model


def DecoderStepFromPolicy(  # noqa: N802
    policy: FlowPolicy, weights: Weights, tables: Weights, num_steps: int
) -> ir.Model:
    """Export one Euler step; inputs `x`, `step` and those of the decoder, output `x_next`.

    Args:
        policy: Its parameters need no memory.
        weights: By parameter name.
        tables: The folded flow time, as `DenoiseStep.tables` has it.
        num_steps: Euler steps of the tables.
    """
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
    model = _export(lambda fake: DenoiseStep(fake, num_steps), policy, inputs, dynamic)
    _attach_weights(model, {f"policy.{name}": weight for name, weight in weights.items()} | dict(tables))
    for value in model.graph.inputs:
        kind, _, layer = str(value.name).partition("s_")
        if layer.isdecimal():
            value.name = f"{kind}_{layer}"
    model.graph.outputs[0].name = "x_next"
    return model


def _export(
    program: Callable[[FlowPolicy], nn.Module],
    policy: FlowPolicy,
    inputs: dict[str, Any],
    dynamic: dict[str, Any],
) -> ir.Model:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = build_policy(policy.config, policy.dims)
    with mode, applied(), _quiet(), torch.no_grad():
        shapes = {name: tensor.shape for name, tensor in fake.state_dict().items()}
        fake.load_state_dict({name: torch.empty(shape) for name, shape in shapes.items()}, assign=True)
        exported = torch.onnx.export(
            program(fake.requires_grad_(False)).eval(),
            (),
            kwargs=inputs,
            dynamic_shapes=dynamic,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert exported is not None
    # A copy, because the exporter's own graph remembers every parameter of the policy, used in it or not.
    return exported.model.clone()


def _attach_weights(model: ir.Model, weights: Weights) -> None:
    """Let the graph's initializers read the weights when they are written, in float32."""
    for name, value in model.graph.initializers.items():
        if name in weights:
            value.const_value = ir.LazyTensor(
                lambda weight=weights[name]: ir.tensor(weight.read().float().numpy()),
                dtype=ir.DataType.FLOAT,
                shape=ir.Shape(weights[name].shape),
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
