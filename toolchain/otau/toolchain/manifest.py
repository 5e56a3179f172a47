"""Checkpoint -> the manifest of its bundle."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata

import onnx_ir as ir

from otau.runtime.spec import (
    SCHEMA_VERSION,
    CameraSpec,
    FlowSpec,
    GateResult,
    GraphSpec,
    Manifest,
    NormSpec,
    PromptSpec,
    TensorSpec,
    VectorSpec,
)
from otau.toolchain.graph.simplify import count_nodes, count_parameters
from otau.toolchain.targets import Target
from otau.training.policies import Checkpoint

__all__ = ["GraphSpecFromModel", "ManifestFromCheckpoint", "package_versions"]

_PACKAGES = ("otau", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def ManifestFromCheckpoint(  # noqa: N802 (converters are named <Target>From<Source>)
    checkpoint: Checkpoint,
    *,
    target: Target,
    precision: str,
    num_steps: int,
    tokenizer: str | None,
    graphs: Mapping[str, GraphSpec],
    gates: Sequence[GateResult],
) -> Manifest:
    """What the runtime must know of a checkpoint; files and fingerprint are left to the writer."""
    policy, config = checkpoint.empty, checkpoint.config
    state_in_prompt = "{state}" in policy.prompt_template(config)
    vlm = policy.dims.vlm
    return Manifest(
        schema=SCHEMA_VERSION,
        fingerprint="",
        policy=config.type,
        target=target.name,
        engine=target.engine,
        precision=precision,
        cameras=tuple(CameraSpec(name=n, height=h, width=w) for n, (h, w) in config.cameras().items()),
        empty_cameras=config.empty_cameras,
        state=_vector("state", config.state_dim, config.max_state_dim),
        state_route="decoder" if policy.state_in_decoder else "prompt" if state_in_prompt else "prefix",
        action=_vector("action", config.action_dim, config.max_action_dim),
        delta_actions=config.delta_action_state_map or {},
        norm=NormSpec(
            state=config.normalization_mapping.get("STATE", "IDENTITY"),
            action=config.normalization_mapping.get("ACTION", "IDENTITY"),
            eps=config.eps,
            centre_degenerate=config.centre_degenerate,
            heads=_heads(checkpoint),
            # Training and serving normalise the state of a discrete prompt in bfloat16, and the bins show it.
            state_dtype="bfloat16" if state_in_prompt else "float32",
        ),
        prompt=PromptSpec(
            template=policy.prompt_template(config),
            max_length=policy.prompt_length(config),
            state_open="State: " if policy.state_in_prefix else None,
            state_close=":\n" if policy.state_in_prefix else None,
            tokenizer=tokenizer,
        ),
        flow=FlowSpec(
            num_steps=num_steps,
            chunk=config.chunk_size,
            n_action_steps=config.n_action_steps,
            max_delay=config.max_delay,
            real_time_chunking=policy.real_time_chunking,
        ),
        kv_layers=vlm.layers,
        kv_heads=vlm.kv_heads,
        head_dim=vlm.head_dim,
        image_tokens=policy.dims.vision.tokens,
        vocab=policy.dims.vocab,
        graphs=dict(graphs),
        gates=tuple(gates),
        versions=package_versions(),
        files={},
    )


def GraphSpecFromModel(file: str, model: ir.Model) -> GraphSpec:  # noqa: N802
    """What a manifest says of a graph."""
    return GraphSpec(
        file=file,
        inputs=tuple(_tensor(value) for value in model.graph.inputs),
        outputs=tuple(_tensor(value) for value in model.graph.outputs),
        nodes=count_nodes(model),
        parameters=count_parameters(model),
    )


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that have a hand in a bundle."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


def _vector(kind: str, dim: int, max_dim: int) -> VectorSpec:
    # OpenTau's checkpoints name no dimension and no unit.
    names = tuple(f"{kind}[{index}]" for index in range(dim))
    return VectorSpec(dim=dim, max_dim=max_dim, names=names, units=("",) * dim)


def _heads(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the rows of the statistics, numbers where the configuration does not name them."""
    rows = max((len(value) for value in checkpoint.statistics.values()), default=1)
    names = checkpoint.config.dataset_names or ()
    return names if len(names) == rows else tuple(str(row) for row in range(rows))


def _tensor(value: ir.Value) -> TensorSpec:
    sizes = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(name=value.name, dtype=str(value.dtype.numpy()), shape=sizes)
