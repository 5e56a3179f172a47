"""Tiny bundles with hand-made graphs that obey the graph contract, one a route of the state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from otau.runtime.bundle_writer import BundleWriter
from otau.runtime.manifest import manifest_fingerprint
from otau.runtime.spec import (
    SCHEMA_VERSION,
    CameraSpec,
    FileSpec,
    FlowSpec,
    GateResult,
    GraphSpec,
    Manifest,
    NormSpec,
    PictureSpec,
    PromptSpec,
    TensorSpec,
    VectorSpec,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "golden"

LAYERS, HEAD_DIM, LENGTH, CHUNK, STATE, MAX_STATE, ACTION, MAX_ACTION = 2, 4, 6, 5, 3, 4, 2, 4
CAMERAS = ("front", "wrist")
SIZE = 8
VOCABULARY = ("<pad>", "<unk>", "<bos>", "Task", "State", "pick", "up", ":", ",", ";", "127", "128", "0")

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
DTYPES = {FLOAT: "float32", INT: "int64", BOOL: "bool"}


@pytest.fixture(scope="session")
def golden() -> Path:
    """The golden files, beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"golden files are not there: {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Path]:
    return write_bundle


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """A manifest as the compiler would make it, sealed over no files but the ones it must name."""
    graphs = {
        "prefix": graph_spec(prefix_graph("prompt"), "prefix.onnx"),
        "ingest": graph_spec(ingest_graph(), "ingest.onnx"),
        "decoder": graph_spec(decoder_graph("prompt"), "decoder.onnx"),
    }
    names = ("prefix.onnx", "ingest.onnx", "decoder.onnx", "stats.safetensors", "tokenizer.json")
    files = {name: FileSpec(bytes=0, sha256="0" * 64) for name in names}
    unsealed = msgspec.structs.replace(tiny_manifest(), graphs=graphs, files=files)
    return msgspec.structs.replace(unsealed, fingerprint=manifest_fingerprint(unsealed))


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Builds and saves an ONNX model of nodes, inputs and outputs."""

    def save(*args: object, **constants: np.ndarray) -> Path:
        path = tmp_path / "model.onnx"
        onnx.save(make_model(*args, **constants), path)  # type: ignore[arg-type]
        return path

    return save


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose state is in the prompt, with real-time chunking and a tokenizer."""
    return write_bundle(tmp_path / "bundle")


def write_bundle(out: Path, route: str = "prompt", *, tokenizer: bool = True, **changes: object) -> Path:
    """Writes a tiny bundle; `changes` replace fields of its manifest."""
    with BundleWriter(out) as writer:
        graphs = {}
        for name, model in (
            ("prefix", prefix_graph(route)),
            ("ingest", ingest_graph()),
            ("decoder", decoder_graph(route)),
        ):
            onnx.save(model, writer.path / f"{name}.onnx")
            graphs[name] = graph_spec(model, f"{name}.onnx")
        save_file(statistics(), writer.path / "stats.safetensors")
        if tokenizer:
            (writer.path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
        (writer.path / "README.md").write_text("A tiny bundle.\n")
        manifest = msgspec.structs.replace(tiny_manifest(route, tokenizer), graphs=graphs, **changes)
        writer.seal(manifest)
    return out


def tiny_manifest(route: str = "prompt", tokenizer: bool = True) -> Manifest:
    rtc = route != "decoder"
    return Manifest(
        schema=SCHEMA_VERSION,
        fingerprint="",
        policy="pi05" if rtc else "pi0",
        target="cpu",
        engine="onnxruntime",
        precision="fp32",
        cameras=tuple(CameraSpec(name=name, height=SIZE, width=SIZE) for name in CAMERAS),
        pictures=PictureSpec(padding="left_top", resize="bilinear", fill=0.0),
        empty_cameras=0,
        state=VectorSpec(dim=STATE, max_dim=MAX_STATE, names=("x", "y", "z"), units=("m", "m", "m")),
        state_route=route,  # type: ignore[arg-type]
        action=VectorSpec(dim=ACTION, max_dim=MAX_ACTION, names=("action[0]", "action[1]"), units=("", "")),
        delta_actions={"1": 2},
        norm=NormSpec(
            state="MIN_MAX",
            action="MEAN_STD",
            eps=1e-6,
            centre_degenerate=True,
            heads=("arm::joint", "arm::pose"),
            state_dtype="float32",
        ),
        prompt=PromptSpec(
            template="Task: {task}, State: {state};\n" if route == "prompt" else "{task}\n",
            clean_task=False,
            state_bins="clip",
            state_dims=STATE if route == "prompt" else None,
            max_length=LENGTH,
            state_open="State: " if route == "prefix" else None,
            state_close=":\n" if route == "prefix" else None,
            tokenizer="tokenizer.json" if tokenizer else None,
            response_left_out=False,
        ),
        flow=FlowSpec(
            num_steps=10,
            chunk=CHUNK,
            n_action_steps=CHUNK,
            max_delay=3 if rtc else 0,
            real_time_chunking=rtc,
        ),
        kv_layers=LAYERS,
        kv_heads=1,
        head_dim=HEAD_DIM,
        image_tokens=1,
        vocab=len(VOCABULARY),
        graphs={},
        gates=(
            GateResult(name="parity", metric="max", value=1e-7, limit=2e-6, passed=True, control_failed=True),
        ),
        versions={"otau": "0.1.0"},
        files={},
    )


def statistics() -> dict[str, np.ndarray]:
    return {
        "state.min": np.array([[-1, -2, -3], [0, 0, 0]], np.float32),
        "state.max": np.array([[1, 2, 3], [1, 1, 1]], np.float32),
        "action.mean": np.array([[1, 2], [3, 4]], np.float32),
        "action.std": np.array([[0.5, 2], [1, 1]], np.float32),
    }


def tokenizer_json() -> dict[str, object]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    document: dict[str, object] = json.loads(tokenizer.to_str())
    return document


def graph_spec(model: onnx.ModelProto, file: str) -> GraphSpec:
    def specs(values: object) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=value.name,
                dtype=DTYPES[value.type.tensor_type.elem_type],
                shape=tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values  # type: ignore[attr-defined]
        )

    graph = model.graph
    return GraphSpec(
        file=file, inputs=specs(graph.input), outputs=specs(graph.output), nodes=len(graph.node), parameters=0
    )


def make_model(
    nodes: list[onnx.NodeProto], inputs: list, outputs: list, **constants: np.ndarray
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*entry) for entry in inputs],
        [helper.make_tensor_value_info(*entry) for entry in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def prefix_graph(route: str) -> onnx.ModelProto:
    """Keys: the mean of a picture, or a hundredth of a token id; values: keys + 1."""
    node = helper.make_node
    inputs = [
        ("images", FLOAT, ["B", "N", 3, SIZE, SIZE]),
        ("image_masks", BOOL, ["B", "N"]),
        ("tokens", INT, ["B", LENGTH]),
        ("token_masks", BOOL, ["B", LENGTH]),
    ]
    nodes = [
        node("ReduceMean", ["images", "pixel_axes"], ["image_part"], keepdims=0),
        node("Cast", ["tokens"], ["token_floats"], to=FLOAT),
        node("Mul", ["token_floats", "hundredth"], ["token_part"]),
    ]
    parts, masks = ["image_part", "token_part"], ["image_masks", "token_masks"]
    if route == "prefix":
        inputs += [
            ("state", FLOAT, ["B", MAX_STATE]),
            ("state_open", INT, ["O"]),
            ("state_close", INT, ["C"]),
        ]
        nodes += [
            node("ReduceSum", ["state", "last"], ["state_part"], keepdims=1),
            node("Mul", ["state_part", "zero"], ["state_zero"]),
        ]
        for name in ("open", "close"):
            nodes += [
                node("Cast", [f"state_{name}"], [f"{name}_floats"], to=FLOAT),
                node("Mul", [f"{name}_floats", "hundredth"], [f"{name}_row"]),
                node("Add", [f"{name}_row", "state_zero"], [f"{name}_part"]),
            ]
        parts += ["open_part", "state_part", "close_part"]
        nodes += [node("Concat", parts[2:], ["state_parts"], axis=1)]
        nodes += [node("Equal", ["state_parts", "state_parts"], ["state_mask"])]
        masks += ["state_mask"]
    nodes += [
        node("Concat", parts, ["row"], axis=1),
        node("Concat", masks, ["prefix_mask"], axis=1),
        node("Unsqueeze", ["row", "kv_axes"], ["column"]),
        node("Mul", ["column", "spread"], ["keys"]),
        node("Add", ["keys", "one"], ["values"]),
    ]
    cache = [LAYERS, "B", "P", 1, HEAD_DIM]
    spread = np.arange(1, LAYERS * HEAD_DIM + 1, dtype=np.float32).reshape(LAYERS, 1, 1, 1, HEAD_DIM)
    constants = {
        "pixel_axes": np.array([2, 3, 4]),
        "hundredth": np.float32([0.01]),
        "kv_axes": np.array([0, 3, 4]),
        "spread": spread,
        "one": np.float32([1]),
    }
    if route == "prefix":
        constants |= {"last": np.array([1]), "zero": np.float32([0])}
    outputs = [("keys", FLOAT, cache), ("values", FLOAT, cache), ("prefix_mask", BOOL, ["B", "P"])]
    return make_model(nodes, inputs, outputs, **constants)


def ingest_graph() -> onnx.ModelProto:
    node = helper.make_node
    cache = [LAYERS, "B", "P", 1, HEAD_DIM]
    nodes, outputs = [], []
    for layer in range(LAYERS):
        for source, name, order in (("keys", "key", [0, 2, 3, 1]), ("values", "value", [0, 2, 1, 3])):
            nodes += [
                node("Gather", [source, f"layer_{layer}"], [f"{name}_rows_{layer}"], axis=0),
                node("Transpose", [f"{name}_rows_{layer}"], [f"{name}_{layer}"], perm=order),
            ]
        outputs += [
            (f"key_{layer}", FLOAT, ["B", 1, HEAD_DIM, "P"]),
            (f"value_{layer}", FLOAT, ["B", 1, "P", HEAD_DIM]),
        ]
    layers = {f"layer_{layer}": np.array(layer) for layer in range(LAYERS)}
    return make_model(nodes, [("keys", FLOAT, cache), ("values", FLOAT, cache)], outputs, **layers)


def decoder_graph(route: str) -> onnx.ModelProto:
    """Noise + the mean of the last layer's valid values [+ the sum of the state], frozen rows put in."""
    node = helper.make_node
    rows = ["B", CHUNK, MAX_ACTION]
    inputs = [("prefix_mask", BOOL, ["B", "P"]), ("noise", FLOAT, rows)]
    for layer in range(LAYERS):
        inputs += [
            (f"key_{layer}", FLOAT, ["B", 1, HEAD_DIM, "P"]),
            (f"value_{layer}", FLOAT, ["B", 1, "P", HEAD_DIM]),
        ]
    # Every input takes part, the keys by a product with zero, so that none is optimised away.
    nodes = [
        node("ReduceMean", [f"value_{LAYERS - 1}", "ends"], ["points"], keepdims=0),
        node("Cast", ["prefix_mask"], ["weights"], to=FLOAT),
        node("Mul", ["points", "weights"], ["valid"]),
        node("ReduceSum", ["valid", "last"], ["sum"], keepdims=1),
        node("ReduceSum", ["weights", "last"], ["count"], keepdims=1),
        node("Div", ["sum", "count"], ["mean"]),
        node("Unsqueeze", ["mean", "two"], ["shift"]),
        node("Add", ["noise", "shift"], ["moved"]),
    ]
    result = "moved"
    constants = {"ends": np.array([1, 3]), "last": np.array([1]), "two": np.array([2])}
    if route == "decoder":
        inputs += [("state", FLOAT, ["B", MAX_STATE])]
        nodes += [
            node("ReduceSum", ["state", "last"], ["state_sum"], keepdims=1),
            node("Unsqueeze", ["state_sum", "two"], ["state_shift"]),
            node("Add", ["moved", "state_shift"], ["actions"]),
        ]
        result = "actions"
    else:
        inputs += [("action_prefix", FLOAT, rows), ("delay", INT, ["B"])]
        nodes += [
            node("Unsqueeze", ["delay", "both"], ["limit"]),
            node("Less", ["ticks", "limit"], ["frozen"]),
            node("Where", ["frozen", "action_prefix", result], ["actions"]),
        ]
        constants |= {"both": np.array([1, 2]), "ticks": np.arange(CHUNK).reshape(1, CHUNK, 1)}
    return make_model(nodes, inputs, [("actions", FLOAT, rows)], **constants)
