"""Which files an ONNX graph takes its weights from.

A graph names them itself, in entries `location` of its tensors, and an engine opens whatever is named: a file
that the manifest does not list, or one outside of the bundle. So the names are read here first, without any
ONNX library: the file is walked as the protocol buffer that it is, in the one encoding that writers produce.

In that format a key lies in the file as the plain bytes `location`. Each occurrence of them must have been
found to be such an entry; where one is anything else (part of another name, in a field that is not known
here, within bytes that were passed over) the graph is refused. The compiler's own graphs have none. So what
the walk does not know makes it refuse an entry, never miss one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from otau.runtime.bundle_files import read_inside
from otau.runtime.errors import BundleError

__all__ = ["MAX_GRAPH_BYTES", "refuse_unlisted_weights"]

MAX_GRAPH_BYTES = 256 * 1024 * 1024
"""Largest graph that is read. Weights lie in files of their own; that of a full-size prefix has a few MB."""
_MAX_DEPTH = 100
"""Of messages within messages, as protocol buffers have it."""
_KEY = b"location"
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""The messages of onnx.proto on the way to a tensor's external data, by the fields that hold them."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _Malformed(Exception):
    """Says what is wrong with the bytes of a graph."""


def refuse_unlisted_weights(root: Path, graph: str, listed: Collection[str]) -> None:
    """Refuses a graph that takes weights from a file which the manifest does not list.

    Args:
        root: The bundle.
        graph: Name of the graph's file.
        listed: Names of the files that were verified.

    Raises:
        BundleError: A file is named that is not listed, the graph is not a sound ONNX file, or it is no file
            `*.onnx` in the bundle's own directory, which is where its names are looked up.
    """
    where = root / graph
    fix = "do not use this bundle; compile the checkpoint again"
    if "/" in graph or not graph.endswith(".onnx"):
        raise BundleError(
            "a graph of the bundle is no ONNX file in its directory", where=where, got=repr(graph), fix=fix
        )
    data = read_inside(root, graph, MAX_GRAPH_BYTES)
    try:
        names = list(_locations(data, "model", 0, len(data), _MAX_DEPTH))
    except _Malformed as error:
        raise BundleError(
            "a graph of the bundle is not a sound ONNX file", where=where, got=error, fix=fix
        ) from None
    if len(names) != data.count(_KEY):
        raise BundleError(
            "a graph of the bundle may name files in a place that is not read here",
            where=where,
            expected=f"the bytes {_KEY.decode()!r} in external data only, {len(names)} times",
            got=f"{data.count(_KEY)} times",
            fix=fix,
        )
    for name in names:
        if name not in listed:
            raise BundleError(
                "a graph of the bundle takes weights from a file that its manifest does not list",
                where=where,
                got=repr(name),
                fix=fix,
            )


def _locations(data: bytes, message: str, start: int, end: int, depth: int) -> Iterator[str]:
    """The names in the external data of all tensors in a message; parts without the key are passed over."""
    if data.find(_KEY, start, end) < 0:
        return
    if not depth:
        raise _Malformed(f"messages within messages, more than {_MAX_DEPTH}")
    if message == "entry":
        yield _location(data, start, end)
        return
    for number, kind, first, last in _fields(data, start, end):
        if kind == _BYTES and number in _FIELDS[message]:
            yield from _locations(data, _FIELDS[message][number], first, last, depth - 1)


def _location(data: bytes, start: int, end: int) -> str:
    """The value of an entry: a key and a value, once each. Of a field given twice, readers take the last."""
    fields = list(_fields(data, start, end))
    if [field[:2] for field in fields] != [(1, _BYTES), (2, _BYTES)]:
        raise _Malformed("an entry of external data that is not one key and one value")
    (_, _, key, key_end), (_, _, value, value_end) = fields
    if data[key:key_end] != _KEY:
        raise _Malformed(f"an entry of external data that only has {_KEY.decode()!r} in it")
    return data[value:value_end].decode("utf-8", "backslashreplace")


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """A message's fields: number, kind of encoding, and where the contents begin and end."""
    while at < end:
        tag, at = _number(data, at, end)
        number, kind = tag >> 3, tag & 7
        first = at
        if kind == _BYTES:
            size, first = _number(data, at, end)
            at = first + size
        elif kind == _VARINT:
            at = _varint_end(data, at, end)
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise _Malformed(f"a field of kind {kind}")
        if at > end:
            raise _Malformed("a field that is longer than what it is in")
        yield number, kind, first, at


def _number(data: bytes, start: int, end: int) -> tuple[int, int]:
    """A tag or a length, below 2^32 and in its shortest form, and where it ends.

    Readers do not agree on what else there may be.
    """
    stop = _varint_end(data, start, end)
    value = 0
    for byte in reversed(data[start:stop]):
        value = value << 7 | byte & 0x7F
    if value >= 1 << 32 or (stop - start > 1 and data[stop - 1] == 0):
        raise _Malformed("a number that is not in its shortest form")
    return value, stop


def _varint_end(data: bytes, start: int, end: int) -> int:
    for at in range(start, min(start + 10, end)):
        if data[at] < 0x80:
            return at + 1
    raise _Malformed("a number without an end")
