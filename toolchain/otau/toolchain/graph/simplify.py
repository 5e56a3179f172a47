"""Making a graph smaller without changing what it computes."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer

__all__ = ["FoldWeightTransposes", "count_nodes", "count_parameters", "simplify"]


class FoldWeightTransposes(ir.passes.InPlacePass):
    """Store a weight as the product reads it.

    torch exports a linear layer as `x @ Transpose(W)`. General constant folding leaves weights of this size
    alone, or would hold them all twice; here the transposed weight is made when it is written.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every `Transpose` of a weight by the transposed weight."""
        graph = model.graph
        folded = 0
        for node in list(graph):
            if node.op_type != "Transpose" or not node.inputs[0].is_initializer():
                continue
            weight = node.inputs[0].const_value
            axes = node.attributes.get_ints("perm", tuple(reversed(range(weight.shape.rank()))))
            transposed = ir.Value(
                name=f"{node.inputs[0].name}_transposed_{folded}",
                shape=ir.Shape([weight.shape[axis] for axis in axes]),
                type=ir.TensorType(weight.dtype),
                const_value=_transposed(weight, axes),
            )
            graph.register_initializer(transposed)
            node.outputs[0].replace_all_uses_with(transposed)
            graph.remove(node, safe=True)
            folded += 1
        return ir.passes.PassResult(model, modified=folded > 0)

    def ensures(self, model: ir.Model) -> None:
        """No transposed weight is left."""
        for node in model.graph:
            if node.op_type == "Transpose" and node.inputs[0].is_initializer():
                raise ir.passes.PostconditionError(
                    f"{node.name} still transposes the weight {node.inputs[0].name}"
                )


def _transposed(weight: ir.TensorProtocol, axes: tuple[int, ...]) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(weight.numpy().transpose(axes))),
        dtype=weight.dtype,
        shape=ir.Shape([weight.shape[axis] for axis in axes]),
        name=weight.name,
    )


def simplify(model: ir.Model) -> None:
    """Fold constants, remove what is unused, and share what is computed twice; in place."""
    onnxscript.optimizer.optimize_ir(model)
    ir.passes.Sequential(
        FoldWeightTransposes(),
        ir.passes.common.RemoveUnusedNodesPass(),
        ir.passes.common.CommonSubexpressionEliminationPass(),
        # The exporter writes the stack trace of every node, with the paths of this machine.
        ir.passes.common.ClearMetadataAndDocStringPass(),
    )(model)


def count_nodes(model: ir.Model) -> int:
    """Nodes of a graph, those of its loop bodies included."""
    return sum(1 for _ in ir.traversal.RecursiveGraphIterator(model.graph))


def count_parameters(model: ir.Model) -> int:
    """Floating-point numbers stored in a graph."""
    return sum(
        math.prod(value.const_value.shape.numpy())
        for value in model.graph.initializers.values()
        if value.const_value.dtype.is_floating_point()
    )
