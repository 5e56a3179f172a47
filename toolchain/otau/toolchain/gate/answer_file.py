"""References as files: in the compile cache, and in a bundle, for `otau verify`.

One safetensors file. What a bundle holds was written by a stranger, so nothing in it is believed: shape and
dtype of every tensor follow from the policy's facts, the file must have exactly those tensors, and that is
checked on the file's header, before any of them is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from otau.runtime.errors import BundleError
from otau.toolchain.gate.answers import CONTROLS, NoiseFloor, PrefixAnswer, PrefixReference, Reference
from otau.toolchain.gate.probes import (
    FLOOR_PROBES,
    PROBE_NAMES,
    Probe,
    ProbeFacts,
    TensorShape,
    probe_shapes,
)

__all__ = [
    "PROBES_NAME",
    "read_prefix_reference",
    "read_reference",
    "write_prefix_reference",
    "write_reference",
]

PROBES_NAME = "probes.safetensors"
"""The reference's file in a bundle."""
_SHORT_DTYPES = {"F32": "float32", "F64": "float64", "I64": "int64", "BOOL": "bool"}
"""safetensors' names of the dtypes -> numpy's."""


def write_prefix_reference(path: Path, reference: PrefixReference) -> None:
    """Write the first half."""
    tensors = _probe_tensors(reference)
    for name, cache in reference.served.items():
        tensors |= {f"served/{name}/keys": cache.keys, f"served/{name}/values": cache.values}
    _write(path, tensors)


def write_reference(path: Path, reference: Reference) -> None:
    """Write both halves."""
    tensors = _probe_tensors(reference)
    tensors |= {f"actions/{name}": actions for name, actions in reference.actions.items()}
    tensors |= {f"controls/{name}": actions for name, actions in reference.controls.items()}
    floor = reference.floor
    for name in ("keys", "values", "actions", "seed_spread"):
        tensors[f"floor/{name}"] = np.array(getattr(floor, name), np.float64)
    _write(path, tensors)


def read_prefix_reference(path: Path, facts: ProbeFacts) -> PrefixReference:
    """Read the first half.

    Args:
        path: The file.
        facts: Of the policy that it must be of.

    Raises:
        BundleError: The file is damaged, or of another policy.
    """
    served = {
        f"served/{name}/{side}": _cache_shape(facts, name)
        for name in FLOOR_PROBES
        for side in ("keys", "values")
    }
    tensors = _read(path, _prefix_shapes(facts) | served)
    probes, caches = _probes(tensors, facts, path)
    halves = {
        name: PrefixAnswer(
            tensors[f"served/{name}/keys"], tensors[f"served/{name}/values"], caches[name].mask
        )
        for name in FLOOR_PROBES
    }
    return PrefixReference(facts, probes, caches, halves)


def read_reference(path: Path, facts: ProbeFacts) -> Reference:
    """Read both halves; see `read_prefix_reference`."""
    shapes = _prefix_shapes(facts)
    for name in PROBE_NAMES:
        rows = len(facts.row_delays(name))
        shapes[f"actions/{name}"] = ("float32", (rows, facts.chunk, facts.max_action_dim))
    for name in CONTROLS:
        shapes[f"controls/{name}"] = ("float32", (1, facts.chunk, facts.max_action_dim))
    shapes |= {f"floor/{name}": ("float64", (facts.layers,)) for name in ("keys", "values")}
    shapes |= {f"floor/{name}": ("float64", ()) for name in ("actions", "seed_spread")}
    tensors = _read(path, shapes)
    probes, caches = _probes(tensors, facts, path)
    floor = NoiseFloor(
        keys=tuple(tensors["floor/keys"].tolist()),
        values=tuple(tensors["floor/values"].tolist()),
        actions=float(tensors["floor/actions"]),
        seed_spread=float(tensors["floor/seed_spread"]),
    )
    if min(*floor.keys, *floor.values, floor.actions, floor.seed_spread) < 0:
        raise _refusal("a noise floor is negative", path, "at least 0", floor)
    return Reference(
        facts,
        probes,
        caches,
        {name: tensors[f"actions/{name}"] for name in PROBE_NAMES},
        {name: tensors[f"controls/{name}"] for name in CONTROLS},
        floor,
    )


def _probe_tensors(reference: PrefixReference | Reference) -> dict[str, np.ndarray]:
    tensors = {}
    for probe in reference.probes:
        for side, inputs in (("prefix", probe.prefix), ("decoder", probe.decoder)):
            tensors |= {f"{side}/{probe.name}/{name}": value for name, value in inputs.items()}
        cache = reference.caches[probe.name]
        parts = {"keys": cache.keys, "values": cache.values, "mask": cache.mask}
        tensors |= {f"cache/{probe.name}/{name}": value for name, value in parts.items()}
    return tensors


def _write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, path)


def _cache_shape(facts: ProbeFacts, probe: str) -> TensorShape:
    return "float32", (facts.layers, 1, facts.prefix_length(probe), facts.kv_heads, facts.head_dim)


def _prefix_shapes(facts: ProbeFacts) -> dict[str, TensorShape]:
    """What both files hold."""
    shapes: dict[str, TensorShape] = {}
    for probe in PROBE_NAMES:
        for side, inputs in zip(("prefix", "decoder"), probe_shapes(facts, probe), strict=True):
            shapes |= {f"{side}/{probe}/{name}": shape for name, shape in inputs.items()}
        cache = _cache_shape(facts, probe)
        shapes |= {f"cache/{probe}/{name}": cache for name in ("keys", "values")}
        shapes[f"cache/{probe}/mask"] = ("bool", (1, facts.prefix_length(probe)))
    return shapes


def _read(path: Path, expected: Mapping[str, TensorShape]) -> dict[str, np.ndarray]:
    """The tensors, which must be those expected, and finite."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if names != expected.keys():
                differing = sorted(names ^ expected.keys())
                raise _refusal(
                    "the probes are not those of this policy, or of another version of otau",
                    path,
                    f"{len(expected)} tensors",
                    f"{len(names)}; missing or unknown: {', '.join(map(repr, differing[:5]))}",
                )
            for name, shape in expected.items():
                given = file.get_slice(name)
                found = _SHORT_DTYPES.get(given.get_dtype(), given.get_dtype()), tuple(given.get_shape())
                if found != shape:
                    raise _refusal(
                        "a probe has another shape than the policy's", f"{path}: {name}", shape, found
                    )
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise _refusal("the probes cannot be read", path, "a safetensors file", error) from error
    for name, value in tensors.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise _refusal(
                "a probe has values that are not finite", f"{path}: {name}", "finite values", "NaN"
            )
    return tensors


def _probes(
    tensors: Mapping[str, np.ndarray], facts: ProbeFacts, path: Path
) -> tuple[tuple[Probe, ...], dict[str, PrefixAnswer]]:
    """Probes and caches, after a look at the values that a graph takes as positions in a table."""
    for name, value in tensors.items():
        side, _, key = name.partition("/")
        key = key.partition("/")[2]
        if (
            side == "prefix"
            and value.dtype == np.int64
            and not (0 <= value.min() <= value.max() < facts.vocab)
        ):
            given = f"{value.min()} to {value.max()}"
            raise _refusal("a token is not in the table", f"{path}: {name}", f"below {facts.vocab}", given)
    probes, caches = [], {}
    for probe in PROBE_NAMES:
        prefix, decoder = (
            {name: tensors[f"{side}/{probe}/{name}"] for name in inputs}
            for side, inputs in zip(("prefix", "decoder"), probe_shapes(facts, probe), strict=True)
        )
        delays = facts.row_delays(probe)
        if facts.real_time_chunking and tuple(decoder["delay"]) != delays:
            given = decoder["delay"].tolist()
            raise _refusal("a probe has other delays than the policy's", f"{path}: {probe}", delays, given)
        probes.append(Probe(probe, prefix, decoder))
        caches[probe] = PrefixAnswer(
            *(tensors[f"cache/{probe}/{name}"] for name in ("keys", "values", "mask"))
        )
    return tuple(probes), caches


def _refusal(what: str, where: object, expected: Any, got: Any) -> BundleError:
    return BundleError(
        what,
        where=where,
        expected=expected,
        got=got,
        fix="compile the checkpoint again, or verify with --checkpoint, which makes new probes",
    )
