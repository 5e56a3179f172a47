"""A bundle judged again, on the machine where it runs.

With the answers that are stored in it, neither PyTorch nor the checkpoint is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from otau.runtime.bundle import Bundle
from otau.runtime.dependencies import require
from otau.runtime.engines import ENGINES, Engine, engine_class
from otau.runtime.errors import BundleError, MismatchError, UsageError, nearest_name
from otau.runtime.manifest import DECODER_STEP, GRAPHS
from otau.runtime.spec import GateResult, Manifest
from otau.toolchain.gate.answer_file import PROBES_NAME, read_reference
from otau.toolchain.gate.answers import Reference
from otau.toolchain.gate.decoder import gate_decoder
from otau.toolchain.gate.prefix import LayerErrors, gate_prefix
from otau.toolchain.gate.probes import ProbeFactsFromManifest
from otau.toolchain.thresholds import FP32, GateLimit, GateLimits, gate_limits

__all__ = ["Verification", "verify_bundle"]

_OUTPUTS = {
    "prefix": {"keys", "values", "prefix_mask"},
    "ingest": set[str](),
    "decoder": {"actions"},
    DECODER_STEP: {"x_next"},
}
"""What the gates read of each graph; of the ingest the decoder takes all."""


@dataclass(frozen=True, eq=False)
class Verification:
    """What was found."""

    manifest: Manifest
    providers: Mapping[str, str]
    """By graph: the provider that really ran it."""
    reference: Reference
    gates: list[GateResult]
    layers: LayerErrors

    def document(self) -> dict[str, Any]:
        """The result as one JSON document."""
        compiled = {gate.name: gate.value for gate in self.manifest.gates}
        return {
            "passed": all(gate.passed and gate.control_failed for gate in self.gates),
            "policy": self.manifest.policy,
            "target": self.manifest.target,
            "precision": self.manifest.precision,
            "num_steps": self.manifest.flow.num_steps,
            "engine": self.manifest.engine,
            "providers": dict(self.providers),
            "probes": {
                name: {
                    "prefix_tokens": int(cache.mask.shape[1]),
                    "delays": list(self.reference.facts.row_delays(name)),
                }
                for name, cache in self.reference.caches.items()
            },
            "gates": [
                msgspec.to_builtins(gate)
                | {
                    "headroom": gate.limit / gate.value if gate.value else None,
                    "when_compiled": compiled.get(gate.name),
                }
                for gate in self.gates
            ],
            "kv_error": msgspec.to_builtins(self.layers),
            "noise_floor": msgspec.to_builtins(self.reference.floor),
        }


def verify_bundle(
    path: Path,
    checkpoint: Path | None = None,
    seed: int = 2,
    on_stage: Callable[[str], None] = lambda name: None,
) -> Verification:
    """Run a bundle's gates again.

    Args:
        path: The bundle.
        checkpoint: Where it came from: new probes are made, and PyTorch answers them, one half of the policy
            after the other. None: the bundle's own probes and answers.
        seed: Of the new probes.
        on_stage: Told the name of each stage before it runs.

    Raises:
        UsageError: No bundle is there, or it has no probes.
        BundleError: It is damaged, or its probes are not those of its policy.
        CheckpointError: The checkpoint is not the policy that was compiled.
        MismatchError: An engine does not run here.
    """
    on_stage("verify the files")
    bundle = Bundle.open(path)
    if checkpoint is None:
        reference = _stored_reference(bundle)
    else:
        # PyTorch and all that reads checkpoints.
        renewal = require("otau.toolchain.gate.renewal", extra="toolchain")
        reference = renewal.new_reference(bundle, checkpoint, seed, on_stage)
    manifest = bundle.manifest
    limits = _limits(manifest, reference)
    providers = {}

    def opened(name: str, stack: ExitStack) -> Engine:
        on_stage(f"open the {name} graph")
        engine = stack.enter_context(_open(bundle, name))
        providers[name] = engine.provider
        return engine

    # One after the other: at full size the prefix alone takes 12 GB.
    with ExitStack() as stack:
        engine = opened("prefix", stack)
        on_stage("run the prefix")
        prefix = gate_prefix(engine, reference, limits.prefix)
    with ExitStack() as stack:
        names = [name for name in (*GRAPHS, DECODER_STEP) if name in manifest.graphs and name != "prefix"]
        engines = {name: opened(name, stack) for name in names}
        on_stage("run the decoder")
        decoder = gate_decoder(engines, reference, prefix.caches, limits, manifest.flow.num_steps)
    return Verification(manifest, providers, reference, [prefix.gate, *decoder.gates], prefix.layers)


def _stored_reference(bundle: Bundle) -> Reference:
    if PROBES_NAME not in bundle.manifest.files:
        raise UsageError(
            "this bundle has no probes to verify it with",
            where=bundle.path,
            expected=PROBES_NAME,
            fix="give the checkpoint that it was compiled from with --checkpoint, or compile it again",
        )
    return read_reference(bundle.file(PROBES_NAME), ProbeFactsFromManifest(bundle.manifest))


def _limits(manifest: Manifest, reference: Reference) -> GateLimits:
    """The limits that the bundle was compiled with, and never wider ones than this otau's own."""
    precision = manifest.precision
    widest = gate_limits(reference.floor, prefix=precision, decoder=precision, allow="seed")
    stated = {gate.name: gate for gate in manifest.gates}

    def limit(name: str) -> GateLimit:
        ours = {known.metric: known for known in (getattr(FP32, name), getattr(widest, name))}
        gate = stated.get(name)
        if gate is None or gate.metric not in ours:
            raise BundleError(
                f"the bundle does not say how its gate {name!r} is to be judged",
                where=f"{name} in the manifest's gates",
                expected=" or ".join(ours),
                got="no such gate" if gate is None else gate.metric,
                fix="compile the checkpoint again",
            )
        return GateLimit(gate.metric, min(gate.limit, ours[gate.metric].value))

    return GateLimits(prefix=limit("prefix"), decoder=limit("decoder"), actions=limit("actions"))


def _open(bundle: Bundle, name: str) -> Engine:
    """The engine that the bundle was compiled for, on one of its graphs."""
    manifest = bundle.manifest
    if manifest.engine not in ENGINES:
        raise MismatchError(
            "the bundle was compiled for an engine that this otau does not have",
            where=bundle.path,
            expected=", ".join(ENGINES),
            got=manifest.engine,
            fix=nearest_name(manifest.engine, ENGINES),
        )
    engine = engine_class(manifest.engine).open(bundle.graph(name), target=manifest.target)
    missing = _OUTPUTS[name] - {tensor.name for tensor in engine.outputs}
    if missing:
        engine.close()
        raise BundleError(
            f"the {name} graph lacks an output",
            where=engine.model,
            expected=", ".join(sorted(missing)),
            got=", ".join(tensor.name for tensor in engine.outputs),
            fix="compile the checkpoint again",
        )
    return engine
