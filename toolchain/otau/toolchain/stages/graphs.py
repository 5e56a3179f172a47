"""What the stages that make graphs share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import onnx
import onnx_ir as ir

from otau.toolchain.compilation import Compilation, GraphReport
from otau.toolchain.graph.passes import PassReport, graph_passes
from otau.toolchain.graph.twin import narrow_twin
from otau.toolchain.graph.weights import weight_bytes
from otau.toolchain.manifest import GraphSpecFromModel
from otau.training.policies import FlowPolicy

__all__ = ["GraphReportFromModel", "check_graphs", "is_own_twin", "target_passes", "twin_of"]

_OWN_TWIN = 100_000_000
"""Up to this many parameters a policy is its own twin."""

_STORED = {"fp32": None, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def is_own_twin(c: Compilation) -> bool:
    """Whether the passes run on the policy itself: small enough to run after each."""
    return sum(tensor.numel for tensor in c.checkpoint.weights.values()) <= _OWN_TWIN


def twin_of(c: Compilation) -> FlowPolicy:
    """The policy that the passes are proved on."""
    return c.checkpoint.load() if is_own_twin(c) else narrow_twin(c.checkpoint.empty)


def target_passes(c: Compilation, graph: str) -> tuple[ir.passes.InPlacePass, ...]:
    """The passes of a graph for the compilation's target and precision."""
    return graph_passes(fuse=graph in c.target.fused, store=_STORED[c.precision])


def GraphReportFromModel(  # noqa: N802 (<Target>From<Source>)
    name: str, model: ir.Model, exported: int, passes: Sequence[PassReport]
) -> GraphReport:
    """What is to be said of a graph."""
    return GraphReport(
        spec=GraphSpecFromModel(f"{name}.onnx", model),
        nodes_exported=exported,
        bytes=weight_bytes(model),
        passes=tuple(asdict(report) for report in passes),
    )


def check_graphs(folder: Path, names: Iterable[str]) -> None:
    """Check written graphs against the ONNX standard, shapes included."""
    for name in names:
        onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)
