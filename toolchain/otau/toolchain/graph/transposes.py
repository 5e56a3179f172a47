"""Transposes that torch writes as reshapes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from otau.toolchain.graph.weights import constant_array

__all__ = ["StraightenKeyTransposes"]


class StraightenKeyTransposes(ir.passes.InPlacePass):
    """Write the transposed keys of `scaled_dot_product_attention` as one transpose.

    torch's decomposition flattens the leading axes by their run-time sizes, transposes and unflattens: nine
    nodes a layer of SigLIP, with every shape behind them unknown.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each `Reshape, Transpose, Reshape` that swaps the last two of four axes."""
        graph = model.graph
        found = [(node, keys) for node in graph if (keys := _keys_transposed_by(node)) is not None]
        for node, keys in found:
            source, axes = keys, (0, 1, 3, 2)
            before = keys.producer()
            if before is not None and before.op_type == "Transpose":
                first = before.attributes.get_ints("perm")
                source, axes = before.inputs[0], tuple(first[axis] for axis in axes)
            transposed = ir.node("Transpose", [source], {"perm": list(axes)})
            output = transposed.outputs[0]
            output.type, output.shape = keys.type, ir.Shape([keys.shape[axis] for axis in (0, 1, 3, 2)])
            graph.insert_before(node, transposed)
            node.outputs[0].replace_all_uses_with(output)
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No such detour is left."""
        for node in model.graph:
            if _keys_transposed_by(node) is not None:
                raise ir.passes.PostconditionError(f"{node.name} still goes by way of a flat shape")


def _keys_transposed_by(node: ir.Node) -> ir.Value | None:
    """The rank-4 value whose last two axes a `Reshape` swaps by way of rank 3; None for any other node."""
    if node.op_type != "Reshape" or node.outputs[0].is_graph_output():
        return None
    swap = node.inputs[0].producer()
    if swap is None or swap.op_type != "Transpose" or swap.attributes.get_ints("perm") != (0, 2, 1):
        return None
    flat = swap.inputs[0].producer()
    if flat is None or flat.op_type != "Reshape":
        return None
    keys = flat.inputs[0]
    to_flat, to_full = flat.inputs[1].producer(), node.inputs[1].producer()
    for shape in (to_flat, to_full):
        if shape is None or shape.op_type != "Concat":
            return None
    if keys.shape is None or len(keys.shape) != 4 or len(to_flat.inputs) != 3 or len(to_full.inputs) != 3:
        return None
    flattened, rows, columns = to_flat.inputs
    leading, last_but_one, last = to_full.inputs
    array = constant_array(flattened)
    matches = (
        array is not None
        and array.tolist() == [-1]
        and (last_but_one, last) == (columns, rows)
        and _is_shape_part(rows, keys, 2, 3)
        and _is_shape_part(columns, keys, 3, 4)
        and _is_shape_part(leading, keys, 0, 2)
    )
    return keys if matches else None


def _is_shape_part(value: ir.Value, whole: ir.Value, start: int, end: int) -> bool:
    """Whether a value is `Shape(whole)[start:end]` of a `whole` with four axes."""
    node = value.producer()
    if node is None or node.op_type != "Slice" or len(node.inputs) != 3:
        return False
    shape = node.inputs[0].producer()
    bounds = [constant_array(bound) for bound in node.inputs[1:]]
    if (
        shape is None
        or shape.op_type != "Shape"
        or shape.inputs[0] is not whole
        or None in map(_first, bounds)
    ):
        return False
    if shape.attributes.get_int("start", 0) != 0 or shape.attributes.get_int("end", None) is not None:
        return False
    return slice(*map(_first, bounds)).indices(4)[:2] == (start, end)


def _first(array) -> int | None:  # noqa: ANN001
    return None if array is None or array.size != 1 else int(array.flat[0])
