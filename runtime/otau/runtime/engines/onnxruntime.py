"""ONNX Runtime as an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]

from otau.runtime.engines.base import Engine, ResidentTensor
from otau.runtime.errors import EngineError, nearest_name
from otau.runtime.spec import TensorSpec

__all__ = ["OnnxRuntimeEngine"]

# Target of the compiler -> execution provider, and the device its outputs stay on.
_PROVIDERS = {"cpu": ("CPUExecutionProvider", "cpu"), "cuda": ("CUDAExecutionProvider", "cuda")}

# Beyond this, weights stay in the file that they are mapped from. ONNX Runtime would copy each into memory in
# the order its products like: 11 GB more for a full-size prefix.
_MAPPED_BYTES = 4 << 30

# ONNX Runtime's names of element types -> numpy's.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OnnxRuntimeEngine(Engine):
    """A session of ONNX Runtime on exactly one execution provider.

    Results come out of the provider's memory arena, which recycles the memory of results that nobody
    holds any more, so a loop that runs the same shapes allocates nothing after its first round.
    """

    def __init__(self, model: Path, session: Any, provider: str, device: str) -> None:
        """Use `OnnxRuntimeEngine.open`."""
        self.model = model
        self.provider = provider
        self.inputs = tuple(_tensor_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_tensor_spec(node) for node in session.get_outputs())
        self._session = session
        self._device = device

    @classmethod
    def open(cls, model: Path, *, target: str = "cpu", threads: int | None = None) -> OnnxRuntimeEngine:
        """Loads a model; see `Engine.open`."""
        if target not in _PROVIDERS:
            raise EngineError(
                "ONNX Runtime does not run on this target", got=target, fix=nearest_name(target, _PROVIDERS)
            )
        provider, device = _PROVIDERS[target]
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise _provider_error(model, provider, available)
        options = onnxruntime.SessionOptions()
        # Three sessions share the cores in turn: a pool must not spin on after its session has run.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        weights = model.with_name(f"{model.name}.data")
        if weights.is_file() and weights.stat().st_size > _MAPPED_BYTES:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            session = onnxruntime.InferenceSession(str(model), options, providers=[provider])
        except Exception as error:  # its exceptions share no base
            raise EngineError("ONNX Runtime cannot load the graph", where=model, got=error) from error
        # A provider that fails to start is replaced by the CPU with no more than a log line.
        if session.get_providers()[0] != provider:
            raise _provider_error(model, provider, session.get_providers())
        return cls(model, session, provider, device)

    def close(self) -> None:
        """Frees the session."""
        self._session = None

    def _run(self, inputs: Mapping[str, np.ndarray | ResidentTensor]) -> dict[str, ResidentTensor]:
        if self._session is None:
            raise EngineError("the engine is closed", where=self.model)
        binding = self._session.io_binding()
        try:
            for name, value in inputs.items():
                if isinstance(value, np.ndarray):
                    # On the CPU this wraps the array without a copy.
                    value = onnxruntime.OrtValue.ortvalue_from_numpy(
                        np.ascontiguousarray(value), self._device, 0
                    )
                binding.bind_ortvalue_input(name, value)
            for spec in self.outputs:
                binding.bind_output(spec.name, self._device)
            self._session.run_with_iobinding(binding)
            results = binding.get_outputs()
        except Exception as error:  # its exceptions share no base
            raise EngineError("the graph failed to run", where=self.model, got=error) from error
        return {spec.name: tensor for spec, tensor in zip(self.outputs, results, strict=True)}


def _tensor_spec(node: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else str(size) for size in node.shape)
    return TensorSpec(name=node.name, dtype=_DTYPES.get(node.type, node.type), shape=shape)


def _provider_error(model: Path, provider: str, have: list[str]) -> EngineError:
    return EngineError(
        "ONNX Runtime would not run on the provider asked for",
        where=model,
        expected=provider,
        got=", ".join(have),
        fix="install the onnxruntime package with that provider, or compile for another target;"
        " `otau doctor` shows what is here",
    )
