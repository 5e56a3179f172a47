"""Passes, patches and the export itself."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from otau.toolchain.graph.export import DecoderStepFromProgram
from otau.toolchain.graph.loop import LoopDenoiseSteps
from otau.toolchain.graph.patches import PATCHES, Patch, applied
from otau.toolchain.graph.programs import DenoiseStep
from otau.toolchain.graph.simplify import FoldWeightTransposes, count_nodes, count_parameters, simplify
from otau.toolchain.intake import load_checkpoint


def model_of(*nodes: ir.Node, inputs, outputs, initializers=()) -> ir.Model:
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=list(nodes),
        initializers=list(initializers),
        opset_imports={"": 20},
        name="test",
    )
    return ir.Model(graph, ir_version=10)


def value(name: str, shape: list, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, inputs)


def test_a_weights_transpose_is_folded_and_others_are_left() -> None:
    x, weight = value("x", ["B", 3]), np.arange(15, dtype=np.float32).reshape(5, 3)
    w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    w.shape, w.type = ir.Shape([5, 3]), ir.TensorType(ir.DataType.FLOAT)
    turned = ir.node("Transpose", [w], {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turned.outputs[0]])
    out = ir.node("Transpose", [product.outputs[0]], {"perm": [1, 0]}, outputs=[value("y", [5, "B"])])
    model = model_of(turned, product, out, inputs=[x], outputs=[out.outputs[0]], initializers=[w])
    given = np.ones((2, 3), np.float32)
    before = run(model, x=given)

    FoldWeightTransposes()(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Transpose"]
    assert np.array_equal(run(model, x=given)[0], before[0])


def step_model() -> ir.Model:
    """x_next = x + step + (k + 1), where k + 1 does not depend on x or step."""
    x, k = value("x", ["B"]), value("k", ["B"])
    step = value("step", [], ir.DataType.INT64)
    one = ir.Value(name="one", const_value=ir.tensor(np.float32(1), name="one"))
    one.shape, one.type = ir.Shape([]), ir.TensorType(ir.DataType.FLOAT)
    number = ir.node("Cast", [step], {"to": int(ir.DataType.FLOAT)})
    shifted = ir.node("Add", [k, one])
    moved = ir.node("Add", [x, number.outputs[0]])
    out = ir.node("Add", [moved.outputs[0], shifted.outputs[0]], outputs=[value("x_next", ["B"])])
    return model_of(
        number, shifted, moved, out, inputs=[x, step, k], outputs=[out.outputs[0]], initializers=[one]
    )


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_loop_repeats_the_step_and_hoists_what_does_not_change(steps: int) -> None:
    model = step_model()
    LoopDenoiseSteps(steps)(model)
    assert [node.op_type for node in model.graph] == ["Add", "Loop"]
    noise, k = np.array([10.0, 20.0], np.float32), np.array([1.0, 2.0], np.float32)
    (actions,) = run(model, noise=noise, k=k)
    assert np.allclose(actions, noise + sum(range(steps)) + steps * (k + 1))


def test_the_loop_refuses_what_is_not_a_step() -> None:
    model = step_model()
    LoopDenoiseSteps(2)(model)
    with pytest.raises(ir.passes.PreconditionError):
        LoopDenoiseSteps(2)(model)


@pytest.mark.parametrize("policy", ["pi05", "pi0"])
def test_simplify_and_loop_keep_the_decoders_numbers(tiny: Callable[[str], Path], policy: str) -> None:
    module = load_checkpoint(tiny(policy)).load()
    model = DecoderStepFromProgram(DenoiseStep(module, 4))
    exported = count_nodes(model)
    simplify(model)
    assert count_nodes(model) < exported / 2
    parameters = count_parameters(model)
    step_nodes = count_nodes(model)
    LoopDenoiseSteps(4)(model)
    assert count_parameters(model) == parameters
    assert count_nodes(model) == step_nodes + 2, "one loop and its condition"
    assert {value.name for value in model.graph.inputs} >= {"noise", "prefix_mask", "key_0", "value_1"}


def test_every_patch_has_its_reason() -> None:
    """None is needed today: all other tests export unpatched. One to come brings its failing test."""
    assert PATCHES == ()


def test_patches_are_undone() -> None:
    library = types.SimpleNamespace(a=1, b=2)
    patches = [Patch(library, "a", 10, "why", "issue"), Patch(library, "b", 20, "why", "issue")]
    with applied(patches):
        assert (library.a, library.b) == (10, 20)
    assert (library.a, library.b) == (1, 2)


def test_patches_are_undone_after_an_error_and_after_a_bad_patch() -> None:
    library = types.SimpleNamespace(a=1)
    good = Patch(library, "a", 10, "why", "issue")

    def export_that_fails() -> None:
        with applied([good]):
            raise RuntimeError("export failed")

    def apply_a_patch_that_upstream_outgrew() -> None:
        with applied([good, Patch(library, "gone", 1, "why", "issue")]):
            pytest.fail("a patch of something that is not there must not apply")

    with pytest.raises(RuntimeError):
        export_that_fails()
    assert library.a == 1
    with pytest.raises(AttributeError):
        apply_a_patch_that_upstream_outgrew()
    assert library.a == 1
    assert not hasattr(library, "gone")
