"""Reading and writing `manifest.json`: one canonical encoding, decoded strictly.

The encoding is JSON with the records' own field order, mappings sorted by key, an indent of two and a
newline at the end. The file must hold exactly those bytes, so every changed byte is noticed; the
fingerprint is the SHA-256 of the same encoding with an empty fingerprint.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any, get_args, get_type_hints

import msgspec

from otau.runtime.errors import BundleError, MismatchError, nearest_name
from otau.runtime.spec import SCHEMA_VERSION, GraphSpec, Manifest, TensorSpec, VectorSpec

__all__ = [
    "DECODER_STEP",
    "GRAPHS",
    "MANIFEST_NAME",
    "MAXIMA",
    "MAX_MANIFEST_BYTES",
    "STATS_NAME",
    "decode_manifest",
    "encode_manifest",
    "manifest_fingerprint",
]

MANIFEST_NAME = "manifest.json"
STATS_NAME = "stats.safetensors"
GRAPHS = ("prefix", "ingest", "decoder")
"""The graphs that every bundle has."""
DECODER_STEP = "decoder_step"
"""The graph that a bundle may have besides: `x` and `step` instead of the decoder's `noise` -> `x_next`."""
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
"""Largest manifest that is read: a hundred times what a bundle of today needs."""
MAXIMA = {
    "flow.num_steps": 1000,
    "flow.chunk": 1024,
    "flow.n_action_steps": 1024,
    "prompt.max_length": 4096,
    "state.max_dim": 1024,
    "action.max_dim": 1024,
    "kv_layers": 256,
    "kv_heads": 256,
    "head_dim": 1024,
    "image_tokens": 4096,
    "vocab": 2**21,
    "the number of cameras": 16,
    "the number of norm.heads": 4096,
    "a camera's height": 1024,
    "a camera's width": 1024,
}
"""Largest sizes: several times those of any policy known, and small enough that what the runtime itself
makes of them for one observation (noise, pictures, placeholders, tokens) stays below half a gigabyte."""
_MAX_EMPTY_CAMERAS = 16
_NOT_FLOAT32 = ("float16", "bfloat16", "float64")


class _SchemaProbe(msgspec.Struct):
    """The one key that must be read before the layout of the others is known."""

    schema: int


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest.

    Raises:
        BundleError: The manifest cannot be read back, for example because a number is NaN.
    """
    data = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2) + b"\n"
    try:
        same = msgspec.json.decode(data, type=Manifest) == manifest
    except msgspec.DecodeError as error:
        raise BundleError("the manifest does not survive being written", got=error) from error
    if not same:
        raise BundleError("the manifest does not survive being written", fix="give finite numbers only")
    return data


def manifest_fingerprint(manifest: Manifest) -> str:
    """The bundle's identity: SHA-256 of the canonical encoding with an empty fingerprint, in hex."""
    blank = msgspec.structs.replace(manifest, fingerprint="")
    return hashlib.sha256(encode_manifest(blank)).hexdigest()


def decode_manifest(data: bytes, where: object) -> Manifest:
    """Decodes a manifest and refuses anything but the canonical bytes of a sound one.

    Args:
        data: What `manifest.json` holds.
        where: Named in errors, usually the file's path.

    Raises:
        MismatchError: The manifest has another schema version.
        BundleError: Not JSON, an unknown or missing key, a value of the wrong kind, values that
            contradict each other or are too large, gates that did not pass, or bytes that are not the
            ones its fingerprint was made of.
    """
    try:
        schema = msgspec.json.decode(data, type=_SchemaProbe).schema
        if schema != SCHEMA_VERSION:
            raise MismatchError(
                "the bundle's manifest has a schema version that this otau does not read",
                where=where,
                expected=f"schema {SCHEMA_VERSION}",
                got=f"schema {schema}",
                fix="compile the checkpoint again with this otau, or install the otau that wrote the bundle",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    # ValueError: invalid UTF-8. RecursionError: nesting deeper than the interpreter's stack.
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BundleError(
            "the bundle's manifest cannot be read", where=where, got=error, fix=_unknown_key_hint(str(error))
        ) from error
    _check_consistent(manifest, where)
    _check_gates(manifest, where)
    fix = "compile the checkpoint again, or copy the bundle again from where it came"
    fingerprint = manifest_fingerprint(manifest)
    if fingerprint != manifest.fingerprint:
        raise BundleError(
            "the bundle's manifest was changed after it was written",
            where=where,
            expected=f"fingerprint {manifest.fingerprint[:80]}",
            got=f"fingerprint {fingerprint}",
            fix=fix,
        )
    canonical = encode_manifest(manifest)
    if canonical != data:
        raise BundleError(
            "the bundle's manifest was changed after it was written: its values are the same, but not the"
            " way they are written down",
            where=where,
            expected=f"{len(canonical)} bytes in otau's own formatting",
            got=f"{len(data)} bytes, another one first at {len(os.path.commonprefix([canonical, data]))}",
            fix=fix,
        )
    return manifest


def _unknown_key_hint(message: str) -> str:
    """The fix for a message of msgspec's: the nearest valid key where a key was unknown."""
    found = re.search(r"unknown field `([^`]*)`(?: - at `\$([^`]*)`)?", message)
    if found is None:
        return "compile the checkpoint again, or copy the bundle again from where it came"
    kind: Any = Manifest
    for step in re.findall(r"\.(\w+)|\[", found.group(2) or ""):
        # A name steps into a field; a bracket into the values of a mapping or tuple.
        kind = get_type_hints(kind)[step] if step else _element_type(kind)
    return nearest_name(found.group(1), [field.name for field in msgspec.structs.fields(kind)])


def _element_type(kind: Any) -> Any:
    """The record inside `dict[str, Record]` or `tuple[Record, ...]`."""
    return next(arg for arg in get_args(kind) if isinstance(arg, type) and issubclass(arg, msgspec.Struct))


def _check_consistent(manifest: Manifest, where: object) -> None:
    """Refuses values that contradict each other, before anything is computed from them."""
    for problem in _contradictions(manifest):
        raise BundleError(
            f"the bundle's manifest contradicts itself: {problem}",
            where=where,
            fix="compile the checkpoint again",
        )


def _check_gates(manifest: Manifest, where: object) -> None:
    """Refuses a bundle that was not shown to be what it was compiled from."""
    failed = [gate.name for gate in manifest.gates if not (gate.passed and gate.control_failed)]
    if failed or not manifest.gates:
        raise BundleError(
            "the bundle did not pass its gates when it was compiled",
            where=where,
            expected="gates that passed, and that failed on a damaged weight",
            got=f"not so: {', '.join(failed)}" if failed else "no gate",
            fix="do not use this bundle; compile the checkpoint again",
        )


def _contradictions(manifest: Manifest) -> list[str]:
    """Every contradiction, in words."""
    found = []
    flow = manifest.flow
    sizes = {
        "flow.num_steps": [flow.num_steps],
        "flow.chunk": [flow.chunk],
        "flow.n_action_steps": [flow.n_action_steps],
        "prompt.max_length": [manifest.prompt.max_length],
        "state.max_dim": [manifest.state.max_dim],
        "action.max_dim": [manifest.action.max_dim],
        "kv_layers": [manifest.kv_layers],
        "kv_heads": [manifest.kv_heads],
        "head_dim": [manifest.head_dim],
        "image_tokens": [manifest.image_tokens],
        "vocab": [manifest.vocab],
        "the number of cameras": [len(manifest.cameras)],
        "the number of norm.heads": [len(manifest.norm.heads)],
        "a camera's height": [camera.height for camera in manifest.cameras],
        "a camera's width": [camera.width for camera in manifest.cameras],
    }
    for name, values in sizes.items():
        found += [
            f"{name} is {size}, not within 1..{MAXIMA[name]}"
            for size in values
            if not 1 <= size <= MAXIMA[name]
        ]
    if flow.n_action_steps > flow.chunk:
        found.append(f"flow.n_action_steps {flow.n_action_steps} > flow.chunk {flow.chunk}")
    if not 0 <= flow.max_delay <= flow.chunk:
        found.append(f"flow.max_delay {flow.max_delay} is not within 0..{flow.chunk}")
    if not 0 <= manifest.norm.eps < 1:
        found.append(f"norm.eps is {manifest.norm.eps}, not within 0..1")
    if len(set(manifest.norm.heads)) != len(manifest.norm.heads):
        found.append("two norm.heads have the same name")
    found += _picture_contradictions(manifest)
    found += _vector_contradictions("state", manifest.state) + _vector_contradictions(
        "action", manifest.action
    )
    for action, state in manifest.delta_actions.items():
        if not (re.fullmatch(r"0|[1-9]\d{0,8}", action) and int(action) < manifest.action.dim):
            found.append(f"delta_actions has action {action!r} of {manifest.action.dim}")
        if not 0 <= state < manifest.state.dim:
            found.append(f"delta_actions has state {state} of {manifest.state.dim}")
    found += _prompt_contradictions(manifest) + _graph_contradictions(manifest.graphs)
    named = [STATS_NAME, *(graph.file for graph in manifest.graphs.values())]
    named += [manifest.prompt.tokenizer] if manifest.prompt.tokenizer is not None else []
    found += [f"{name!r} is not among its files" for name in named if name not in manifest.files]
    if MANIFEST_NAME in manifest.files:
        found.append(f"{MANIFEST_NAME} is among its own files")
    return found


def _picture_contradictions(manifest: Manifest) -> list[str]:
    found = []
    if not 0 <= manifest.empty_cameras <= _MAX_EMPTY_CAMERAS:
        found.append(f"empty_cameras is {manifest.empty_cameras}, not within 0..{_MAX_EMPTY_CAMERAS}")
    if len({camera.name for camera in manifest.cameras}) != len(manifest.cameras):
        found.append("two cameras have the same name")
    if len({(camera.height, camera.width) for camera in manifest.cameras}) > 1:
        found.append("the cameras have several sizes, but the prefix takes one tensor of images")
    if not -1 <= manifest.pictures.fill <= 1:
        found.append(f"pictures.fill is {manifest.pictures.fill}, not within -1..1")
    return found


def _vector_contradictions(kind: str, vector: VectorSpec) -> list[str]:
    found = []
    if not 1 <= vector.dim <= vector.max_dim:
        found.append(f"{kind}.dim {vector.dim} is not within 1..{vector.max_dim}")
    if len(vector.names) != vector.dim or len(vector.units) != vector.dim:
        found.append(f"{kind} has {vector.dim} dimensions, but another number of names or units")
    return found


def _prompt_contradictions(manifest: Manifest) -> list[str]:
    prompt, route = manifest.prompt, manifest.state_route
    found = []
    if prompt.template.count("{task}") != 1:
        found.append(f"prompt.template {prompt.template!r} does not have {{task}} once")
    if ("{state}" in prompt.template) != (route == "prompt"):
        found.append(f"prompt.template is {prompt.template!r}, but the state is read in: {route}")
    if (prompt.state_dims is None) != (route != "prompt"):
        found.append(f"prompt.state_dims is {prompt.state_dims}, but the state is read in: {route}")
    if prompt.state_dims is not None and not 1 <= prompt.state_dims <= manifest.state.max_dim:
        found.append(f"prompt.state_dims {prompt.state_dims} is not within 1..{manifest.state.max_dim}")
    if (prompt.state_open is None, prompt.state_close is None) != (route != "prefix",) * 2:
        found.append(f"prompt.state_open and state_close do not fit a state that is read in: {route}")
    return found


def _graph_contradictions(graphs: dict[str, GraphSpec]) -> list[str]:
    if not set(GRAPHS) <= set(graphs) <= {*GRAPHS, DECODER_STEP}:
        return [f"graphs are {sorted(graphs)}, expected {sorted(GRAPHS)} and perhaps {DECODER_STEP}"]
    found = []
    for name, graph in graphs.items():
        narrow = [tensor.name for tensor in (*graph.inputs, *graph.outputs) if tensor.dtype in _NOT_FLOAT32]
        if narrow:
            found.append(f"the {name} graph has inputs or outputs that are not float32: {', '.join(narrow)}")
    if DECODER_STEP in graphs:
        step, decoder = graphs[DECODER_STEP], graphs["decoder"]
        wanted = _names(decoder.inputs) - {"noise"} | {"x", "step"}
        if _names(step.inputs) != wanted or _names(step.outputs) != {"x_next"}:
            got = f"{sorted(_names(step.inputs))} to {sorted(_names(step.outputs))}"
            found.append(f"{DECODER_STEP} takes {got}, expected {sorted(wanted)} to ['x_next']")
    return found


def _names(tensors: tuple[TensorSpec, ...]) -> set[str]:
    return {tensor.name for tensor in tensors}
