"""Judge the compiled prefix: K and V of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from safetensors.numpy import load_file, save_file

from otau.runtime.engines import engine_class
from otau.toolchain.compilation import LAYERS, Compilation
from otau.toolchain.gate.answer_file import read_prefix_reference
from otau.toolchain.gate.answers import NoiseFloor, PrefixAnswer, Reference
from otau.toolchain.gate.metrics import relative_rms
from otau.toolchain.gate.prefix import gate_prefix
from otau.toolchain.gate.probes import CONTROL_PROBE
from otau.toolchain.gate.reference import ProbeFactsFromPolicy
from otau.toolchain.stages.prefix_reference import REFERENCE
from otau.toolchain.thresholds import FP32, NOISE_FLOORS, GateLimit

__all__ = ["read_caches", "run"]

_CACHES = "caches.safetensors"


def run(c: Compilation, folder: Path) -> None:
    """Leave the compiled caches, and each layer's errors."""
    facts = ProbeFactsFromPolicy(c.checkpoint.empty)
    half = read_prefix_reference(c.folder("prefix_reference") / REFERENCE, facts)
    sound = half.caches[CONTROL_PROBE]
    v = sound.mask
    floor = NoiseFloor(
        keys=tuple(relative_rms(b[v], f[v]) for b, f in zip(half.rounded.keys, sound.keys, strict=True)),
        values=tuple(
            relative_rms(b[v], f[v]) for b, f in zip(half.rounded.values, sound.values, strict=True)
        ),
        actions=0.0,
        seed_spread=0.0,
    )
    reference = Reference(facts, half.probes, half.caches, {}, {}, floor)
    limit = FP32.prefix if c.precision == "fp32" else GateLimit(NOISE_FLOORS, 10.0 if c.allow else 1.0)
    kind = engine_class(c.target.engine)
    with kind.open(c.folder("prefix_graph") / "prefix.onnx", target=c.target.name) as engine:
        verdict = gate_prefix(engine, reference, limit)
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
