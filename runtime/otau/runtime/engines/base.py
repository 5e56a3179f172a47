"""What an engine is: a compiled graph that runs on one provider and says which."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from otau.runtime.errors import EngineError, nearest_name
from otau.runtime.spec import TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Engine", "ResidentTensor"]


class ResidentTensor(Protocol):
    """A tensor that stays where an engine computed it; another engine of that kind takes it as it is."""

    def numpy(self) -> np.ndarray:
        """The tensor on the host, without a copy where it is there already."""
        ...

    def shape(self) -> Sequence[int]:
        """Its shape."""
        ...


class Engine(ABC):
    """A graph ready to run. The public methods check; a subclass does the work in `_run` and `close`.

    Attributes:
        model: The ONNX model that the engine runs.
        inputs: Name, dtype and shape of each input, as the engine itself reports them.
        outputs: The same for the outputs.
        provider: The hardware back end that really runs the graph.
    """

    model: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    provider: str

    @classmethod
    @abstractmethod
    def open(cls, model: Path, *, target: str = "cpu", threads: int | None = None) -> Self:
        """Loads a model.

        Args:
            model: The ONNX file; its external data lies beside it.
            target: Where to run: a target of the compiler's.
            threads: Threads of one operator on the CPU; None lets the engine choose.

        Raises:
            EngineError: The model cannot be loaded, or would not run on the target asked for.
        """

    def run(self, inputs: Mapping[str, np.ndarray | ResidentTensor]) -> dict[str, np.ndarray]:
        """Runs the graph once; every result is the caller's own and no later run changes it.

        Args:
            inputs: Every input by name. An array must have the input's dtype and shape.

        Returns:
            Every output by name.

        Raises:
            EngineError: An input is missing, unknown or misshapen, or the graph failed.
        """
        return {name: tensor.numpy() for name, tensor in self.run_resident(inputs).items()}

    def run_resident(self, inputs: Mapping[str, np.ndarray | ResidentTensor]) -> dict[str, ResidentTensor]:
        """Like `run`, but the outputs stay where they are, to be the inputs of another engine."""
        self._check(inputs)
        return self._run(inputs)

    @abstractmethod
    def close(self) -> None:
        """Frees the graph; the engine cannot run afterwards. May be called twice."""

    @abstractmethod
    def _run(self, inputs: Mapping[str, np.ndarray | ResidentTensor]) -> dict[str, ResidentTensor]: ...

    def __enter__(self) -> Self:
        """The engine itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the engine."""
        self.close()

    def _check(self, inputs: Mapping[str, np.ndarray | ResidentTensor]) -> None:
        """Refuses inputs that are not the graph's, before the back end words it its own way."""
        names = [spec.name for spec in self.inputs]
        for name in inputs:
            if name not in names:
                raise EngineError(
                    "the graph has no such input", where=self.model, got=name, fix=nearest_name(name, names)
                )
        bound: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            if spec.name not in inputs:
                raise EngineError("an input of the graph is missing", where=self.model, expected=spec.name)
            value = inputs[spec.name]
            if isinstance(value, np.ndarray):
                self._check_array(spec, value, bound)

    def _check_array(self, spec: TensorSpec, value: np.ndarray, bound: dict[str, tuple[int, str]]) -> None:
        """Checks one array; `bound` remembers the size and the input that first set a dynamic dimension."""
        where = f"{self.model}, input {spec.name!r}"
        if value.dtype.name != spec.dtype:
            raise EngineError(
                "an input has the wrong dtype", where=where, expected=spec.dtype, got=value.dtype.name
            )
        shape = ", ".join(str(size) for size in spec.shape)
        if value.ndim != len(spec.shape):
            raise EngineError(
                "an input has the wrong rank", where=where, expected=f"({shape})", got=value.shape
            )
        for size, expected in zip(value.shape, spec.shape, strict=True):
            if isinstance(expected, str):
                first, setter = bound.setdefault(expected, (size, spec.name))
                if first != size:
                    raise EngineError(
                        "two inputs disagree about a dimension",
                        where=where,
                        expected=f"{expected} = {first}, as in {setter!r}",
                        got=value.shape,
                    )
            elif size != expected:
                raise EngineError(
                    "an input has the wrong shape", where=where, expected=f"({shape})", got=value.shape
                )
