"""One compilation: what was asked, and where its stages left their results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from otau.runtime.manifest import STATS_NAME
from otau.runtime.spec import GateResult, GraphSpec, Manifest
from otau.toolchain.cache.store import CompileCache, Entry
from otau.toolchain.targets import Target

if TYPE_CHECKING:
    from otau.training.policies import Checkpoint

__all__ = ["ACTIONS", "CHECKPOINT", "LAYERS", "Compilation", "GraphReport", "StageRun"]

_GATES = "gates.json"
_GRAPHS = "graphs.json"
CHECKPOINT, LAYERS, ACTIONS = "checkpoint.json", "layers.json", "actions.json"
"""What intake, prefix_gate and decoder_gate have to say."""


@dataclass(frozen=True)
class StageRun:
    """A stage that has passed, now or earlier."""

    folder: Path
    """Its results."""
    entry: Entry
    cached: bool


class GraphReport(msgspec.Struct, frozen=True, kw_only=True):
    """A graph, and what the passes made of it."""

    spec: GraphSpec
    nodes_exported: int
    bytes: int
    """Of its weights as stored; graphs that share a file count them each."""
    passes: tuple[dict[str, Any], ...]


@dataclass
class Compilation:
    """What to compile, and what its stages have left so far."""

    source: Path
    destination: Path
    target: Target
    precision: str
    cache: CompileCache
    num_steps: int | None = None
    """None: the checkpoint's."""
    tokenizer: Path | None = None
    """None: the checkpoint's, if it has one."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `otau.toolchain.overrides.Overrides`."""
    decoder: Literal["loop", "unrolled"] = "loop"
    """How the decoder's graph holds its steps."""
    allow: Literal["seed"] | None = None
    """What a lower precision may cost beyond the noise floor."""
    command: str = ""

    runs: dict[str, StageRun] = field(default_factory=dict)
    gates: list[GateResult] = field(default_factory=list)
    manifest: Manifest | None = None
    up_to_date: bool = False
    """Whether the destination already held this bundle."""

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint as it is to be compiled; its weights are read when they are asked for."""
        from otau.toolchain.intake import load_checkpoint
        from otau.toolchain.overrides import Overrides, apply_overrides

        return apply_overrides(load_checkpoint(self.source, values=False), Overrides(**self.overrides))

    @property
    def steps(self) -> int:
        """Euler steps of the decoder."""
        return self.num_steps or self.checkpoint.config.num_steps

    def folder(self, stage: str) -> Path:
        """Where a stage that has passed left its results."""
        return self.runs[stage].folder

    def record_gates(self, folder: Path, gates: list[GateResult]) -> None:
        """Write what gates measured, and stop where one failed.

        Raises:
            GateError: A gate failed, or its control did not.
        """
        from otau.toolchain.gate.parity import refuse_failed

        self.gates += gates
        (folder / _GATES).write_bytes(msgspec.json.encode(gates))
        refuse_failed(gates)

    def record_graphs(self, folder: Path, graphs: Mapping[str, GraphReport]) -> None:
        """Write what is to be said of graphs."""
        (folder / _GRAPHS).write_bytes(msgspec.json.encode(dict(graphs)))

    def pass_stage(self, name: str, run: StageRun) -> None:
        """Note that a stage has passed, with what its gates measured if that was earlier."""
        self.runs[name] = run
        if run.cached and (run.folder / _GATES).is_file():
            self.gates += msgspec.json.decode((run.folder / _GATES).read_bytes(), type=list[GateResult])

    def graphs(self) -> dict[str, GraphReport]:
        """Every graph by name."""
        found: dict[str, GraphReport] = {}
        for run in self.runs.values():
            if (run.folder / _GRAPHS).is_file():
                data = (run.folder / _GRAPHS).read_bytes()
                found |= msgspec.json.decode(data, type=dict[str, GraphReport])
        return found

    def document(self, stage: str, name: str) -> Any:
        """A JSON document that a stage left."""
        return json.loads((self.folder(stage) / name).read_text(encoding="utf-8"))

    def tokenizer_json(self) -> Path | None:
        """The tokenizer that the bundle gets, if any."""
        path = self.folder("intake") / "tokenizer.json"
        return path if path.is_file() else None

    def bundle_files(self) -> dict[str, Path]:
        """The bundle's files that stages left, by name."""
        intake, decoder = self.folder("intake"), self.folder("decoder_reference")
        files = {STATS_NAME: intake / STATS_NAME, "probes.safetensors": decoder / "probes.safetensors"}
        for stage in ("prefix_graph", "decoder_graph"):
            files |= {path.name: path for path in self.folder(stage).glob("*.onnx*")}
        if tokenizer := self.tokenizer_json():
            files["tokenizer.json"] = tokenizer
        return files
