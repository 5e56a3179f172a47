"""Weights in 16 bits, and graphs that share one file of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from otau.runtime.errors import CheckpointError
from otau.toolchain.graph.precision import StoreWeightsAs
from otau.toolchain.graph.save import INLINE_BYTES, PAGE, save_graphs
from otau.toolchain.graph.twin import run_graph

RANDOM = np.random.default_rng(0)
TEXT = """(int64[B] tokens, float[40,8] table, float[8,32] w, float[32] bias, float[3,8] schedule)
=> (float[B,32] y) {
    x = Gather(table, tokens)
    first = Constant<value_int = 0>()
    row = Gather(schedule, first)
    shifted = Add(x, row)
    a = MatMul(shifted, w)
    b = MatMul(x, w)
    c = Add(a, b)
    y = Add(c, bias)
}"""
TOKENS = {"tokens": np.array([3, 39])}


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    shapes = {"table": (40, 8), "w": (8, 32), "bias": (32,), "schedule": (3, 8)}
    return {name: RANDOM.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def graph(weights: dict[str, np.ndarray]) -> Callable[[], ir.Model]:
    """A graph whose weights are read from `weights`, which a test may change before."""

    def parse() -> ir.Model:
        model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> test {TEXT}')
        for name in weights:
            value = next(value for value in model.graph.inputs if value.name == name)
            model.graph.inputs.remove(value)
            value.const_value = ir.LazyTensor(
                lambda name=name: ir.Tensor(weights[name]), ir.DataType.FLOAT, value.shape, name=name
            )
            model.graph.register_initializer(value)
        return model

    return parse


@pytest.mark.parametrize(
    ("dtype", "numpy"), [(ir.DataType.FLOAT16, np.float16), (ir.DataType.BFLOAT16, ml_dtypes.bfloat16)]
)
def test_weights_are_rounded_and_nothing_else_is(graph, weights, dtype: ir.DataType, numpy: type) -> None:
    model = graph()
    StoreWeightsAs(dtype)(model)
    assert [n.op_type for n in model.graph].count("Cast") == 2, "one for two products, one behind the gather"
    stored = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert sorted(str(name).split(".")[0] for name, kind in stored.items() if kind == dtype) == ["table", "w"]
    got = run_graph(model, TOKENS)["y"]
    for name in ("table", "w"):
        weights[name] = weights[name].astype(numpy).astype(np.float32)
    np.testing.assert_array_equal(got, run_graph(graph(), TOKENS)["y"])


def test_a_weight_beyond_float16_is_named_and_bfloat16_takes_it(graph, weights, tmp_path: Path) -> None:
    weights["w"][3, 5] = -70_000
    half, brain = graph(), graph()
    StoreWeightsAs(ir.DataType.FLOAT16)(half)
    with pytest.raises(CheckpointError, match="float16") as caught:
        save_graphs({"half": half}, tmp_path, "weights.data")
    assert caught.value.where == "w"
    StoreWeightsAs(ir.DataType.BFLOAT16)(brain)
    assert np.isfinite(run_graph(brain, TOKENS)["y"]).all()


def test_only_16_bits_are_16_bits() -> None:
    with pytest.raises(ValueError, match="16 bits"):
        StoreWeightsAs(ir.DataType.FLOAT)


def test_two_graphs_share_one_file(graph, tmp_path: Path) -> None:
    one = graph()
    two = one.clone()
    expected = run_graph(one, TOKENS)["y"]
    written = save_graphs({"one": one, "two": two}, tmp_path, "weights.data")
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert files.keys() == {"one.onnx", "two.onnx", "weights.data"}
    assert written == sum(files.values())
    assert files["weights.data"] == PAGE + 8 * 32 * 4, "the table on the first page, w on the second"
    for name in ("one", "two"):
        path = tmp_path / f"{name}.onnx"
        onnx.checker.check_model(path, full_check=True)
        placed = {
            tensor.name: {
                entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"
            }
            for tensor in onnx.load(path, load_external_data=False).graph.initializer
            if tensor.external_data
        }
        assert placed == {
            "table": {"offset": 0, "length": 40 * 8 * 4},
            "w": {"offset": PAGE, "length": 8 * 32 * 4},
        }, f"below {INLINE_BYTES} bytes tensors are in the graph"
        session = onnxruntime.InferenceSession(path)
        np.testing.assert_allclose(session.run(None, TOKENS)[0], expected, rtol=1e-6, atol=1e-6)
    assert isinstance(one.graph.initializers["w"].const_value, ir.LazyTensor), "the model is as it was"


def test_a_graph_without_large_tensors_has_no_data_file(graph, tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[B] x) => (float[B] y) {y = Neg(x)}'
    )
    save_graphs({"ingest": model}, tmp_path, "weights.data")
    assert [path.name for path in tmp_path.iterdir()] == ["ingest.onnx"]
