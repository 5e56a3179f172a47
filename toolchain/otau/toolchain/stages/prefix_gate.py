"""Judge the compiled prefix: K and V of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from safetensors.numpy import load_file, save_file

from otau.runtime.engines import engine_class
from otau.toolchain.compilation import LAYERS, Compilation
from otau.toolchain.gate.answer_file import read_prefix_reference
from otau.toolchain.gate.answers import PrefixAnswer
from otau.toolchain.gate.prefix import gate_prefix
from otau.toolchain.gate.reference import ProbeFactsFromPolicy
from otau.toolchain.stages.prefix_reference import REFERENCE
from otau.toolchain.thresholds import prefix_limit

__all__ = ["read_caches", "run"]

_CACHES = "caches.safetensors"


def run(c: Compilation, folder: Path) -> None:
    """Leave the compiled caches, and each layer's errors."""
    facts = ProbeFactsFromPolicy(c.checkpoint.empty)
    reference = read_prefix_reference(c.folder("prefix_reference") / REFERENCE, facts)
    kind = engine_class(c.target.engine)
    with kind.open(c.folder("prefix_graph") / "prefix.onnx", target=c.target.name) as engine:
        verdict = gate_prefix(engine, reference, prefix_limit(c.precision, c.allow))
    c.record_gates(folder, [verdict.gate])
    (folder / LAYERS).write_bytes(msgspec.json.encode(verdict.layers))
    _write_caches(folder / _CACHES, verdict.caches)


def read_caches(folder: Path) -> dict[str, PrefixAnswer]:
    """The compiled caches by probe."""
    tensors = load_file(folder / _CACHES)
    names = {name.partition("/")[0] for name in tensors}
    return {
        name: PrefixAnswer(tensors[f"{name}/keys"], tensors[f"{name}/values"], tensors[f"{name}/mask"])
        for name in names
    }


def _write_caches(path: Path, caches: Mapping[str, PrefixAnswer]) -> None:
    tensors = {}
    for name, cache in caches.items():
        tensors |= {f"{name}/keys": cache.keys, f"{name}/values": cache.values, f"{name}/mask": cache.mask}
    save_file(tensors, path)
