"""Passes on small graphs: what each does, what it leaves alone or refuses, and that the numbers stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from otau.toolchain.graph.attention import BoundMaskFill, RequireConcatRotary, RequireNoHeadExpansion
from otau.toolchain.graph.fuse import FuseSiblingProducts
from otau.toolchain.graph.loop import LoopDenoiseSteps, UnrollDenoiseSteps
from otau.toolchain.graph.simplify import (
    ClearMetadata,
    FoldConstants,
    FoldWeightExpressions,
    RemoveUnused,
    ShareCommonSubexpressions,
    count_nodes,
)
from otau.toolchain.graph.transposes import StraightenKeyTransposes
from otau.toolchain.graph.twin import run_graph
from otau.toolchain.graph.weights import is_weight, weight_bytes

RANDOM = np.random.default_rng(0)


@pytest.fixture
def reads() -> list[str]:
    """Names of the weights that were read."""
    return []


@pytest.fixture
def graph(reads: list[str]) -> Callable[..., ir.Model]:
    """Parse a graph; inputs that are given as arrays become weights, which note when they are read."""

    def parse(text: str, **weights: np.ndarray) -> ir.Model:
        model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> test {text}')
        for name, array in weights.items():
            value = next(value for value in model.graph.inputs if value.name == name)
            model.graph.inputs.remove(value)

            def read(name: str = name, array: np.ndarray = array) -> ir.Tensor:
                reads.append(name)
                return ir.Tensor(array, name=name)

            dtype = ir.DataType.from_numpy(array.dtype)
            value.const_value = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(array.shape), name=name)
            model.graph.register_initializer(value)
        return model

    return parse


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape, np.float32)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def apply(model: ir.Model, *passes: ir.passes.PassBase, reads: list[str], **feeds: np.ndarray) -> None:
    """Run passes that must read no weight and keep every bit."""
    before = run_graph(model, feeds)
    reads.clear()
    for step in passes:
        step(model)
    assert reads == [], "a pass read weights"
    after = run_graph(model, feeds)
    assert after.keys() == before.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])


def test_constants_are_folded_and_weights_are_not_read(graph, reads) -> None:
    """onnxscript alone would evaluate both transposes and keep the results."""
    model = graph(
        """(float[B,3] x, float[5,3] w) => (float[B,5] y) {
            one = Constant<value_float = 1.0>()
            two = Add(one, one)
            t = Transpose<perm = [1, 0]>(w)
            p = MatMul(x, t)
            y = Mul(p, two)
        }""",
        w=normal(5, 3),
    )
    apply(model, FoldConstants(), reads=reads, x=normal(2, 3))
    assert operators(model) == ["Transpose", "MatMul", "Mul"]
    assert is_weight(model.graph.initializers["w"])


def test_what_is_made_of_weights_becomes_a_weight(graph, reads) -> None:
    model = graph(
        """(float[B,3] x, float[5,6] w, float[5] n) => (float[B,5] y, float[5,B] z) {
            zero = Constant<value_ints = [0]>()
            three = Constant<value_ints = [3]>()
            last = Constant<value_ints = [1]>()
            one = Constant<value_float = 1.0>()
            half = Slice(w, zero, three, last)
            t = Transpose<perm = [1, 0]>(half)
            p = MatMul(x, t)
            scale = Add(n, one)
            y = Mul(p, scale)
            z = Transpose<perm = [1, 0]>(y)
        }""",
        w=normal(5, 6),
        n=normal(5),
    )
    apply(model, FoldConstants(), FoldWeightExpressions(), reads=reads, x=normal(2, 3))
    assert operators(model) == ["MatMul", "Mul", "Transpose"], "the transpose of a result stays"
    assert {name for name in model.graph.initializers} == {"w.slice.transpose", "n.add"}
    assert weight_bytes(model) == (15 + 5) * 4


def test_a_weight_that_is_an_output_is_left(graph, reads) -> None:
    model = graph("(float[2,3] w) => (float[3,2] y) { y = Transpose<perm = [1, 0]>(w) }", w=normal(2, 3))
    apply(model, FoldWeightExpressions(), reads=reads)
    assert operators(model) == ["Transpose"]


def test_nodes_weights_and_inputs_that_nothing_needs_are_removed(graph, reads) -> None:
    model = graph(
        """(float[B,3] x, float[B] idle, float[3,3] w, float[3,3] dead) => (float[B,3] y) {
            y = MatMul(x, w)
            unused = MatMul(y, dead)
            also = Neg(idle)
        }""",
        w=normal(3, 3),
        dead=normal(3, 3),
    )
    apply(model, RemoveUnused(), reads=reads, x=normal(2, 3), idle=normal(2))
    assert operators(model) == ["MatMul"]
    assert list(model.graph.initializers) == ["w"]
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_an_unused_node_fails_the_check(graph) -> None:
    model = graph("(float[B] x) => (float[B] y) { y = Neg(x)\n z = Abs(x) }")
    with pytest.raises(ir.passes.PostconditionError, match="unused"):
        RemoveUnused().ensures(model)


def test_what_is_computed_twice_is_shared(graph, reads) -> None:
    model = graph(
        "(float[B] x) => (float[B] y) "
        "{ a = Neg(x)\n b = Neg(x)\n c = Abs(x)\n d = Add(a, b)\n y = Add(c, d) }"
    )
    apply(model, ShareCommonSubexpressions(), reads=reads, x=normal(3))
    assert sorted(operators(model)) == ["Abs", "Add", "Add", "Neg"]


def test_metadata_is_cleared_and_its_absence_checked(graph) -> None:
    model = graph("(float[B] x) => (float[B] y) { y = Neg(x) }")
    model.graph[0].metadata_props["pkg.torch.onnx.stack_trace"] = "File C:/policy.py"
    with pytest.raises(ir.passes.PostconditionError):
        ClearMetadata().ensures(model)
    ClearMetadata()(model)
    assert not model.graph[0].metadata_props


def test_products_of_the_same_input_are_fused(graph, reads) -> None:
    model = graph(
        """(float[B,4] x, float[4,6] q, float[4,2] k, float[4,2] v, float[2,2] other)
        => (float[B,6] a, float[B,2] b, float[B,2] c) {
            a0 = MatMul(x, q)
            b0 = MatMul(x, k)
            c0 = MatMul(x, v)
            c1 = MatMul(c0, other)
            a = Neg(a0)
            b = Neg(b0)
            c = Neg(c1)
        }""",
        q=normal(4, 6),
        k=normal(4, 2),
        v=normal(4, 2),
        other=normal(2, 2),
    )
    apply(model, FuseSiblingProducts(), reads=reads, x=normal(3, 4))
    assert operators(model) == ["MatMul", "Split", "MatMul", "Neg", "Neg", "Neg"]
    assert sorted(model.graph.initializers) == ["other", "q+k+v", "widths_6_2_2"]


def test_a_weight_with_another_use_is_not_fused(graph, reads) -> None:
    model = graph(
        "(float[B,4] x, float[4,4] q, float[4,4] k) => (float[B,4] y) "
        "{ a = MatMul(x, q)\n b = MatMul(x, k)\n c = MatMul(b, k)\n y = Add(a, c) }",
        q=normal(4, 4),
        k=normal(4, 4),
    )
    apply(model, FuseSiblingProducts(), reads=reads, x=normal(3, 4))
    assert operators(model) == ["MatMul", "MatMul", "MatMul", "Add"]


ATTENTION = """(float[B,8,T,4] q, float[B,1,4,P] k) => (float[B,8,T,P] y) {
    heads = Constant<value_ints = [1, 8, 1, 1]>()
    k8 = %s
    moved = Identity(k8)
    y = MatMul(q, moved)
}"""


@pytest.mark.parametrize(
    "repeat", ["Expand(k, heads)", "Tile(k, heads)", "Concat<axis = 1>(k, k, k, k, k, k, k, k)"]
)
def test_expanded_heads_are_refused(graph, repeat: str) -> None:
    with pytest.raises(ir.passes.PostconditionError, match="repeats moved"):
        RequireNoHeadExpansion()(graph(ATTENTION % repeat))


def test_grouped_queries_pass(graph) -> None:
    assert not RequireNoHeadExpansion()(graph(ATTENTION % "Identity(k)")).modified


@pytest.mark.parametrize(
    ("node", "accepted"),
    [
        ("ScatterND(x, indices, updates)", False),
        ("Slice(x, start, end, axis, two)", False),
        ("Slice(x, start, end, axis, one)", True),
        ("Slice(x, start, end, axis)", True),
        ("Concat<axis = 0>(x, x)", True),
    ],
)
def test_rotary_by_scatter_or_stride_is_refused(graph, node: str, accepted: bool) -> None:
    model = graph(
        f"""(float[6] x, int64[1,1] indices, float[1] updates) => (float[n] y) {{
            start = Constant<value_ints = [0]>()
            end = Constant<value_ints = [6]>()
            axis = Constant<value_ints = [0]>()
            one = Constant<value_ints = [1]>()
            two = Constant<value_ints = [2]>()
            y = {node}
        }}"""
    )
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if accepted:
        RequireConcatRotary()(model)
    else:
        with pytest.raises(ir.passes.PostconditionError):
            RequireConcatRotary()(model)


MASKED = """(float[B,T,P] scores, bool[B,T,P] mask) => (float[B,T,P] y, float[B,T,P] z) {
    zero = Constant<value_float = 0.0>()
    fill = Constant<value_float = -2.3819763e38>()
    bias = Where(mask, zero, fill)
    masked = Add(scores, bias)
    twice = Add(masked, bias)
    y = Softmax<axis = -1>(twice)
    z = Max(scores, fill)
}"""


def test_a_masks_fill_is_bounded_and_other_uses_keep_theirs(graph, reads) -> None:
    """Two masks are added here, scores are large, and one row is masked throughout."""
    scores, mask = normal(2, 5, 9) * 300, RANDOM.random((2, 5, 9)) < 0.6
    mask[:, :, 0] = True
    model = graph(MASKED)
    FoldConstants()(model)
    apply(model, BoundMaskFill(), reads=reads, scores=scores, mask=mask)
    assert sorted(model.graph.initializers) == ["fill", "fill_bounded", "zero"]
    mask[0, 0] = False
    assert np.isfinite(run_graph(model, {"scores": scores, "mask": mask})["y"]).all()
    weights = run_graph(model, {"scores": scores, "mask": mask})["y"]
    assert (weights[1][~mask[1]] == 0).all(), "a masked key has no weight at all"


def test_float16_stays_finite_with_the_bounded_fill_only(graph) -> None:
    scores, mask = (normal(2, 5, 9) * 300).astype(np.float16), RANDOM.random((2, 5, 9)) < 0.6
    mask[:, 0] = False
    results = {}
    for bounded in (False, True):
        model = graph(MASKED)
        FoldConstants()(model)
        if bounded:
            BoundMaskFill()(model)
        for value in model.graph.initializers.values():
            with np.errstate(over="ignore"):
                half = value.const_value.numpy().astype(np.float16)
            value.const_value, value.type = (
                ir.Tensor(half, name=value.name),
                ir.TensorType(ir.DataType.FLOAT16),
            )
        for value in (*model.graph.inputs[:1], *(node.outputs[0] for node in model.graph)):
            value.type = ir.TensorType(ir.DataType.FLOAT16)
        results[bounded] = run_graph(model, {"scores": scores, "mask": mask})["y"]
    assert np.isnan(results[False]).any(), "the control: float32's fill is infinite in float16"
    assert np.isfinite(results[True]).all()
    assert (results[True][:, 1:][~mask[:, 1:]] == 0).all()


DETOUR = """(float[B,6,5,4] k) => (float[B,6,4,5] y) {
    shape = Shape(k)
    minus = Constant<value_ints = [-1]>()
    minus2 = Constant<value_ints = [-2]>()
    zero = Constant<value_ints = [0]>()
    far = Constant<value_ints = [9223372036854775807]>()
    columns = Slice(shape, minus, far)
    rows = Slice(shape, minus2, minus)
    leading = Slice(shape, zero, minus2)
    flat = Concat<axis = 0>(minus, rows, columns)
    full = Concat<axis = 0>(leading, %s)
    a = Reshape(k, flat)
    b = Transpose<perm = [0, 2, 1]>(a)
    c = Reshape(b, full)
    y = Neg(c)
}"""


def test_a_transpose_by_way_of_reshapes_is_straightened(graph, reads) -> None:
    model = graph(DETOUR % "columns, rows")
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    apply(model, StraightenKeyTransposes(), reads=reads, k=normal(2, 6, 5, 4))
    assert operators(model) == ["Transpose", "Neg"]


def test_reshapes_that_do_something_else_are_left(graph) -> None:
    model = graph((DETOUR % "rows, columns").replace("float[B,6,4,5] y", "float[B,6,5,4] y"))
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    assert not StraightenKeyTransposes()(model).modified


STEP = """(float[B] x, int64 step, float[B] k, float[3,1] schedule) => (float[B] x_next) {
    number = Gather(schedule, step)
    shifted = Neg(k)
    moved = Add(x, number)
    x_next = Sub(moved, shifted)
}"""


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_loop_and_unrolled_steps_compute_the_same(graph, reads, steps: int) -> None:
    schedule = np.array([[0.5], [1.5], [2.5]], np.float32)
    noise, k = np.array([10.0, 20.0], np.float32), np.array([1.0, 2.0], np.float32)
    loop, unrolled = graph(STEP, schedule=schedule), graph(STEP, schedule=schedule)
    FoldConstants()(unrolled)  # which also tells every shape
    LoopDenoiseSteps(steps)(loop)
    assert operators(loop) == ["Neg", "Loop"], "what is the same in every step is outside"
    for step in (UnrollDenoiseSteps(steps), FoldWeightExpressions(), RemoveUnused()):
        step(unrolled)
    assert operators(unrolled) == ["Neg", *["Add", "Sub"] * steps], "the schedule's rows are constants"
    assert weight_bytes(unrolled) == 4 * steps
    assert reads == []
    expected = noise + sum([0.5, 1.5, 2.5][:steps]) + steps * k
    for model in (loop, unrolled):
        np.testing.assert_array_equal(run_graph(model, {"noise": noise, "k": k})["actions"], expected)


@pytest.mark.parametrize("repeat", [LoopDenoiseSteps, UnrollDenoiseSteps])
def test_what_is_not_a_step_is_refused(graph, repeat: type) -> None:
    model = graph(STEP, schedule=normal(3, 1))
    with pytest.raises(ir.passes.PreconditionError):
        repeat(0)(model)
    repeat(2)(model)
    with pytest.raises(ir.passes.PreconditionError):
        repeat(2)(model)


def test_a_loop_body_that_repeats_work_fails_the_check(graph) -> None:
    model = graph(STEP, schedule=normal(3, 1))
    LoopDenoiseSteps(2)(model)
    body = next(node for node in model.graph if node.op_type == "Loop").attributes["body"].as_graph()
    body.insert_before(body[0], ir.node("Neg", [model.graph.inputs[1]], name="again"))
    with pytest.raises(ir.passes.PostconditionError, match="again"):
        LoopDenoiseSteps(2).ensures(model)
    assert count_nodes(model) == 7
