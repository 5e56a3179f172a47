"""A gate that cannot fail is none: each is fed something damaged."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from otau.runtime.errors import CheckpointError, GateError
from otau.toolchain import pipeline
from otau.toolchain.pipeline import Compilation, compile_bundle

New = Callable[..., Compilation]


def damage_weight(model: ir.Model) -> None:
    """Scale the largest weight of a graph by 1.0001."""
    weight = max(model.graph.initializers.values(), key=lambda value: value.const_value.size)
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.0001), name=weight.name)


def swap_keys_and_values(model: ir.Model) -> None:
    """Transpose the batch and heads of one output: right shapes, where sizes agree, and wrong contents."""
    first, second = model.graph.outputs[0], model.graph.outputs[1]
    model.graph.outputs[0], model.graph.outputs[1] = second, first
    first.name, second.name = second.name, first.name


@pytest.mark.parametrize(
    ("graph", "damage", "failing"),
    [
        ("prefix", damage_weight, "prefix"),
        ("decoder", damage_weight, "decoder, actions"),
        ("ingest", swap_keys_and_values, "decoder, actions"),
    ],
)
def test_a_damaged_graph_leaves_no_bundle(
    tiny: Callable[[str], Path],
    new_compilation: New,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    graph: str,
    damage: Callable[[ir.Model], None],
    failing: str,
) -> None:
    def damaged_loop(c: Compilation) -> None:
        pipeline.loop(c)
        damage(c.models[graph])

    stages = tuple(damaged_loop if stage is pipeline.loop else stage for stage in pipeline.STAGES)
    monkeypatch.setattr(pipeline, "STAGES", stages)
    compilation = new_compilation(tiny("pi05"), tmp_path / "bundle")
    with pytest.raises(GateError) as caught:
        compile_bundle(compilation)
    assert caught.value.exit_code == 1
    assert failing in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert any(not gate["passed"] for gate in compilation.report()["gates"])


def test_the_fold_gate_sees_a_wrong_table(
    tiny: Callable[[str], Path], new_compilation: New, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = pipeline.DenoiseStep

    class ShiftedSchedule(exact):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            self.schedule = self.schedule.roll(1, 0)

    monkeypatch.setattr(pipeline, "DenoiseStep", ShiftedSchedule)
    with pytest.raises(GateError, match="fold failed"):
        compile_bundle(new_compilation(tiny("pi05"), tmp_path / "bundle"))


def test_a_bundle_that_was_there_survives_a_failed_compilation(
    compiled: Callable[..., Compilation],
    tiny: Callable[[str], Path],
    new_compilation: New,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = Path(shutil.copytree(compiled(tiny("pi05")).destination, tmp_path / "bundle"))
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}

    def fail(c: Compilation) -> None:
        raise CheckpointError("made to fail")

    monkeypatch.setattr(pipeline, "STAGES", (fail,))
    with pytest.raises(CheckpointError):
        compile_bundle(new_compilation(tiny("pi05"), bundle))
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert list(tmp_path.iterdir()) == [bundle]


def test_the_weights_are_let_go_before_the_engines_open(
    tiny: Callable[[str], Path], new_compilation: New, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full size policy and engines do not fit into 24 GiB side by side."""
    # In bfloat16, as a full-size checkpoint is: its float32 weights are in memory, not mapped from the file.
    folder = Path(shutil.copytree(tiny("pi05"), tmp_path / "checkpoint"))
    tensors = {key: t.bfloat16() for key, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    weights: set[int] = set()

    def remember(c: Compilation) -> None:
        # The VLM's. The expert's are so small here that constant folding keeps views of them.
        vlm = [*c.policy.vlm.parameters(), c.policy.embed_tokens.weight]
        weights.update(parameter.untyped_storage().data_ptr() for parameter in vlm)

    def look_back(c: Compilation) -> None:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
        alive = {t.untyped_storage().data_ptr() for t in tensors if t.device.type == "cpu"} & weights
        raise CheckpointError(f"{len(alive)} are alive")

    monkeypatch.setattr(pipeline, "STAGES", (pipeline.intake, remember, *pipeline.STAGES[1:7], look_back))
    with pytest.raises(CheckpointError, match="^0 are alive"):
        compile_bundle(new_compilation(folder, tmp_path / "bundle"))
    assert len(weights) > 15
