"""The prefix and the ingest: export, passes, files."""

from __future__ import annotations

from pathlib import Path

from otau.toolchain.compilation import Compilation
from otau.toolchain.gate.probes import make_probes
from otau.toolchain.gate.reference import ProbeFactsFromPolicy
from otau.toolchain.graph.export import IngestFromPolicy, PrefixFromPolicy, weights_of
from otau.toolchain.graph.passes import run_passes
from otau.toolchain.graph.save import save_graphs
from otau.toolchain.graph.simplify import SIMPLIFY, count_nodes
from otau.toolchain.graph.twin import ingest_answer, prefix_answer
from otau.toolchain.stages.graphs import (
    GraphReportFromModel,
    check_graphs,
    is_own_twin,
    target_passes,
    twin_of,
)

__all__ = ["run"]


def run(c: Compilation, folder: Path) -> None:
    """Leave `prefix.onnx` with its weights, and `ingest.onnx`, which has none."""
    policy, twin = c.checkpoint.empty, twin_of(c)
    probe = next(probe for probe in make_probes(ProbeFactsFromPolicy(twin)) if probe.name == "padded")

    prefix = PrefixFromPolicy(policy, c.checkpoint.weights)
    twin_prefix = prefix if is_own_twin(c) else PrefixFromPolicy(twin, weights_of(twin))
    exported = {"prefix": count_nodes(prefix)}
    answer = prefix_answer(probe.prefix)
    passes = {"prefix": run_passes(prefix, twin_prefix, target_passes(c, "prefix"), answer, "prefix")}
    ingest = IngestFromPolicy(policy)
    exported["ingest"] = count_nodes(ingest)
    twin_ingest = ingest if is_own_twin(c) else IngestFromPolicy(twin)
    passes["ingest"] = run_passes(ingest, twin_ingest, SIMPLIFY, ingest_answer(twin), "ingest")

    save_graphs({"prefix": prefix, "ingest": ingest}, folder, "prefix.onnx.data")
    models = {"prefix": prefix, "ingest": ingest}
    check_graphs(folder, models)
    c.record_graphs(
        folder,
        {
            name: GraphReportFromModel(name, model, exported[name], passes[name])
            for name, model in models.items()
        },
    )
