"""Weights of a graph that is being compiled: known by name, shape and dtype, read only when they are written.

A full-size policy has 13 GB of them. A pass may rename, drop, move and combine weights, and never reads one:
what it makes of a weight is a new lazy tensor that reads the old one when it is asked for. Every other
initializer (shapes, axes, mask fills, frequencies) is a constant, and constants are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

__all__ = [
    "constant_array",
    "derived_weight",
    "fresh_name",
    "is_constant",
    "is_weight",
    "weight_bytes",
    "weights_hidden",
]


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is an initializer that must not be read while a graph is compiled."""
    return value is not None and value.is_initializer() and isinstance(value.const_value, ir.LazyTensor)


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer that may be read."""
    return (
        value is not None
        and value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
        and not isinstance(value.const_value, ir.LazyTensor)
    )


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """The array of a constant; None for anything else, weights included."""
    return value.const_value.numpy() if is_constant(value) else None


def fresh_name(graph: ir.Graph, wish: str) -> str:
    """A name that no initializer of the graph has, `wish` if it is free."""
    name, number = wish, 0
    while name in graph.initializers:
        number += 1
        name = f"{wish}_{number}"
    return name


def derived_weight(
    graph: ir.Graph,
    name: str,
    shape: tuple[int, ...],
    dtype: ir.DataType,
    make: Callable[[], np.ndarray],
) -> ir.Value:
    """Add a weight that is made of others when it is read.

    Args:
        graph: Gets the new initializer.
        name: Wish for its name.
        shape: Of what `make` gives.
        dtype: Of what `make` gives.
        make: Reads the others and computes; called each time that the weight is read, so it must hold
            lazy tensors and no arrays.

    Returns:
        The new initializer.
    """
    name = fresh_name(graph, name)

    def evaluate() -> ir.TensorProtocol:
        array = np.asarray(make(), order="C")
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, and {shape} was announced")
        return ir.Tensor(array, dtype=dtype, name=name)

    value = ir.Value(
        name=name,
        shape=ir.Shape(shape),
        type=ir.TensorType(dtype),
        const_value=ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name),
    )
    graph.register_initializer(value)
    return value


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of a graph, each tensor counted once."""
    tensors = {
        id(value.const_value): value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
    }
    return sum(
        math.ceil(math.prod(tensor.shape.numpy()) * tensor.dtype.itemsize) for tensor in tensors.values()
    )


@contextmanager
def weights_hidden(model: ir.Model) -> Iterator[None]:
    """Take the weights' tensors out of a graph for a while, so that no library can read them.

    onnxscript's optimizer evaluates the transpose of any weight, whatever its size, and keeps the result.
    """
    hidden = [
        (value, value.const_value)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if is_weight(value)
    ]
    for value, _ in hidden:
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in hidden:
            value.const_value = tensor
