"""What the attention of a compiled policy must look like, and a mask that 16 bits can hold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from otau.toolchain.graph.weights import constant_array, fresh_name, is_weight

__all__ = ["MASK_FILL", "BoundMaskFill", "RequireConcatRotary", "RequireNoHeadExpansion"]

MASK_FILL = -16384.0
"""Score of a key that may not be seen. Finite in float16 (largest 65504) where two masks and a score of up to
32736 meet in one sum, exact in 16 bits of either kind, and far enough below any score that its weight is an
exact zero: exp(-104) is zero in float32, so scores may spread over 16280."""

_BEYOND = -65504.0


class _Requirement(ir.passes.InPlacePass):
    """A pass that changes nothing, and fails on what it finds."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change nothing."""
        return ir.passes.PassResult(model, modified=False)


class RequireNoHeadExpansion(_Requirement):
    """Keys and values are not repeated for each query head.

    With one KV head (multi-query attention), queries are grouped instead: expanded, K and V would be eight
    times as large at full size, and read as often in every denoise step.
    """

    def ensures(self, model: ir.Model) -> None:
        """No operand of an attention product was repeated."""
        for graph in model.graphs():
            for product in graph:
                if product.op_type != "MatMul" or any(map(_is_stored, product.inputs)):
                    continue
                for operand in product.inputs:
                    for node in _origin(operand):
                        if _repeats(node):
                            raise ir.passes.PostconditionError(
                                f"{node.op_type} {node.name} repeats {operand.name} of {product.name}"
                            )


class RequireConcatRotary(_Requirement):
    """Rotary embeddings are two halves concatenated: no scatter, and no slice that skips elements."""

    def ensures(self, model: ir.Model) -> None:
        """No such node is left."""
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.op_type.startswith("Scatter"):
                raise ir.passes.PostconditionError(f"{node.op_type} {node.name}")
            if node.op_type == "Slice" and len(node.inputs) > 4 and node.inputs[4] is not None:
                steps = constant_array(node.inputs[4])
                if steps is None or (steps != 1).any():
                    raise ir.passes.PostconditionError(f"{node.name} slices with steps {steps}")


class BoundMaskFill(ir.passes.InPlacePass):
    """Lower the mask's fill to `MASK_FILL`, which float16 can hold.

    A masked weight stays an exact zero, so every row with a valid key keeps its bits. A row without one is
    defined and finite, but has other values: it belongs to padding, which nothing reads.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Give the masks bounded fills; other uses of the same constant keep it."""
        graph, uses = model.graph, _fill_uses(model)
        for value, mask_uses in uses.items():
            array = constant_array(value)
            name = fresh_name(graph, f"{value.name}_bounded")
            bounded = np.where(array <= _BEYOND, MASK_FILL, array).astype(array.dtype)
            fill = ir.Value(
                name=name, shape=value.shape, type=value.type, const_value=ir.Tensor(bounded, name=name)
            )
            graph.register_initializer(fill)
            for use in mask_uses:
                use.node.replace_input_with(use.idx, fill)
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(uses))

    def ensures(self, model: ir.Model) -> None:
        """No mask has a fill beyond float16."""
        left = [value.name for value in _fill_uses(model)]
        if left:
            raise ir.passes.PostconditionError(f"mask fills beyond float16: {left}")


_MOVES = frozenset({"Cast", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
_REPEATS = frozenset({"Expand", "Tile"})


def _is_stored(value: ir.Value | None) -> bool:
    """Whether a product's operand is a weight, cast or not."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Cast":
        return is_weight(producer.inputs[0])
    return is_weight(value)


def _origin(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that only moved or repeated a value, from it upwards."""
    pending, seen = [value], set()
    while pending:
        node = pending.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node.op_type in _MOVES | _REPEATS or node.op_type in ("Gather", "Mul"):
            pending.append(node.inputs[0])
        elif node.op_type == "Concat":
            pending.extend(v for v in node.inputs if v is not None)


def _repeats(node: ir.Node) -> bool:
    if node.op_type == "Concat":
        return len(set(node.inputs)) < len(node.inputs)
    if node.op_type == "Gather":
        indices = constant_array(node.inputs[1])
        return indices is not None and len(np.unique(indices)) < indices.size
    return node.op_type in _REPEATS


def _fill_uses(model: ir.Model) -> dict[ir.Value, list[ir.Usage]]:
    """Constants with elements beyond float16, and those of their uses that a softmax depends on."""
    found = {}
    for value in model.graph.initializers.values():
        array = constant_array(value)
        if array is not None and array.dtype.kind == "f" and (array <= _BEYOND).any():
            uses = [use for use in value.uses() if _reaches_softmax(use.node)]
            if uses:
                found[value] = uses
    return found


def _reaches_softmax(first: ir.Node) -> bool:
    """Whether a node takes part in making the mask of a softmax."""
    pending, seen = [first], {first}
    while pending:
        node = pending.pop()
        if node.op_type == "Softmax":
            return True
        if node.op_type in _MOVES | _REPEATS | {"Add", "Concat", "Where"}:
            users = {user for value in node.outputs for user in value.consumers()} - seen
            seen |= users
            pending.extend(users)
    return False
