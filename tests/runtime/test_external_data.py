"""A graph may take weights from listed files only, however it names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from otau.runtime import external_data
from otau.runtime.bundle import Bundle
from otau.runtime.bundle_writer import BundleWriter
from otau.runtime.errors import BundleError
from otau.runtime.external_data import refuse_unlisted_weights

LISTED = ("graph.onnx", "graph.onnx.data", "README.md")


def tensor(location: str) -> onnx.TensorProto:
    found = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        found.external_data.add(key=key, value=value)
    return found


def sparse(location: str) -> onnx.SparseTensorProto:
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    return onnx.SparseTensorProto(values=tensor(location), indices=indices, dims=[4])


def model(
    nodes: tuple[onnx.NodeProto, ...] = (), initializers: tuple[onnx.TensorProto, ...] = ()
) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(nodes, "g", [], [], initializers))


def constant(location: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor(location))


def as_initializer(location: str) -> onnx.ModelProto:
    return model(initializers=(tensor("graph.onnx.data"), tensor(location)))


def as_constant(location: str) -> onnx.ModelProto:
    return model((constant(location),))


def in_a_branch(location: str) -> onnx.ModelProto:
    branch = model((constant(location),)).graph
    return model((helper.make_node("If", ["b"], ["y"], then_branch=branch, else_branch=branch),))


def in_a_list(location: str) -> onnx.ModelProto:
    return model((helper.make_node("Any", [], [], tensors=[tensor(location)]),))


def in_a_function(location: str) -> onnx.ModelProto:
    made = model()
    made.functions.append(helper.make_function("d", "F", [], ["c"], [constant(location)], []))
    return made


def in_a_default(location: str) -> onnx.ModelProto:
    made = model()
    default = helper.make_attribute("a", tensor(location))
    made.functions.append(helper.make_function("d", "F", [], [], [], [], attribute_protos=[default]))
    return made


def in_training(location: str) -> onnx.ModelProto:
    made = model()
    made.training_info.add(algorithm=model((constant(location),)).graph)
    return made


def as_sparse_initializer(location: str) -> onnx.ModelProto:
    made = model()
    made.graph.sparse_initializer.append(sparse(location))
    return made


def as_sparse_constant(location: str) -> onnx.ModelProto:
    return model((helper.make_node("Constant", [], ["c"], sparse_value=sparse(location)),))


PLACES = (
    as_initializer,
    as_constant,
    in_a_branch,
    in_a_list,
    in_a_function,
    in_a_default,
    in_training,
    as_sparse_initializer,
    as_sparse_constant,
)


def check(folder: Path, data: bytes, name: str = "graph.onnx") -> None:
    (folder / name).write_bytes(data)
    refuse_unlisted_weights(folder, name, LISTED)


@pytest.mark.parametrize("place", PLACES)
def test_weights_in_listed_files_are_fine_and_all_others_refused(
    place: Callable[[str], onnx.ModelProto], tmp_path: Path
) -> None:
    for listed in ("graph.onnx.data", "README.md"):
        check(tmp_path, place(listed).SerializeToString())
    for name in ("engines/x", "../x", "/etc/passwd", "./graph.onnx.data", "graph.onnx.data\0", "x", ""):
        with pytest.raises(BundleError, match="manifest does not list"):
            check(tmp_path, place(name).SerializeToString())


def test_the_fields_are_those_of_onnx() -> None:
    messages = {
        "model": onnx.ModelProto,
        "graph": onnx.GraphProto,
        "training": onnx.TrainingInfoProto,
        "function": onnx.FunctionProto,
        "node": onnx.NodeProto,
        "attribute": onnx.AttributeProto,
        "sparse": onnx.SparseTensorProto,
        "tensor": onnx.TensorProto,
    }
    names = {message.DESCRIPTOR.name: name for name, message in messages.items()}
    for name, message in messages.items():
        of_tensors = {
            field.number: names[field.message_type.name]
            for field in message.DESCRIPTOR.fields
            if field.message_type is not None and field.message_type.name in names
        }
        if name == "tensor":
            of_tensors = {message.DESCRIPTOR.fields_by_name["external_data"].number: "entry"}
        assert external_data._FIELDS[name] == of_tensors


def field(number: int, payload: bytes) -> bytes:
    size = len(payload)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return bytes([number << 3 | 2]) + length + payload


KEY = field(1, b"location")
VALUE, OTHER = field(2, b"graph.onnx.data"), field(2, b"engines/x")


def raw(entry: bytes) -> bytes:
    """A model whose one tensor has this entry."""
    return field(7, field(5, field(13, entry)))


HOSTILE = {
    "the value first": raw(VALUE + KEY),
    "two values": raw(KEY + VALUE + OTHER),
    "two keys": raw(field(1, b"x") + KEY + VALUE),
    "a key that is replaced": raw(KEY + field(1, b"y") + VALUE),
    "what looks like an entry within another field": raw(
        field(15, bytes([13 << 3 | 2, len(KEY + VALUE)])) + KEY + VALUE + OTHER
    ),
    "a value that ends in the next entry": field(7, field(5, field(13, OTHER + KEY) + VALUE)),
    "a long length of the key": raw(b"\x0a\x88\x00location" + VALUE),
    "a long length of the value": raw(KEY + b"\x12\x89\x00engines/x"),
    "a long tag": raw(b"\x8a\x00\x08location" + VALUE),
    "a tag beyond 32 bits": raw(b"\x8a\x80\x80\x80\x10\x08location" + OTHER),
    "no value": raw(KEY),
    "a longer key": raw(field(1, b"location2") + VALUE),
    "the key as a value": raw(field(1, b"offset") + field(2, b"location")),
    "the key in a name": field(7, field(2, b"allocation")),
    "an unknown field": field(7, field(14, field(13, KEY + VALUE))),
    "a group": field(7, field(5, b"\x6b" + KEY + VALUE + b"\x6c")),
    "a cut field": raw(KEY + VALUE)[:-3],
    "no message": b"location" * 9,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_every_other_encoding_is_refused(data: bytes, tmp_path: Path) -> None:
    check(tmp_path, raw(KEY + VALUE))
    with pytest.raises(BundleError, match="graph of the bundle"):
        check(tmp_path, data)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    graph = field(5, field(13, KEY + VALUE))
    for _ in range(40):
        graph = field(1, field(5, field(6, graph)))
    with pytest.raises(BundleError, match="more than 100"):
        check(tmp_path, field(7, graph))


def test_a_graph_elsewhere_or_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("sub/graph.onnx", "graph.ort"):
        with pytest.raises(BundleError, match="no ONNX file"):
            check(tmp_path, b"", name)


@given(st.binary(max_size=60), st.binary(max_size=60), st.integers(0, 200))
def test_no_bytes_get_a_file_past_the_list(
    tmp_path_factory: pytest.TempPathFactory, before: bytes, after: bytes, length: int
) -> None:
    """Whatever onnx reads out of the file was listed, or the file is refused."""
    folder = tmp_path_factory.getbasetemp()
    data = raw(before[:40] + KEY + VALUE + after[:20]) + before + bytes([length]) + after
    try:
        check(folder, data)
        read = onnx.ModelProto.FromString(data)
    except Exception:  # refused here, or by onnx
        return
    assert all(
        entry.value in LISTED
        for found in read.graph.initializer
        for entry in found.external_data
        if entry.key == "location"
    )


def test_opening_a_bundle_refuses_weights_below_engines(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    graph = onnx.load(bundle / "ingest.onnx")
    graph.graph.initializer.append(tensor("engines/weights"))
    out = bundle.with_name("changed")
    with BundleWriter(out) as writer:
        for name in manifest.files:
            (writer.path / name).write_bytes((bundle / name).read_bytes())
        onnx.save(graph, writer.path / "ingest.onnx")
        writer.seal(msgspec.structs.replace(manifest))
    (out / "engines").mkdir()
    (out / "engines" / "weights").write_bytes(bytes(4))
    with pytest.raises(BundleError, match="manifest does not list") as caught:
        Bundle.open(out)
    assert caught.value.got == "'engines/weights'"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (HOSTILE["a tag beyond 32 bits"], "shortest form"),
        (HOSTILE["a cut field"], "longer than what it is in"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=said):
        check(tmp_path, data)
