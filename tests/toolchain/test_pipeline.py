"""The compiler as a whole: what is wrong stops it, and then nothing is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from otau.runtime import Bundle, Observation, Policy
from otau.runtime.errors import CheckpointError, GateError, UsageError
from otau.toolchain.compilation import Compilation
from otau.toolchain.compilation_report import compilation_report
from otau.toolchain.graph.programs import DenoiseStep
from otau.toolchain.pipeline import compile_bundle
from otau.toolchain.stages import decoder_graph, fold, graphs, intake, prefix_graph

New = Callable[..., Compilation]
Tiny = Callable[[str], Path]


def damage_weight(model: ir.Model) -> None:
    """Scale the largest weight of a graph by 1.0001."""
    weight = max(model.graph.initializers.values(), key=lambda value: value.const_value.size)
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.0001), name=weight.name)


def swap_keys_and_values(model: ir.Model) -> None:
    """Right shapes, where sizes agree, and wrong contents."""
    first, second = model.graph.outputs[0], model.graph.outputs[1]
    model.graph.outputs[0], model.graph.outputs[1] = second, first
    first.name, second.name = second.name, first.name


@pytest.mark.parametrize(
    ("stage", "graph", "damage", "failing"),
    [
        (prefix_graph, "prefix", damage_weight, "prefix"),
        (decoder_graph, "decoder", damage_weight, "decoder"),
        (decoder_graph, "decoder_step", damage_weight, "decoder_step"),
        (prefix_graph, "ingest", swap_keys_and_values, "decoder, decoder_step, actions"),
    ],
)
def test_a_damaged_graph_leaves_no_bundle(
    tiny: Tiny,
    new_compilation: New,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: Any,
    graph: str,
    damage: Callable[[ir.Model], None],
    failing: str,
) -> None:
    save = stage.save_graphs

    def save_damaged(models: dict[str, ir.Model], *rest: Any) -> int:
        damage(models[graph])
        return save(models, *rest)

    monkeypatch.setattr(stage, "save_graphs", save_damaged)
    c = new_compilation(tiny("pi05"), tmp_path / "bundle", cache=tmp_path / "cache")
    with pytest.raises(GateError) as caught:
        compile_bundle(c)
    assert caught.value.exit_code == 1
    assert failing in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert any(not gate["passed"] for gate in compilation_report(c)["gates"])


def test_the_fold_gate_sees_a_wrong_table(
    tiny: Tiny, new_compilation: New, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ShiftedSchedule(DenoiseStep):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.schedule = self.schedule.roll(1, 0)

    monkeypatch.setattr(fold, "DenoiseStep", ShiftedSchedule)
    with pytest.raises(GateError, match="fold failed"):
        compile_bundle(new_compilation(tiny("pi05"), tmp_path / "bundle", cache=tmp_path / "cache"))


def test_a_bundle_that_was_there_survives_a_failed_compilation(
    compiled: Callable[..., Compilation],
    tiny: Tiny,
    new_compilation: New,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = Path(shutil.copytree(compiled(tiny("pi05")).destination, tmp_path / "bundle"))
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}

    def fail(c: Compilation, folder: Path) -> None:
        raise CheckpointError("made to fail")

    monkeypatch.setattr(intake, "run", fail)
    with pytest.raises(CheckpointError, match="made to fail"):
        compile_bundle(new_compilation(tiny("pi05"), bundle, cache=tmp_path / "cache"))
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_a_taken_destination_is_refused_before_anything_is_done(
    tiny: Tiny, new_compilation: New, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(UsageError, match="not a bundle"):
        compile_bundle(new_compilation(tiny("pi05"), tmp_path / "taken", cache=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_bundle_shares_its_bytes_with_the_cache(tiny: Tiny, compiled: Callable[..., Compilation]) -> None:
    """No second copy of the weights on disk."""
    c = compiled(tiny("pi05"))
    for name in ("prefix.onnx.data", "decoder.onnx.data"):
        assert (c.destination / name).stat().st_ino == c.bundle_files()[name].stat().st_ino


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_in_16_bits(
    tiny: Tiny, compiled: Callable[..., Compilation], new_compilation: New, tmp_path: Path, precision: str
) -> None:
    whole = compiled(tiny("pi05"))
    c = new_compilation(tiny("pi05"), tmp_path / "bundle", precision=precision)
    compile_bundle(c)
    sizes = [(folder / "prefix.onnx.data").stat().st_size for folder in (c.destination, whole.destination)]
    assert sizes[0] < 0.75 * sizes[1]
    report = json.loads((c.destination / "report.json").read_text())
    assert report["precision"] == precision
    with Policy.open(c.destination) as rounded, Policy.open(whole.destination) as exact:
        noise = np.random.default_rng(0).standard_normal((10, 8)).astype(np.float32)
        pictures = {name: np.zeros((56, 56, 3), np.uint8) for name in ("camera0", "camera1")}
        observation = Observation(images=pictures, state=np.zeros(8, np.float32), prompt="lift the cube")
        first, second = (p.infer(observation, noise=noise).normalised for p in (rounded, exact))
    assert 0 < np.abs(first - second).max() < 0.1


def test_an_unrolled_decoder_proved_on_a_narrow_twin(
    tiny: Tiny,
    compiled: Callable[..., Compilation],
    new_compilation: New,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A small policy would be its own twin.
    monkeypatch.setattr(graphs, "_OWN_TWIN", 0)
    c = new_compilation(tiny("pi0"), tmp_path / "bundle", decoder="unrolled", cache=tmp_path / "cache")
    compile_bundle(c)
    looped = compiled(tiny("pi0")).destination
    assert "Loop" in operators(looped / "decoder.onnx")
    assert "Loop" not in operators(c.destination / "decoder.onnx")
    passed = {gate.name for gate in Bundle.open(c.destination).manifest.gates if gate.passed}
    assert passed == {"prefix", "fold", "decoder", "decoder_step", "actions"}
    assert operators(looped / "decoder_step.onnx") == operators(c.destination / "decoder_step.onnx")


def operators(graph: Path) -> set[str]:
    return {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node}
