"""Products of the same input as one product."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from otau.toolchain.graph.weights import derived_weight, fresh_name, is_weight

__all__ = ["FuseSiblingProducts"]


class FuseSiblingProducts(ir.passes.InPlacePass):
    """Multiply an input by several weights at once: query, key and value; gate and up.

    The weights are put side by side when they are written, and the product is split. Each number is the
    sum of the same products; an engine may add them in another order.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every group of products whose weights nothing else uses."""
        siblings = _siblings(model.graph)
        for group in siblings:
            _fuse(model.graph, group)
        return ir.passes.PassResult(model, modified=bool(siblings))

    def ensures(self, model: ir.Model) -> None:
        """No such group is left."""
        left = _siblings(model.graph)
        if left:
            raise ir.passes.PostconditionError(f"not fused: {[node.name for node in left[0]]}")


def _siblings(graph: ir.Graph) -> list[list[ir.Node]]:
    groups: dict[tuple[ir.Value, ir.DataType], list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type != "MatMul" or not is_weight(node.inputs[1]):
            continue
        weight = node.inputs[1]
        if weight.shape.rank() == 2 and len(weight.uses()) == 1 and not node.outputs[0].is_graph_output():
            groups[node.inputs[0], weight.dtype].append(node)
    return [group for group in groups.values() if len(group) > 1]


def _fuse(graph: ir.Graph, group: list[ir.Node]) -> None:
    weights = [node.inputs[1] for node in group]
    tensors = [weight.const_value for weight in weights]
    widths = [int(weight.shape[1]) for weight in weights]
    fused = derived_weight(
        graph,
        "+".join(str(weight.name) for weight in weights),
        (int(weights[0].shape[0]), sum(widths)),
        weights[0].dtype,
        lambda: np.concatenate([tensor.numpy() for tensor in tensors], axis=1),
    )
    name = fresh_name(graph, f"widths_{'_'.join(map(str, widths))}")
    sizes = ir.Value(
        name=name,
        shape=ir.Shape([len(widths)]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(widths, dtype=ir.DataType.INT64, name=name),
    )
    graph.register_initializer(sizes)
    product = ir.node("MatMul", [group[0].inputs[0], fused])
    whole, first = product.outputs[0], group[0].outputs[0]
    whole.type = first.type
    if first.shape is not None:
        whole.shape = ir.Shape([*list(first.shape)[:-1], sum(widths)])
    parts = [ir.Value(shape=n.outputs[0].shape, type=n.outputs[0].type) for n in group]
    split = ir.node("Split", [whole, sizes], {"axis": -1}, outputs=parts)
    graph.insert_before(group[0], [product, split])
    for node, part in zip(group, parts, strict=True):
        node.outputs[0].replace_all_uses_with(part)
    graph.remove(group, safe=True)
    for weight in weights:
        graph.initializers.pop(weight.name)
