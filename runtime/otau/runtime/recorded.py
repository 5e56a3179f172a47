"""Recorded observations and results in safetensors files, for `otau infer` and for tests."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from otau.runtime.errors import UsageError, nearest_name
from otau.runtime.messages import excerpt
from otau.runtime.observation import ObservationBatch
from otau.runtime.permissions import make_as_readable_as_others
from otau.runtime.spec import Manifest

__all__ = ["RecordedInputs", "check_writable", "read_recorded", "write_tensors"]

_MAX_BYTES = 2 * 1024**3
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "BF16": np.uint16,  # widened to float32 below
}


@dataclass(frozen=True, eq=False)
class RecordedInputs:
    """Everything that a recorded inference was given."""

    batch: ObservationBatch
    noise: np.ndarray | None
    """(B, T, A) float."""
    action_prefix: np.ndarray | None
    """(B, k, a) raw."""
    delay: np.ndarray
    """(1,) or (B,) int [control ticks]."""


def read_recorded(
    path: str | os.PathLike[str], manifest: Manifest, *, prompt: str | None = None
) -> RecordedInputs:
    """Reads recorded inputs.

    Names may have the prefix `inputs/`; tensors named `outputs/...` are skipped. Floats of 16 and 64
    bits are read as float32.

    Args:
        path: A safetensors file with `state` (B, s), `image{i}` (the bundle's i-th camera), `noise`,
            `action_prefix`, `delay`, `dataset_index`, `num_steps`, and either `lang_tokens` with
            `lang_masks` or `prompt` (UTF-8 bytes as uint8, or an entry of the file's metadata).
        manifest: Of the bundle that will run them.
        prompt: Replaces the prompt or the token ids of the file.

    Raises:
        UsageError: The file cannot be read, or is not what the bundle takes.
    """
    where = Path(path)
    tensors, metadata = _read_tensors(where)
    cameras = {f"image{index}": camera.name for index, camera in enumerate(manifest.cameras)}
    known = [*cameras, *_OTHER_INPUTS]
    given: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        if key.startswith("outputs/"):
            continue
        name = key.removeprefix("inputs/")
        if name not in known:
            raise UsageError(
                "the recorded file has an input that the bundle does not take",
                where=where,
                got=key,
                fix=nearest_name(name, known),
            )
        if name in given:
            raise UsageError(
                "the recorded file has an input twice",
                where=where,
                got=name,
                fix=f"leave out {name} or inputs/{name}",
            )
        given[name] = value
    if "state" not in given or not given["state"].size:
        names = ", ".join(given) or "no input"
        raise UsageError(
            "the recorded file has no state",
            where=where,
            got=f"state of shape {given['state'].shape}" if "state" in given else names,
            fix="add the raw state, (B, s), under the name state",
        )
    _check_steps(given, manifest, where)
    text = prompt if prompt is not None else _recorded_prompt(given, metadata, where)
    if prompt is not None:
        given.pop("lang_tokens", None)
        given.pop("lang_masks", None)
    state = given["state"]
    batch = ObservationBatch(
        images={camera: given[name] for name, camera in cameras.items() if name in given},
        state=state,
        prompts=None if text is None or state.ndim == 0 else (text,) * len(state),
        tokens=given.get("lang_tokens"),
        token_masks=given.get("lang_masks"),
        dataset_index=given.get("dataset_index"),
        state_open_ids=given.get("state_open_ids"),
        state_close_ids=given.get("state_close_ids"),
    )
    return RecordedInputs(
        batch,
        noise=given.get("noise"),
        action_prefix=given.get("action_prefix"),
        delay=given.get("delay", np.zeros(1, np.int64)),
    )


_OTHER_INPUTS = (
    "action_prefix",
    "dataset_index",
    "delay",
    "lang_masks",
    "lang_tokens",
    "noise",
    "num_steps",
    "prompt",
    "state",
    "state_close_ids",
    "state_open_ids",
)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuses a path that `write_tensors` could not write, before work is put into its contents.

    Raises:
        UsageError: The path is something else than a file, as a directory or a device, or its
            directory is not there or not writable.
    """
    where = Path(path)
    # A rename would put a plain file in the place of a device or pipe.
    if (
        (where.exists() and not where.is_file())
        or not where.parent.is_dir()
        or not os.access(where.parent, os.W_OK)
    ):
        raise UsageError(
            "the results cannot be saved there",
            where=where,
            expected="a file in a directory that exists and may be written to",
        )


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file whole or not at all: under a temporary name first, then renamed.

    Raises:
        UsageError: It cannot be written.
    """
    from safetensors.numpy import save

    where = Path(path)
    check_writable(where)
    data = save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=where.parent, prefix=f".{where.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        make_as_readable_as_others(temporary)
        temporary.replace(where)
    except OSError as error:
        raise UsageError("the results cannot be saved there", where=where, got=error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _read_tensors(where: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the metadata of a safetensors file."""
    from safetensors import SafetensorError, deserialize

    if where.exists() and not where.is_file():
        # A device may have no end, and a pipe may never have a beginning.
        raise UsageError(
            "the recorded file cannot be read: it is not a file", where=where, expected="a regular file"
        )
    try:
        if where.stat().st_size > _MAX_BYTES:
            raise UsageError(
                "the recorded file is too large", where=where, expected=f"at most {_MAX_BYTES} bytes"
            )
        data = where.read_bytes()
        entries = deserialize(data)  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as error:
        raise UsageError(
            "the recorded file cannot be read as safetensors",
            where=where,
            got=error,
            fix="check the path, and that the file was copied whole",
        ) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: _array(name, entry, where) for name, entry in entries}, header.get("__metadata__") or {}


def _array(name: str, entry: Mapping[str, Any], where: Path) -> np.ndarray:
    """One tensor as an array, floats as float32."""
    kind = entry["dtype"]
    if kind not in _DTYPES:
        raise UsageError(
            f"the recorded tensor {name!r} has a dtype that is not read",
            where=where,
            expected=", ".join(_DTYPES),
            got=kind,
            fix="convert it to one of these",
        )
    try:
        array = np.frombuffer(entry["data"], _DTYPES[kind]).reshape(entry["shape"])
    except (ValueError, OverflowError) as error:
        # safetensors has no bound on the number of sizes, nor on one beside a zero.
        raise UsageError(
            f"the recorded tensor {name!r} has a shape that is not read",
            where=where,
            got=f"{len(entry['shape'])} sizes, the first {entry['shape'][:4]}",
        ) from error
    if kind == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _check_steps(given: Mapping[str, np.ndarray], manifest: Manifest, where: Path) -> None:
    """The number of Euler steps is compiled in, so a recording with another one is refused."""
    steps = given.get("num_steps")
    if steps is not None and (steps.size != 1 or steps.item() != manifest.flow.num_steps):
        raise UsageError(
            "the recorded file was made with another number of flow steps than the bundle",
            where=where,
            expected=f"num_steps {manifest.flow.num_steps}",
            got=f"num_steps {excerpt(steps)}",
            fix=f"compile again with --num-steps {steps.item() if steps.size == 1 else 'N'}",
        )


def _recorded_prompt(given: Mapping[str, np.ndarray], metadata: Mapping[str, Any], where: Path) -> str | None:
    """The prompt's text, of the tensor or else of the metadata."""
    value = given.get("prompt")
    if value is None:
        return metadata.get("prompt")
    try:
        if value.dtype != np.uint8:
            raise ValueError(f"dtype {value.dtype}")
        return value.tobytes().decode("utf-8")
    except ValueError as error:
        raise UsageError(
            "the recorded prompt is not text", where=where, expected="UTF-8 bytes as uint8", got=error
        ) from error
