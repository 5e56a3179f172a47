"""Writing graphs that share their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

__all__ = ["INLINE_BYTES", "PAGE", "save_graphs"]

INLINE_BYTES = 1024
"""Tensors below this are written into the graph itself."""

PAGE = 4096
"""Tensors in the data file begin on a page, so that an engine can map them."""


def save_graphs(models: Mapping[str, ir.Model], folder: Path, data_name: str) -> int:
    """Write graphs and one file of the weights that they read, each weight once.

    Weights are read, written and let go one after the other: the largest tensor is what it takes in memory.
    A weight is shared where graphs have the same tensor object, as copies of one graph do. The models are
    left as they were.

    Args:
        models: By the name of the graph's file, without `.onnx`.
        folder: Exists; gets `<name>.onnx` for each, and the data file if any tensor is large enough.
        data_name: Name of the data file in it.

    Returns:
        Bytes written.

    Raises:
        OSError: A file could not be written.
    """
    kept = {id(tensor): tensor for model in models.values() for tensor in _large_tensors(model)}
    placed: dict[int, tuple[int, int]] = {}
    if kept:
        with (folder / data_name).open("wb") as file:
            for key, tensor in kept.items():
                file.write(b"\0" * (-file.tell() % PAGE))
                start = file.tell()
                tensor.tofile(file)
                placed[key] = (start, file.tell() - start)
    for name, model in models.items():
        _save(model, folder / f"{name}.onnx", data_name, placed)
    files = [folder / f"{name}.onnx" for name in models] + ([folder / data_name] if kept else [])
    return sum(file.stat().st_size for file in files)


def _large_tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    return [
        value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value.nbytes >= INLINE_BYTES
    ]


def _save(model: ir.Model, file: Path, data_name: str, placed: Mapping[int, tuple[int, int]]) -> None:
    """Write a graph whose large tensors lie in the data file, and give the model its own tensors back."""
    values = [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.LazyTensor) or id(value.const_value) in placed
    ]
    own = [value.const_value for value in values]
    try:
        for value, tensor in zip(values, own, strict=True):
            if id(tensor) in placed:
                value.const_value = ir.ExternalTensor(
                    data_name,
                    *placed[id(tensor)],
                    tensor.dtype,
                    shape=tensor.shape,
                    name=str(value.name),
                    base_dir=file.parent,
                )
            else:
                # Read here, where an error of the weight's own comes out as it is.
                value.const_value = tensor.raw()
        ir.save(model, file)
    finally:
        for value, tensor in zip(values, own, strict=True):
            value.const_value = tensor
