"""`otau inspect`: what is in a bundle or a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from otau.runtime.cli.options import RequireSignature
from otau.runtime.errors import MissingDependencyError, UsageError
from otau.runtime.messages import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from otau.runtime.bundle import Bundle
    from otau.runtime.checkpoint_facts import CheckpointFacts

__all__ = ["inspect"]


def inspect(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE|CHECKPOINT", help="The directory to look into.")],
    require_signature: RequireSignature = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what is in a bundle or a checkpoint.

    A bundle is verified first: hashes, schema, consistency. Its signatures are shown with whether they
    fit; that they are of somebody you trust, only --require-signature finds out. Of a checkpoint, only
    the configuration and the headers of the weights are read.

    Example: otau inspect my_bundle
    """
    import msgspec
    from rich.console import Console

    from otau.runtime.bundle import Bundle
    from otau.runtime.checkpoint_facts import read_checkpoint_facts
    from otau.runtime.manifest import MANIFEST_NAME

    if not path.is_dir():
        raise UsageError("there is no such directory", where=path)
    if (path / MANIFEST_NAME).exists():
        bundle = Bundle.open(path, require_signature=require_signature)
        signatures = _signatures(bundle)
        manifest = msgspec.to_builtins(bundle.manifest)
        document = {"kind": "bundle", "path": str(path), "signatures": signatures, "manifest": manifest}
        if not json_output:
            _print_bundle(Console(), bundle, signatures)
    else:
        if require_signature:
            raise UsageError(
                "this is no bundle, and only bundles are signed", where=path, expected=MANIFEST_NAME
            )
        facts = read_checkpoint_facts(path)
        document = {"kind": "checkpoint", **msgspec.to_builtins(facts)}
        if not json_output:
            _print_checkpoint(Console(), facts)
    if json_output:
        typer.echo(json.dumps(document, indent=2))


def _signatures(bundle: Bundle) -> list[dict[str, Any]]:
    """The bundle's signatures; `valid` is null where that cannot be found out here."""
    import msgspec

    from otau.runtime.manifest import encode_manifest
    from otau.runtime.signature import verifies

    found = []
    for entry in bundle.signatures:
        valid: bool | None
        try:
            valid = verifies(entry, encode_manifest(bundle.manifest))
        except MissingDependencyError:
            valid = None
        found.append({**msgspec.to_builtins(entry), "valid": valid})
    return found


def _print_bundle(console: Console, bundle: Bundle, signatures: list[dict[str, Any]]) -> None:
    """A bundle for people."""
    manifest = bundle.manifest
    words = {True: "valid", False: "NOT VALID", None: "not checked: pip install 'otau[sign]'"}
    flow, norm, prompt = manifest.flow, manifest.norm, manifest.prompt
    _print_facts(
        console,
        f"bundle {bundle.path}",
        {
            "policy": f"{manifest.policy}, {manifest.precision} for {manifest.target} on {manifest.engine}",
            "fingerprint": manifest.fingerprint,
            "signatures": ", ".join(
                f"{entry['key_id']} ({entry['algorithm']}), {words[entry['valid']]}" for entry in signatures
            )
            or "unsigned",
            "cameras": ", ".join(
                f"{camera.name} {camera.height}x{camera.width}" for camera in manifest.cameras
            )
            + (f", up to {manifest.empty_cameras} may be absent" if manifest.empty_cameras else ""),
            "state": f"{manifest.state.dim} of {manifest.state.max_dim}, read in the {manifest.state_route}:"
            f" {', '.join(manifest.state.names)}",
            "action": f"{manifest.action.dim} of {manifest.action.max_dim}:"
            f" {', '.join(manifest.action.names)}",
            "relative actions": ", ".join(
                f"action {action} to state {state}" for action, state in manifest.delta_actions.items()
            )
            or "none",
            "normalisation": f"state {norm.state} ({norm.state_dtype}), action {norm.action},"
            f" eps {norm.eps:g}; heads {', '.join(norm.heads)}",
            "prompt": f"{prompt.template!r}, {prompt.max_length} tokens, "
            + (f"tokenizer {prompt.tokenizer}" if prompt.tokenizer else "no tokenizer: takes token ids")
            + (", the response is left out" if prompt.response_left_out else ""),
            "flow": f"{flow.num_steps} steps, chunk {flow.chunk}, {flow.n_action_steps} to execute, "
            + (f"delay up to {flow.max_delay}" if flow.real_time_chunking else "no real-time chunking"),
            "KV cache": f"{manifest.kv_layers} layers x {manifest.kv_heads} heads x {manifest.head_dim},"
            f" {manifest.image_tokens} tokens a camera",
            "compiled with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        },
    )
    graphs = _table("graph", "file", "nodes", "parameters")
    for name, graph in manifest.graphs.items():
        graphs.add_row(name, _text(graph.file), f"{graph.nodes:,}", f"{graph.parameters:,}")
    gates = _table("gate", "metric", "value", "limit", "passed", "control failed")
    for gate in manifest.gates:
        marks = ("yes" if gate.passed else "NO", "yes" if gate.control_failed else "NO")
        gates.add_row(_text(gate.name), _text(gate.metric), f"{gate.value:.3g}", f"{gate.limit:.3g}", *marks)
    files = _table("file", "bytes", "SHA-256 (verified)")
    for name, file in manifest.files.items():
        files.add_row(_text(name), f"{file.bytes:,}", file.sha256[:16])
    console.print(graphs, gates, files)


def _print_checkpoint(console: Console, facts: CheckpointFacts) -> None:
    """A checkpoint for people."""
    _print_facts(
        console,
        f"checkpoint {facts.path}",
        {
            "policy": f"{facts.policy} ({facts.config_file})",
            "weights": ", ".join(facts.weights) or "none",
            "parameters": f"{facts.parameters:,} in {facts.tensors:,} tensors",
            "dtypes": ", ".join(f"{dtype} {count:,}" for dtype, count in facts.dtypes.items()) or "none",
            "cameras": ", ".join(
                f"{name} {' x '.join(str(size) for size in shape)}" for name, shape in facts.cameras.items()
            )
            or "none",
            "state": f"{facts.state_dim}",
            "action": f"{facts.action_dim}",
            **{key: json.dumps(value) for key, value in facts.config.items()},
        },
    )
    groups = _table("tensors", "number", "parameters")
    for group in facts.groups:
        groups.add_row(_text(group.name), f"{group.tensors:,}", f"{group.parameters:,}")
    console.print(groups)


def _print_facts(console: Console, title: str, facts: dict[str, str]) -> None:
    """A title and a line a fact."""
    from rich.table import Table

    console.print(_text(title, style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, _text(value))
    console.print(table)


def _text(value: str, style: str = "") -> Text:
    """A text that may be from a file: brackets are no markup, and control characters are escaped."""
    from rich.text import Text

    return Text(printable(value), style=style)


def _table(*columns: str) -> Table:
    """A table that breaks long words rather than cutting them off."""
    from rich.table import Table

    table = Table(*columns)
    for column in table.columns:
        column.overflow = "fold"
    return table
