"""Weights stored in half the bytes, arithmetic left as it is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from otau.runtime.errors import CheckpointError
from otau.toolchain.graph.weights import derived_weight, is_weight

__all__ = ["StoreWeightsAs"]

_NUMPY = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}

# Where an operator reads its weight. A table that `Gather` reads is cast behind the gather: a row a token.
_WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}


class StoreWeightsAs(ir.passes.InPlacePass):
    """Store float32 weights of products, convolutions and token tables in 16 bits, and cast them back.

    Norms, biases, position tables and the schedule of flow time stay as they are: they are small, and the
    schedule is a result, not a weight.
    """

    def __init__(self, dtype: ir.DataType, keep: frozenset[str] = frozenset({"schedule", "clean"})) -> None:
        """Take FLOAT16 or BFLOAT16, and the names of tables that are no weights."""
        super().__init__()
        if dtype not in _NUMPY:
            raise ValueError(f"weights are stored in 16 bits, not as {dtype}")
        self.dtype = dtype
        self.keep = keep

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Store each such weight once, with one cast for all its products."""
        stored: dict[ir.Value, ir.Value] = {}
        casts: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph):
            index = self._weight_of(node)
            if index is None:
                continue
            weight = node.inputs[index]
            if weight not in stored:
                stored[weight] = self._stored(model.graph, weight)
            if node.op_type == "Gather":
                node.replace_input_with(index, stored[weight])
                _cast_behind(node, weight.dtype, self.dtype)
                continue
            if weight not in casts:
                cast = ir.node("Cast", [stored[weight]], {"to": int(weight.dtype)})
                cast.outputs[0].shape, cast.outputs[0].type = weight.shape, weight.type
                model.graph.insert_before(node, cast)
                casts[weight] = cast.outputs[0]
            node.replace_input_with(index, casts[weight])
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(stored))

    def ensures(self, model: ir.Model) -> None:
        """No such weight is left in 32 bits."""
        for node in model.graph:
            index = self._weight_of(node)
            if index is not None:
                raise ir.passes.PostconditionError(f"{node.inputs[index].name} is still float32")

    def _weight_of(self, node: ir.Node) -> int | None:
        """Which input of a node is a weight to store in 16 bits, if any."""
        index = _WEIGHT_INPUT.get(node.op_type)
        if index is None or node.domain or not is_weight(node.inputs[index]):
            return None
        weight = node.inputs[index]
        wanted = weight.dtype == ir.DataType.FLOAT and weight.shape.rank() >= 2
        return index if wanted and weight.name not in self.keep else None

    def _stored(self, graph: ir.Graph, weight: ir.Value) -> ir.Value:
        tensor, name, dtype = weight.const_value, str(weight.name), _NUMPY[self.dtype]

        def convert() -> np.ndarray:
            given = tensor.numpy()
            with np.errstate(over="ignore"):
                converted = given.astype(dtype)
            # On the largest alone: a mask of a 2 GB table would be another half gigabyte.
            if not np.isfinite(converted.max()) or not np.isfinite(converted.min()):
                raise CheckpointError(
                    f"a weight is beyond the range of {dtype.name}",
                    where=name,
                    expected=f"at most {float(ml_dtypes.finfo(dtype).max):g} in magnitude",
                    got=float(np.abs(given).max()),
                    fix="compile with --precision bf16 or fp32",
                )
            return converted

        return derived_weight(graph, f"{name}.{dtype.name}", tuple(weight.shape.numpy()), self.dtype, convert)


def _cast_behind(node: ir.Node, dtype: ir.DataType, stored: ir.DataType) -> None:
    rows = node.outputs[0]
    cast = ir.node("Cast", [rows], {"to": int(dtype)})
    cast.outputs[0].shape, cast.outputs[0].type = rows.shape, rows.type
    rows.replace_all_uses_with(cast.outputs[0])
    cast.replace_input_with(0, rows)
    rows.type = ir.TensorType(stored)
    node.graph.insert_after(node, cast)
