"""Checkpoint -> the manifest of its bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from otau.runtime.spec import (
    SCHEMA_VERSION,
    CameraSpec,
    FlowSpec,
    GateResult,
    GraphSpec,
    Manifest,
    NormSpec,
    PictureSpec,
    PromptSpec,
    StateRoute,
    TensorSpec,
    VectorSpec,
)
from otau.toolchain.graph.simplify import count_nodes, count_parameters
from otau.toolchain.targets import Target
from otau.toolchain.versions import package_versions
from otau.training.policies import Checkpoint

__all__ = ["GraphSpecFromModel", "ManifestFromCheckpoint", "head_names"]


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
    template = _template(checkpoint)
    route = _state_route(checkpoint, template)
    vlm = policy.dims.vlm
    return Manifest(
        schema=SCHEMA_VERSION,
        fingerprint="",
        policy=config.type,
        target=target.name,
        engine=target.engine,
        precision=precision,
        cameras=tuple(CameraSpec(name=n, height=h, width=w) for n, (h, w) in config.cameras().items()),
        pictures=PictureSpec(
            padding=config.image_padding, resize=config.image_resize, fill=float(config.image_fill)
        ),
        empty_cameras=config.empty_cameras,
        state=_vector("state", config.state_dim, config.max_state_dim),
        state_route=route,
        action=_vector("action", config.action_dim, config.max_action_dim),
        delta_actions=config.delta_action_state_map or {},
        norm=NormSpec(
            state=config.normalization_mapping.get("STATE", "IDENTITY"),
            action=config.normalization_mapping.get("ACTION", "IDENTITY"),
            eps=config.eps,
            centre_degenerate=config.centre_degenerate,
            heads=head_names(checkpoint),
            # OpenTau normalises the state of a discrete prompt in bfloat16, and the bins show it.
            state_dtype=config.state_text_dtype if route == "prompt" else "float32",
        ),
        prompt=PromptSpec(
            template=template,
            clean_task=config.clean_task,
            state_bins=config.state_bins,
            state_dims=_listed_dims(checkpoint) if route == "prompt" else None,
            max_length=policy.prompt_length(config),
            state_open="State: " if policy.state_in_prefix else None,
            state_close=":\n" if policy.state_in_prefix else None,
            tokenizer=tokenizer,
            response_left_out=config.predict_response,
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


def head_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the rows of the statistics, numbers where the configuration does not name them."""
    rows = max((len(value) for value in checkpoint.statistics.values()), default=1)
    names = checkpoint.config.dataset_names or ()
    return names if len(names) == rows else tuple(str(row) for row in range(rows))


def GraphSpecFromModel(file: str, model: ir.Model) -> GraphSpec:  # noqa: N802
    """What a manifest says of a graph."""
    return GraphSpec(
        file=file,
        inputs=tuple(_tensor(value) for value in model.graph.inputs),
        outputs=tuple(_tensor(value) for value in model.graph.outputs),
        nodes=count_nodes(model),
        parameters=count_parameters(model),
    )


def _template(checkpoint: Checkpoint) -> str:
    """The prompt, closed by the label of a good action where pi0 was trained with labels."""
    config = checkpoint.config
    template = config.prompt_template or checkpoint.empty.prompt_template(config)
    return template if config.advantage == "ignore" else template + "Advantage: positive\n"


def _state_route(checkpoint: Checkpoint, template: str) -> StateRoute:
    """Where the policy reads the state: the network says so, or the prompt; or it reads none."""
    if checkpoint.empty.state_in_decoder:
        return "decoder"
    if checkpoint.empty.state_in_prefix:
        return "prefix"
    return "prompt" if "{state}" in template else "none"


def _listed_dims(checkpoint: Checkpoint) -> int:
    """Dimensions of the state that the prompt lists: padded ones too, where the statistics have them."""
    widths = [value.shape[1] for name, value in checkpoint.statistics.items() if name.startswith("state.")]
    return checkpoint.config.state_text_dims or max(widths, default=checkpoint.config.state_dim)


def _vector(kind: str, dim: int, max_dim: int) -> VectorSpec:
    # OpenTau's checkpoints name no dimension and no unit.
    names = tuple(f"{kind}[{index}]" for index in range(dim))
    return VectorSpec(dim=dim, max_dim=max_dim, names=names, units=("",) * dim)


def _tensor(value: ir.Value) -> TensorSpec:
    sizes = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(name=value.name, dtype=str(value.dtype.numpy()), shape=sizes)
