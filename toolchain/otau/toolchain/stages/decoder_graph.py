"""The decoder: one denoise step exported, and from it the graph of all steps."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from otau.toolchain.compilation import Compilation
from otau.toolchain.gate.probes import make_probes
from otau.toolchain.gate.reference import ProbeFactsFromPolicy
from otau.toolchain.graph.export import DecoderStepFromPolicy, weights_of
from otau.toolchain.graph.loop import LoopDenoiseSteps, UnrollDenoiseSteps
from otau.toolchain.graph.passes import run_passes
from otau.toolchain.graph.programs import DenoiseStep
from otau.toolchain.graph.save import save_graphs
from otau.toolchain.graph.simplify import FoldWeightExpressions, RemoveUnused, count_nodes
from otau.toolchain.graph.twin import decoder_answer
from otau.toolchain.intake.safetensors import read_safetensors
from otau.toolchain.stages.fold import TABLES
from otau.toolchain.stages.graphs import (
    GraphReportFromModel,
    check_graphs,
    is_own_twin,
    target_passes,
    twin_of,
)
from otau.training.policies import FlowPolicy
from otau.training.policies.weights import StoredTensor, Weights

__all__ = ["run"]


def run(c: Compilation, folder: Path) -> None:
    """Leave `decoder.onnx` and `decoder_step.onnx`, which share their weights in one file."""
    policy, twin = c.checkpoint.empty, twin_of(c)
    tables = read_safetensors(c.folder("fold") / TABLES)
    step = DecoderStepFromPolicy(policy, c.checkpoint.weights, tables, c.steps)
    twin_step = (
        step
        if is_own_twin(c)
        else DecoderStepFromPolicy(twin, weights_of(twin), _twin_tables(twin, c.steps), c.steps)
    )
    probe = make_probes(ProbeFactsFromPolicy(twin))[0]
    answer = decoder_answer(twin, probe.decoder, c.steps)

    exported = count_nodes(step)
    passes = run_passes(step, twin_step, target_passes(c, "decoder"), answer, "decoder step")
    # The copies share their tensors, and so the file of weights.
    decoder = step.clone()
    twin_decoder = decoder if is_own_twin(c) else twin_step.clone()
    more = run_passes(decoder, twin_decoder, _repetition(c), answer, "decoder")

    models = {"decoder": decoder, "decoder_step": step}
    save_graphs(models, folder, "decoder.onnx.data")
    check_graphs(folder, models)
    c.record_graphs(
        folder,
        {
            "decoder": GraphReportFromModel("decoder", decoder, exported, [*passes, *more]),
            "decoder_step": GraphReportFromModel("decoder_step", step, exported, passes),
        },
    )


def _repetition(c: Compilation) -> tuple[ir.passes.InPlacePass, ...]:
    """From one step to all."""
    if c.decoder == "loop":
        return (LoopDenoiseSteps(c.steps),)
    # Each step reads its own row of the tables, which is a constant then.
    return (UnrollDenoiseSteps(c.steps), FoldWeightExpressions(), RemoveUnused())


def _twin_tables(twin: FlowPolicy, num_steps: int) -> Weights:
    return {
        name: StoredTensor(tuple(table.shape), table.dtype, lambda table=table: table)
        for name, table in DenoiseStep(twin, num_steps).tables().items()
    }
