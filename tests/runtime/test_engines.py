"""The engine protocol, on ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from otau.runtime.engines import engine_class
from otau.runtime.errors import EngineError, UsageError
from otau.runtime.spec import TensorSpec

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


@pytest.fixture
def adder(save_model):
    """z = x + y over (B, 3), and w = the rows of a table that `index` picks."""
    nodes = [
        helper.make_node("Add", ["x", "y"], ["z"]),
        helper.make_node("Gather", ["x", "index"], ["w"], axis=0),
    ]
    inputs = [("x", FLOAT, ["B", 3]), ("y", FLOAT, ["B", 3]), ("index", INT, [1])]
    return save_model(nodes, inputs, [("z", FLOAT, ["B", 3]), ("w", FLOAT, [1, 3])])


@pytest.fixture
def engine(adder):
    with engine_class("onnxruntime").open(adder, threads=1) as engine:
        yield engine


def arrays(**changes):
    base = {
        "x": np.ones((2, 3), np.float32),
        "y": np.full((2, 3), 2, np.float32),
        "index": np.array([0], np.int64),
    }
    return {name: value for name, value in (base | changes).items() if value is not None}


def test_it_runs_and_says_on_what(engine):
    assert engine.provider == "CPUExecutionProvider"
    assert engine.inputs[0] == TensorSpec(name="x", dtype="float32", shape=("B", 3))
    assert [spec.name for spec in engine.outputs] == ["z", "w"]
    np.testing.assert_array_equal(engine.run(arrays())["z"], np.full((2, 3), 3))


def test_results_are_not_changed_by_later_runs(engine):
    first = engine.run(arrays())["z"]
    for value in range(20):
        engine.run(arrays(x=np.full((2, 3), value, np.float32)))
    np.testing.assert_array_equal(first, np.full((2, 3), 3))


def test_resident_results_are_inputs_without_passing_the_host(engine):
    resident = engine.run_resident(arrays())
    assert list(resident["z"].shape()) == [2, 3]
    again = engine.run(arrays(x=resident["z"]))
    np.testing.assert_array_equal(again["z"], np.full((2, 3), 5))


def test_resident_results_are_seen_by_the_host_without_a_copy(engine):
    resident = engine.run_resident(arrays())["z"]
    assert np.shares_memory(resident.numpy(), resident.numpy())


def test_an_array_in_another_memory_order_is_fine(engine):
    turned = np.ascontiguousarray(np.arange(6, dtype=np.float32).reshape(2, 3).T).T
    np.testing.assert_array_equal(engine.run(arrays(x=turned))["z"], turned + 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "missing(.|\n)*x"),
        ({"indx": np.zeros(1, np.int64)}, "did you mean 'index'"),
        ({"x": np.ones((2, 3))}, "dtype(.|\n)*float32(.|\n)*float64"),
        ({"x": np.ones(3, np.float32)}, "rank"),
        ({"x": np.ones((2, 4), np.float32)}, "wrong shape"),
        ({"y": np.ones((5, 3), np.float32)}, "disagree(.|\n)*B = 2, as in 'x'"),
        ({"index": np.array([7], np.int64)}, "failed to run"),
        (
            {"index": np.array([0, 1], np.int64)},
            "wrong shape",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(engine, changes, message):
    with pytest.raises(EngineError, match=message):
        engine.run(arrays(**changes))


def test_a_closed_engine_does_not_run(adder):
    engine = engine_class("onnxruntime").open(adder)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(arrays())


def test_a_provider_that_is_not_here_is_refused(adder):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(EngineError, match="CUDAExecutionProvider(.|\n)*CPUExecutionProvider"):
        engine_class("onnxruntime").open(adder, target="cuda")


def test_a_provider_that_silently_fell_back_is_refused(adder, monkeypatch):
    import onnxruntime

    # ONNX Runtime lists the provider, then replaces it by the CPU: what it does without CUDA's libraries.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: real(path, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(EngineError, match="would not run on the provider"):
        engine_class("onnxruntime").open(adder, target="cuda")


def test_unknown_targets_and_engines_offer_the_nearest_name(adder):
    with pytest.raises(EngineError, match="did you mean 'cuda'"):
        engine_class("onnxruntime").open(adder, target="cudaa")
    with pytest.raises(UsageError, match="did you mean 'onnxruntime'"):
        engine_class("onnxruntimes")


@pytest.mark.parametrize("content", [b"", b"not a model", onnx.ModelProto().SerializeToString()])
def test_what_is_not_a_model_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineError, match="cannot load"):
        engine_class("onnxruntime").open(path)


@pytest.mark.parametrize(("bound", "mapped"), [(0, True), (1 << 20, False)])
def test_large_weights_stay_in_their_file(adder, monkeypatch, bound, mapped):
    """Otherwise ONNX Runtime holds them twice, which at full size is 11 GB more."""
    asked = []

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, key, value):
            asked.append(key)
            super().add_session_config_entry(key, value)

    adder.with_name(f"{adder.name}.data").write_bytes(b"weights")
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr("otau.runtime.engines.onnxruntime._MAPPED_BYTES", bound)
    with engine_class("onnxruntime").open(adder) as engine:
        np.testing.assert_array_equal(engine.run(arrays())["z"], np.full((2, 3), 3))
    assert ("session.disable_prepacking" in asked) == mapped
