"""Fold flow time to tables, and judge that against the policy."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from otau.toolchain.compilation import Compilation
from otau.toolchain.gate.answer_file import PROBES_NAME, read_reference
from otau.toolchain.gate.reference import ProbeFactsFromPolicy, gate_fold
from otau.toolchain.graph.programs import DenoiseStep

__all__ = ["TABLES", "run"]

TABLES = "tables.safetensors"


def run(c: Compilation, folder: Path) -> None:
    """Leave the tables."""
    facts = ProbeFactsFromPolicy(c.checkpoint.empty)
    reference = read_reference(c.folder("decoder_reference") / PROBES_NAME, facts)
    program = DenoiseStep(c.checkpoint.load("decoder"), c.steps)
    c.record_gates(folder, [gate_fold(program, reference)])
    save_file(program.tables(), folder / TABLES)
