"""Making a graph smaller without changing what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx.reference.ops
import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
from onnx_ir.passes import common

from otau.toolchain.graph.weights import (
    constant_array,
    derived_weight,
    is_constant,
    is_weight,
    weights_hidden,
)

__all__ = [
    "SIMPLIFY",
    "ClearMetadata",
    "FoldConstants",
    "FoldWeightExpressions",
    "RemoveUnused",
    "ShareCommonSubexpressions",
    "count_nodes",
    "count_parameters",
    "simplify",
]

# Larger than any constant of a policy that is no weight. onnxscript's own limits (8192 elements in, 262144
# out) would fold a small policy's graph further than a large one's.
_NO_LIMIT = 2**24

_FOLD_ROUNDS = 4


class FoldConstants(ir.passes.InPlacePass):
    """Compute what depends on constants alone; weights are hidden meanwhile, so that none is read."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold and rewrite until nothing changes."""
        with weights_hidden(model):
            onnxscript.optimizer.inline(model)
            for _ in range(_FOLD_ROUNDS):
                folded = onnxscript.optimizer.fold_constants(
                    model,
                    onnx_shape_inference=True,
                    input_size_limit=_NO_LIMIT,
                    output_size_limit=_NO_LIMIT,
                ).modified
                before = count_nodes(model)
                onnxscript.rewriter.rewrite(model)
                common.RemoveUnusedNodesPass()(model)
                if not folded and count_nodes(model) == before:
                    break
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            common.LiftSubgraphInitializersToMainGraphPass()(model)
            common.OutputFixPass()(model)
            common.NameFixPass()(model)
        _share_equal_constants(model.graph)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No node has constants for its only inputs, and none is a `Constant`."""
        for node in model.graph:
            if node.op_type == "Constant" or (node.inputs and _computable(node) and _all(node, is_constant)):
                raise ir.passes.PostconditionError(f"{node.op_type} {node.name} depends on constants alone")


class FoldWeightExpressions(ir.passes.InPlacePass):
    """Store a weight as it is used: transposed, sliced, reshaped, or with one added.

    torch exports a linear layer as `x @ Transpose(W)` and Gemma's norm as `x * (1 + w)`; an unrolled step
    reads a row of the schedule. What is made of a weight is computed when it is written.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each such node by a weight, sources before users."""
        graph = model.graph
        opset = graph.opset_imports[""]
        folded = 0
        for node in list(graph):
            if not _foldable(node):
                continue
            output = node.outputs[0]
            source = next((value for value in node.inputs if is_weight(value)), node.inputs[0])
            folded_weight = derived_weight(
                graph,
                f"{source.name}.{node.op_type.lower()}",
                tuple(output.shape.numpy()),
                output.dtype,
                _evaluation(node, opset),
            )
            output.replace_all_uses_with(folded_weight)
            graph.remove(node, safe=True)
            folded += 1
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=folded > 0)

    def ensures(self, model: ir.Model) -> None:
        """No such node is left."""
        for node in model.graph:
            if _foldable(node):
                raise ir.passes.PostconditionError(
                    f"{node.op_type} {node.name} depends on weights alone: {[v.name for v in node.inputs]}"
                )


class RemoveUnused(ir.passes.InPlacePass):
    """Remove nodes, initializers and inputs that no output depends on.

    The last VLM layer's attention and feed-forward and the final norm go here: the KV cache needs neither.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove nodes and initializers, then inputs."""
        modified = common.RemoveUnusedNodesPass()(model).modified
        unused = _unused_inputs(model.graph)
        for value in unused:
            model.graph.inputs.remove(value)
        return ir.passes.PassResult(model, modified=modified or bool(unused))

    def ensures(self, model: ir.Model) -> None:
        """Everything that is left is used."""
        idle = [
            *(node.name for node in model.graph if not any(_used(value) for value in node.outputs)),
            *(value.name for value in model.graph.initializers.values() if not _used(value)),
            *(value.name for value in _unused_inputs(model.graph)),
        ]
        if idle:
            raise ir.passes.PostconditionError(f"unused: {idle}")


class ShareCommonSubexpressions(ir.passes.InPlacePass):
    """Compute the same thing once."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Let equal nodes with equal inputs be one node."""
        return common.CommonSubexpressionEliminationPass()(model)


class ClearMetadata(ir.passes.InPlacePass):
    """Remove the exporter's notes: the stack trace of every node, with the paths of this machine."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clear metadata and documentation strings."""
        return common.ClearMetadataAndDocStringPass()(model)

    def ensures(self, model: ir.Model) -> None:
        """No node has a note."""
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.metadata_props or node.doc_string:
                raise ir.passes.PostconditionError(f"{node.name} has metadata")


SIMPLIFY: tuple[ir.passes.InPlacePass, ...] = (
    RemoveUnused(),
    FoldConstants(),
    FoldWeightExpressions(),
    ShareCommonSubexpressions(),
    RemoveUnused(),
    ClearMetadata(),
)
"""What every graph goes through first, in this order."""


def simplify(model: ir.Model) -> None:
    """Run `SIMPLIFY` on a graph, in place."""
    ir.passes.Sequential(*SIMPLIFY)(model)


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


_ELEMENTWISE = frozenset({"Add", "Sub", "Mul"})
_LAYOUT = frozenset({"Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


def _foldable(node: ir.Node) -> bool:
    """Whether a node makes a weight of weights and constants, exactly as any engine would."""
    if node.domain or not _all(node, lambda value: is_weight(value) or is_constant(value)):
        return False
    if node.outputs[0].is_graph_output():
        return False
    shape = node.outputs[0].shape
    known = shape is not None and shape.is_static() and node.outputs[0].dtype is not None
    return known and node.op_type in (_LAYOUT | _ELEMENTWISE)


def _evaluation(node: ir.Node, opset: int) -> Callable[[], np.ndarray]:
    """A function that computes a node's output; it keeps the tensors of the inputs, not the graph's nodes."""
    tensors = [value.const_value if value is not None else None for value in node.inputs]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    run = onnx.reference.ops.load_op("", node.op_type, opset).eval

    def evaluate() -> np.ndarray:
        return run(*(tensor.numpy() if tensor is not None else None for tensor in tensors), **attributes)

    return evaluate


def _all(node: ir.Node, accepts: Callable[[ir.Value], bool]) -> bool:
    return all(accepts(value) for value in node.inputs if value is not None)


def _computable(node: ir.Node) -> bool:
    return (
        not node.domain and len(node.outputs) == 1 and node.op_type not in ("ConstantOfShape", "Loop", "If")
    )


def _used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _unused_inputs(graph: ir.Graph) -> list[ir.Value]:
    return [value for value in graph.inputs if not _used(value)]


def _share_equal_constants(graph: ir.Graph) -> None:
    """Let constants of the same dtype, shape and bytes be one; weights are left alone."""
    kept: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for value in list(graph.initializers.values()):
        array = constant_array(value)
        if array is None or value.is_graph_output():
            continue
        first = kept.setdefault((value.const_value.dtype, array.shape, array.tobytes()), value)
        if first is not value:
            value.replace_all_uses_with(first)
            graph.initializers.pop(value.name)
