"""The manifest of a bundle: everything the runtime must know and nothing it must guess.

One frozen record a concept. Unknown keys are errors, so a manifest written by a later schema is
refused rather than half understood.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "SCHEMA_VERSION",
    "CameraSpec",
    "FileSpec",
    "FlowSpec",
    "GateResult",
    "GraphSpec",
    "Manifest",
    "NormMode",
    "NormSpec",
    "PictureSpec",
    "Precision",
    "PromptSpec",
    "StateRoute",
    "TensorSpec",
    "VectorSpec",
]

SCHEMA_VERSION = 2
"""Version of the manifest's layout; a runtime reads exactly this one."""

NormMode = Literal["IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILE"]
StateRoute = Literal["prompt", "prefix", "decoder", "none"]
Precision = Literal["fp32", "fp16", "bf16"]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the manifest's records: immutable, and strict about unknown keys."""


class CameraSpec(_Record, frozen=True):
    """One camera, in the order in which the prefix takes them."""

    name: str
    height: int
    """Height [px] of the picture the prefix graph sees; others are letterboxed to it."""
    width: int
    """Width [px]."""


class PictureSpec(_Record, frozen=True):
    """How a picture of another size is fitted into the one that the prefix graph sees."""

    padding: Literal["left_top", "centre"]
    """Where the letterbox's free part goes: left and above, or on both sides."""
    resize: Literal["bilinear", "pillow"]
    """`pillow`: as Pillow's BILINEAR does, antialiased and rounded to bytes."""
    fill: float
    """Value of the free part, where pictures are in [0, 1]."""


class VectorSpec(_Record, frozen=True):
    """The state or the action vector."""

    dim: int
    """True number of dimensions, as the robot has them."""
    max_dim: int
    """Width of the graph's tensor; the rest is zero padding."""
    names: tuple[str, ...]
    """One name a true dimension."""
    units: tuple[str, ...]
    """One unit a true dimension, empty where the checkpoint does not say."""


class NormSpec(_Record, frozen=True):
    """How state and actions are normalised; the numbers are in `stats.safetensors`."""

    state: NormMode
    action: NormMode
    eps: float
    centre_degenerate: bool
    """True: a constant MIN_MAX or QUANTILE dimension maps to 0; False: to -1 (config_version 0)."""
    heads: tuple[str, ...]
    """Names of the rows of the statistics; `dataset_index` picks one, and must where there are several."""
    state_dtype: Literal["float32", "bfloat16"]
    """Precision in which the state of the prompt is normalised (training reads it in bfloat16)."""


class PromptSpec(_Record, frozen=True):
    """How task and state become the prompt."""

    template: str
    """With `{task}`, and `{state}` where the binned state is part of the text."""
    clean_task: bool
    """Whether the task is stripped, and its underscores and newlines become spaces, before it goes in."""
    state_bins: Literal["clip", "digitize"]
    """How a normalised state becomes bins; they differ below -1 and by rounding (see `prompt.state_bins`)."""
    state_dims: int | None
    """Dimensions of the normalised, zero-padded state that `{state}` lists; None without `{state}`."""
    max_length: int
    """Tokens the prompt is right-padded to."""
    state_open: str | None
    """Text before the state token of the prefix; None where the prefix has none."""
    state_close: str | None
    """Text after the state token of the prefix."""
    tokenizer: str | None
    """File of the tokenizer in the bundle; None: the bundle takes token ids."""
    response_left_out: bool
    """Whether the policy was trained to write a response before it acts, which the bundle does not do."""


class FlowSpec(_Record, frozen=True):
    """The denoising schedule and the action chunk."""

    num_steps: int
    """Euler steps from t = 1 to 0."""
    chunk: int
    """Actions of a chunk."""
    n_action_steps: int
    """Actions of a chunk that are meant to be executed."""
    max_delay: int
    """Largest `delay` [control ticks] the policy was trained with."""
    real_time_chunking: bool
    """Whether the decoder takes `action_prefix` and `delay`."""


class TensorSpec(_Record, frozen=True):
    """One input or output of a graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    """A string names a dynamic dimension."""


class GraphSpec(_Record, frozen=True):
    """One ONNX graph of the bundle."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: int
    parameters: int


class GateResult(_Record, frozen=True):
    """What a gate measured when the bundle was compiled."""

    name: str
    metric: str
    value: float
    limit: float
    passed: bool
    control_failed: bool
    """Whether the same gate failed on a deliberately damaged weight, as it must."""


class FileSpec(_Record, frozen=True):
    """Size and hash of one file of the bundle."""

    bytes: int
    sha256: str


class Manifest(_Record, frozen=True):
    """`manifest.json` of a bundle."""

    schema: int
    fingerprint: str
    """SHA-256 of this manifest with an empty fingerprint: the bundle's identity."""
    policy: str
    target: str
    engine: str
    precision: Precision
    """In which the graphs hold their weights; their inputs and outputs are float32 in any case."""
    cameras: tuple[CameraSpec, ...]
    pictures: PictureSpec
    empty_cameras: int
    """Masked placeholders that may stand in for cameras that are not there."""
    state: VectorSpec
    state_route: StateRoute
    """Where the policy reads the state: in the prompt, in the prefix, fresh in the decoder, or nowhere."""
    action: VectorSpec
    delta_actions: dict[str, int]
    """Action index -> state index, for actions relative to the state at the chunk's start."""
    norm: NormSpec
    prompt: PromptSpec
    flow: FlowSpec
    kv_layers: int
    kv_heads: int
    head_dim: int
    image_tokens: int
    """Tokens a camera takes of the prefix."""
    vocab: int
    """Rows of the policy's token table; token ids are below it."""
    graphs: dict[str, GraphSpec]
    """`prefix`, `ingest` and `decoder`, and sometimes `decoder_step`, a single Euler step of the decoder."""
    gates: tuple[GateResult, ...]
    versions: dict[str, str]
    """Versions of otau and of the packages that compiled the bundle."""
    files: dict[str, FileSpec]
    """Every other file of the bundle, by its path relative to the bundle."""
