"""The manifest's parser: exact bytes, clear refusals, and nothing but OtauErrors for any bytes at all."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from otau.runtime.errors import BundleError, MismatchError, OtauError
from otau.runtime.manifest import decode_manifest, encode_manifest, manifest_fingerprint
from otau.runtime.spec import SCHEMA_VERSION, CameraSpec, TensorSpec

FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def changed(manifest, **fields):
    unsealed = msgspec.structs.replace(manifest, **fields)
    return msgspec.structs.replace(unsealed, fingerprint=manifest_fingerprint(unsealed))


def test_what_was_written_is_read_back(manifest):
    assert decode_manifest(encode_manifest(manifest), "here") == manifest


@given(st.data())
@FUZZ
def test_every_changed_byte_is_noticed(manifest, data):
    raw = bytearray(encode_manifest(manifest))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(OtauError):
        decode_manifest(bytes(raw), "here")


@pytest.mark.parametrize("rewrite", [lambda raw: raw + b" ", lambda raw: raw[:-1], lambda raw: b"\n" + raw])
def test_other_white_space_is_noticed_and_told_from_other_values(manifest, rewrite):
    with pytest.raises(BundleError, match="was changed(.|\n)*values are the same") as caught:
        decode_manifest(rewrite(encode_manifest(manifest)), "here")
    assert "fingerprint" not in str(caught.value)


def test_a_manifest_that_was_edited_and_formatted_alike_is_noticed(manifest):
    edited = msgspec.structs.replace(manifest, policy="pi07")
    with pytest.raises(BundleError, match="was changed"):
        decode_manifest(encode_manifest(edited), "here")


@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"schema": 2, "x": "\xff"}')
@example(b'{"schema": 2, "files": ' + b'{"a":' * 100_000)
@example(b'{"schema": 2e999}')
@FUZZ
def test_any_bytes_give_an_otau_error(raw):
    with pytest.raises(OtauError):
        decode_manifest(raw, "here")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
@FUZZ
def test_any_value_anywhere_gives_an_otau_error_or_a_manifest(manifest, data):
    document = json.loads(encode_manifest(manifest))
    parent = document
    key = data.draw(st.sampled_from(sorted(parent)))
    while isinstance(parent[key], (dict, list)) and parent[key] and data.draw(st.booleans()):
        parent = parent[key]
        key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
    original = parent[key]
    parent[key] = data.draw(JSON)
    raw = json.dumps(document).encode()
    if parent[key] == original:
        return
    with pytest.raises(OtauError):
        decode_manifest(raw, "here")


@pytest.mark.parametrize("schema", [0, 1, 99])
def test_another_schema_is_refused_with_both_versions_before_anything_else(schema):
    with pytest.raises(MismatchError) as caught:
        decode_manifest(json.dumps({"schema": schema, "new": 1}).encode(), "here")
    assert caught.value.exit_code == 3
    assert f"schema {SCHEMA_VERSION}" in str(caught.value)
    assert f"schema {schema}" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "key", "nearest"),
    [
        ((), "polcy", "policy"),
        (("norm",), "ep", "eps"),
        (("cameras", 0), "hight", "height"),
        (("graphs", "prefix", "inputs", 0), "shap", "shape"),
        (("files", "prefix.onnx"), "sha265", "sha256"),
    ],
)
def test_an_unknown_key_names_the_nearest_of_its_record(manifest, path, key, nearest):
    document = json.loads(encode_manifest(manifest))
    record = document
    for step in path:
        record = record[step]
    record[key] = 1
    with pytest.raises(BundleError, match=f"did you mean '{nearest}'"):
        decode_manifest(json.dumps(document).encode(), "here")


def test_a_number_that_json_cannot_hold_is_refused_when_writing(manifest):
    gate = msgspec.structs.replace(manifest.gates[0], value=float("nan"))
    with pytest.raises(BundleError, match="does not survive"):
        encode_manifest(msgspec.structs.replace(manifest, gates=(gate,)))


def camera(name, height=8, width=8):
    return CameraSpec(name=name, height=height, width=width)


def half(graph):
    inputs = tuple(msgspec.structs.replace(tensor, dtype="float16") for tensor in graph.inputs)
    return msgspec.structs.replace(graph, inputs=inputs)


def single_step(graph):
    """The spec of a step that belongs to a decoder."""
    others = tuple(tensor for tensor in graph.inputs if tensor.name != "noise")
    x, x_next = (TensorSpec(name=name, dtype="float32", shape=("B", 5, 4)) for name in ("x", "x_next"))
    step = TensorSpec(name="step", dtype="int64", shape=())
    return msgspec.structs.replace(graph, inputs=(x, step, *others), outputs=(x_next,))


def nested(record, field, **fields):
    return {field: msgspec.structs.replace(getattr(record, field), **fields)}


def test_a_single_step_of_the_decoder_may_be_there(manifest):
    graphs = manifest.graphs | {"decoder_step": single_step(manifest.graphs["decoder"])}
    both = changed(manifest, graphs=graphs)
    assert decode_manifest(encode_manifest(both), "here") == both


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_weights_may_be_narrower(manifest, precision):
    narrow = changed(manifest, precision=precision)
    assert decode_manifest(encode_manifest(narrow), "here").precision == precision


def test_another_precision_is_refused(manifest):
    document = json.loads(encode_manifest(manifest)) | {"precision": "int8"}
    with pytest.raises(BundleError, match=r"Invalid enum value 'int8' - at `\$.precision`"):
        decode_manifest(json.dumps(document).encode(), "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: nested(m, "flow", chunk=0, n_action_steps=0, max_delay=0), "flow.chunk is 0"),
        (lambda m: nested(m, "flow", max_delay=99), "max_delay"),
        (lambda m: nested(m, "flow", n_action_steps=99), "n_action_steps"),
        (lambda m: nested(m, "state", dim=99), "state.dim"),
        (lambda m: nested(m, "action", names=("one",)), "number of names"),
        (lambda m: {"delta_actions": {"7": 0}}, "action '7'"),
        (lambda m: {"delta_actions": {"x": 0}}, "action 'x'"),
        (lambda m: {"delta_actions": {"0": 3}}, "state 3"),
        (lambda m: {"cameras": ()}, "cameras is 0"),
        (lambda m: {"cameras": m.cameras + m.cameras}, "same name"),
        (lambda m: {"empty_cameras": -1}, "empty_cameras"),
        (lambda m: {"empty_cameras": 17}, r"empty_cameras is 17, not within 0\.\.16"),
        (lambda m: {"cameras": tuple(camera(f"c{i}") for i in range(17))}, "number of cameras is 17"),
        (lambda m: {"cameras": (camera("c", height=1025),)}, "height is 1025"),
        (lambda m: {"cameras": (camera("c", width=10**9),)}, "width is 1000000000"),
        (lambda m: nested(m, "flow", chunk=1025), r"flow\.chunk is 1025, not within 1\.\.1024"),
        (lambda m: nested(m, "flow", num_steps=1001), "num_steps is 1001"),
        (lambda m: nested(m, "prompt", max_length=4097), "max_length is 4097"),
        (lambda m: nested(m, "state", max_dim=1025), "state.max_dim is 1025"),
        (lambda m: nested(m, "action", max_dim=1025), "action.max_dim is 1025"),
        (lambda m: {"kv_layers": 257}, "kv_layers is 257"),
        (lambda m: {"kv_heads": 257}, "kv_heads is 257"),
        (lambda m: {"head_dim": 1025}, "head_dim is 1025"),
        (lambda m: {"image_tokens": 4097}, "image_tokens is 4097"),
        (lambda m: {"vocab": 0}, "vocab is 0"),
        (lambda m: {"vocab": 2**21 + 1}, "vocab is 2097153"),
        (
            lambda m: {"cameras": (m.cameras[0], msgspec.structs.replace(m.cameras[1], height=9))},
            "several sizes",
        ),
        (lambda m: {"graphs": {"prefix": m.graphs["prefix"]}}, "graphs are"),
        (lambda m: {"graphs": m.graphs | {"decoder_steps": m.graphs["decoder"]}}, "graphs are"),
        (lambda m: {"graphs": m.graphs | {"decoder_step": m.graphs["decoder"]}}, "decoder_step takes"),
        (lambda m: {"graphs": m.graphs | {"decoder_step": single_step(m.graphs["ingest"])}}, "_step takes"),
        (
            lambda m: {"graphs": m.graphs | {"ingest": half(m.graphs["ingest"])}},
            "ingest graph.*not float32: k",
        ),
        (lambda m: nested(m, "pictures", fill=2.0), "pictures.fill is 2"),
        (lambda m: nested(m, "norm", eps=-1e-6), "norm.eps is -1e-06"),
        (lambda m: nested(m, "norm", heads=("arm", "arm")), "norm.heads have the same name"),
        (lambda m: {"delta_actions": {"01": 0}}, "action '01'"),
        (lambda m: nested(m, "prompt", template="Task: {state}"), "does not have {task} once"),
        (lambda m: nested(m, "prompt", template="{task}"), "the state is read in: prompt"),
        (lambda m: {"state_route": "none"}, "the state is read in: none"),
        (lambda m: nested(m, "prompt", state_open="State: "), "state_open and state_close"),
        (lambda m: nested(m, "prompt", state_dims=None), "state_dims is None"),
        (lambda m: nested(m, "prompt", state_dims=99), r"state_dims 99 is not within 1\.\.4"),
        (lambda m: nested(m, "prompt", tokenizer="other.json"), "'other.json' is not among"),
        (lambda m: {"files": m.files | {"manifest.json": m.files["prefix.onnx"]}}, "among its own files"),
    ],
)
def test_contradictions_are_refused(manifest, change, message):
    with pytest.raises(BundleError, match=message):
        decode_manifest(encode_manifest(changed(manifest, **change(manifest))), "here")
