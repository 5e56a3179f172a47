"""The compiler: one visible list of stages from a checkpoint to a bundle.

Each stage takes the compilation and leaves its result in it. Nothing is written but into the temporary
folder of `BundleWriter`, which takes the bundle's place only when every stage has passed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import onnx
import onnx_ir as ir
from safetensors.numpy import save_file

from otau.runtime.bundle_writer import BundleWriter
from otau.runtime.engines import Engine, engine_class
from otau.runtime.errors import EngineError, OtauError
from otau.runtime.manifest import STATS_NAME
from otau.runtime.spec import GateResult, GraphSpec, Manifest
from otau.toolchain.gate.parity import gate_engines, judge, refuse_failed, relative_error
from otau.toolchain.gate.probes import Answer, Probe, answer, damaged, folded_actions, make_probes
from otau.toolchain.graph.export import DecoderStepFromProgram, IngestFromPolicy, PrefixFromPolicy
from otau.toolchain.graph.loop import LoopDenoiseSteps
from otau.toolchain.graph.programs import DenoiseStep
from otau.toolchain.graph.simplify import count_nodes, count_parameters, simplify
from otau.toolchain.intake import load_checkpoint
from otau.toolchain.manifest import GraphSpecFromModel, ManifestFromCheckpoint
from otau.toolchain.memory import peak_rss_mb, reset_peak_rss
from otau.toolchain.report import card
from otau.toolchain.targets import Target
from otau.toolchain.thresholds import THRESHOLDS
from otau.toolchain.tokenizer import has_tokenizer, read_tokenizer
from otau.training.policies import Checkpoint, FlowPolicy

__all__ = [
    "STAGES",
    "Compilation",
    "GraphReport",
    "StageReport",
    "compile_bundle",
    "engine",
    "export",
    "fold",
    "gate",
    "intake",
    "loop",
    "reference",
    "seal",
    "simplify_graphs",
    "write",
]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageReport:
    """What a stage cost."""

    name: str
    seconds: float
    cached: bool
    peak_rss_mb: float
    """Largest resident memory of the process during the stage [MiB]."""


@dataclass(frozen=True)
class GraphReport:
    """A graph before and after the passes."""

    nodes_exported: int
    nodes_final: int
    parameters: int


@dataclass
class Compilation:
    """The state of one compilation: what was asked, and what the stages have made so far."""

    source: Path
    destination: Path
    target: Target
    precision: str
    num_steps: int | None = None
    """None: the checkpoint's."""
    tokenizer: Path | None = None
    """None: the checkpoint's, if it has one."""

    checkpoint: Checkpoint | None = None
    policy: FlowPolicy | None = None
    program: DenoiseStep | None = None
    probes: list[Probe] = field(default_factory=list)
    sound: list[Answer] = field(default_factory=list)
    broken: list[Answer] = field(default_factory=list)
    models: dict[str, ir.Model] = field(default_factory=dict)
    nodes_exported: dict[str, int] = field(default_factory=dict)
    graphs: dict[str, GraphSpec] = field(default_factory=dict)
    tokenizer_json: str | None = None
    engines: dict[str, Engine] = field(default_factory=dict)
    gates: list[GateResult] = field(default_factory=list)
    stages: list[StageReport] = field(default_factory=list)
    manifest: Manifest | None = None
    writer: BundleWriter | None = None
    resources: ExitStack = field(default_factory=ExitStack)

    def report(self) -> dict[str, Any]:
        """The compilation as one JSON document."""
        return {
            "bundle": str(self.destination),
            "policy": self.checkpoint.config.type if self.checkpoint else None,
            "target": self.target.name,
            "precision": self.precision,
            "num_steps": self.num_steps,
            "stages": [asdict(stage) for stage in self.stages],
            "gates": [msgspec.to_builtins(gate) for gate in self.gates],
            "graphs": {
                name: asdict(GraphReport(self.nodes_exported[name], spec.nodes, spec.parameters))
                for name, spec in self.graphs.items()
            },
        }


def intake(c: Compilation) -> None:
    """Load the checkpoint strictly, and its tokenizer."""
    c.checkpoint = load_checkpoint(c.source)
    c.policy = c.checkpoint.load()
    c.num_steps = c.num_steps or c.checkpoint.config.num_steps
    folder = c.tokenizer or (c.source if has_tokenizer(c.source) else None)
    if folder is not None:
        c.tokenizer_json = read_tokenizer(folder, c.policy.dims.vocab)
    else:
        _LOG.warning("no tokenizer was found, so the bundle takes token ids; give one with --tokenizer DIR")


def reference(c: Compilation) -> None:
    """Ask the PyTorch policy, sound and damaged, what the gates will ask the engines."""
    policy = c.policy
    c.probes = make_probes(policy)
    c.sound = [answer(policy, probe, c.num_steps) for probe in c.probes]
    with damaged(policy):
        c.broken = [
            answer(policy, probe, c.num_steps, given) for probe, given in zip(c.probes, c.sound, strict=True)
        ]


def fold(c: Compilation) -> None:
    """Fold flow time to constants, and judge that against the policy."""
    c.program = DenoiseStep(c.policy, c.num_steps)
    folded = [folded_actions(c.program, probe, given) for probe, given in zip(c.probes, c.sound, strict=True)]

    def error(answers: list[Answer]) -> float:
        return max(relative_error(got, given.actions) for got, given in zip(folded, answers, strict=True))

    c.gates.append(judge("fold", THRESHOLDS[c.precision].actions, error, c.sound, c.broken))
    refuse_failed(c.gates)


def export(c: Compilation) -> None:
    """Export the three programs to ONNX."""
    policy = c.policy
    c.models = {
        "prefix": PrefixFromPolicy(policy),
        "ingest": IngestFromPolicy(policy),
        "decoder": DecoderStepFromProgram(c.program),
    }
    c.nodes_exported = {name: count_nodes(model) for name, model in c.models.items()}


def simplify_graphs(c: Compilation) -> None:
    """Fold constants, drop what is unused, share what is computed twice."""
    for model in c.models.values():
        simplify(model)


def loop(c: Compilation) -> None:
    """Put all denoise steps into one decoder graph."""
    LoopDenoiseSteps(c.num_steps)(c.models["decoder"])


def write(c: Compilation) -> None:
    """Write graphs, statistics and tokenizer, check the graphs, and let go of the policy's weights."""
    for name, model in c.models.items():
        file = c.writer.path / f"{name}.onnx"
        weights = f"{name}.onnx.data" if count_parameters(model) else None
        ir.save(model, file, external_data=weights)
        onnx.checker.check_model(file, full_check=True)
        c.graphs[name] = GraphSpecFromModel(file.name, model)
    save_file(c.checkpoint.statistics, c.writer.path / STATS_NAME)
    if c.tokenizer_json is not None:
        (c.writer.path / "tokenizer.json").write_text(c.tokenizer_json, encoding="utf-8")
    # The weights are in the graphs' files now, and the engines need the memory.
    c.policy.to("meta")
    c.models, c.program = {}, None


def engine(c: Compilation) -> None:
    """Open the target's engine on each graph, as the robot will."""
    kind = engine_class(c.target.engine)
    for name, spec in c.graphs.items():
        c.engines[name] = c.resources.enter_context(
            kind.open(c.writer.path / spec.file, target=c.target.name)
        )
        given = {tensor.name for tensor in c.engines[name].inputs}
        if given != {tensor.name for tensor in spec.inputs}:
            raise EngineError("the engine does not take the graph's inputs", where=name, got=sorted(given))


def gate(c: Compilation) -> None:
    """Judge the engines against the policy; a failed gate leaves no bundle."""
    c.gates += gate_engines(c.engines, c.probes, c.sound, c.broken, THRESHOLDS[c.precision])
    c.resources.close()
    refuse_failed(c.gates)


def seal(c: Compilation) -> None:
    """Write the card, the report and the manifest with every file's hash."""
    manifest = ManifestFromCheckpoint(
        c.checkpoint,
        target=c.target,
        precision=c.precision,
        num_steps=c.num_steps,
        tokenizer="tokenizer.json" if c.tokenizer_json is not None else None,
        graphs=c.graphs,
        gates=c.gates,
    )
    report = msgspec.json.format(msgspec.json.encode(c.report() | {"bundle": "."}), indent=2)
    (c.writer.path / "report.json").write_bytes(report + b"\n")
    (c.writer.path / "README.md").write_text(card(manifest), encoding="utf-8")
    c.manifest = c.writer.seal(manifest)


STAGES: tuple[Callable[[Compilation], None], ...] = (
    intake,
    reference,
    fold,
    export,
    simplify_graphs,
    loop,
    write,
    engine,
    gate,
    seal,
)
"""What a compilation does, in this order."""


def compile_bundle(c: Compilation, on_stage: Callable[[str], None] = lambda name: None) -> Manifest:
    """Run every stage.

    Args:
        c: What to compile; filled as the stages pass.
        on_stage: Told the name of each stage before it runs.

    Returns:
        The manifest of the bundle, which is at `c.destination`.

    Raises:
        OtauError: A stage refused its input or failed its gate; nothing is left at the destination.
    """
    with BundleWriter(c.destination) as c.writer, c.resources:
        for stage in STAGES:
            name = stage.__name__
            on_stage(name)
            reset_peak_rss()
            start = time.perf_counter()
            try:
                stage(c)
            except OtauError as error:
                if c.stages:
                    passed = ", ".join(done.name for done in c.stages)
                    error.where = f"{error.where or 'compilation'} (stage {name}, after {passed})"
                raise
            c.stages.append(StageReport(name, round(time.perf_counter() - start, 3), False, peak_rss_mb()))
    assert c.manifest is not None
    return c.manifest
