"""Judge the compiled decoder, its single step, and the whole chain."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import msgspec

from otau.runtime.engines import engine_class
from otau.toolchain.compilation import ACTIONS, Compilation
from otau.toolchain.gate.answer_file import PROBES_NAME, read_reference
from otau.toolchain.gate.decoder import gate_decoder
from otau.toolchain.gate.reference import ProbeFactsFromPolicy
from otau.toolchain.stages.prefix_gate import read_caches
from otau.toolchain.thresholds import gate_limits

__all__ = ["run"]


def run(c: Compilation, folder: Path) -> None:
    """Leave the errors of the actions, and the noise floor they were judged by."""
    facts = ProbeFactsFromPolicy(c.checkpoint.empty)
    reference = read_reference(c.folder("decoder_reference") / PROBES_NAME, facts)
    caches = read_caches(c.folder("prefix_gate"))
    limits = gate_limits(reference.floor, prefix=c.precision, decoder=c.precision, allow=c.allow)
    kind = engine_class(c.target.engine)
    graphs = {
        "ingest": c.folder("prefix_graph"),
        "decoder": c.folder("decoder_graph"),
        "decoder_step": c.folder("decoder_graph"),
    }
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(kind.open(where / f"{name}.onnx", target=c.target.name))
            for name, where in graphs.items()
        }
        verdict = gate_decoder(engines, reference, caches, limits, c.steps)
    c.record_gates(folder, verdict.gates)
    actions = {
        "noise_floor": msgspec.to_builtins(reference.floor),
        "error": verdict.actions.error.tolist(),
        "limit": limits.actions.value,
        "reference": verdict.actions.reference.tolist(),
        "compiled": verdict.actions.compiled.tolist(),
    }
    (folder / ACTIONS).write_bytes(msgspec.json.encode(actions))
