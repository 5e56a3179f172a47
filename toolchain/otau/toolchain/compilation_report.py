"""What is said of a compilation: one JSON document, for `--json`, `report.json` and `report.html`."""

from __future__ import annotations

from typing import Any

import msgspec

from otau.toolchain.compilation import ACTIONS, CHECKPOINT, LAYERS, Compilation

__all__ = ["compilation_report"]


def compilation_report(c: Compilation) -> dict[str, Any]:
    """The compilation as one JSON document, as far as it got."""
    document: dict[str, Any] = {
        "bundle": str(c.destination),
        "command": c.command,
        "target": c.target.name,
        "precision": c.precision,
        "decoder": c.decoder,
        "allow": c.allow,
        "up_to_date": c.up_to_date,
        "stages": [
            {
                "name": name,
                "seconds": run.entry.seconds,
                "cached": run.cached,
                "peak_rss_mb": run.entry.peak_rss_mb,
                "disk_bytes": run.entry.bytes,
            }
            for name, run in c.runs.items()
        ],
        "gates": [msgspec.to_builtins(gate) for gate in c.gates],
        "graphs": {
            name: {
                "file": graph.spec.file,
                "nodes_exported": graph.nodes_exported,
                "nodes_final": graph.spec.nodes,
                "parameters": graph.spec.parameters,
                "bytes": graph.bytes,
                "passes": graph.passes,
            }
            for name, graph in c.graphs().items()
        },
    }
    if "intake" in c.runs:
        checkpoint = c.document("intake", CHECKPOINT)
        document["policy"] = checkpoint["config"]["type"]
        document["num_steps"] = c.num_steps or checkpoint["config"]["num_steps"]
        document["checkpoint"] = {name: checkpoint[name] for name in ("format", "parameters", "bytes")}
    if "prefix_gate" in c.runs:
        layers = c.document("prefix_gate", LAYERS)
        limit = next(gate.limit for gate in c.gates if gate.name == "prefix")
        measure = "max" if c.precision == "fp32" else "rms"
        document["kv_error"] = {
            "keys": layers[f"keys_{measure}"],
            "values": layers[f"values_{measure}"],
            "limit": limit if measure == "max" else None,
        }
    if "decoder_gate" in c.runs:
        actions = c.document("decoder_gate", ACTIONS)
        document["noise_floor"] = actions["noise_floor"]
        # The limit of a lower precision is on another measure, the relative RMS.
        limit = actions["limit"] if c.precision == "fp32" else None
        document["action_error"] = {"steps_by_dims": actions["error"], "limit": limit}
        document["chunk"] = {
            "probe": "full",
            "reference": actions["reference"],
            "compiled": actions["compiled"],
        }
    return document
