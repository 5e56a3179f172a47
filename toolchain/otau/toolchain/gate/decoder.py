"""The gates of the decoder, of its single step, and of the whole chain. They run without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from otau.runtime.engines import Engine
from otau.runtime.spec import GateResult
from otau.toolchain.gate.answers import PrefixAnswer, Reference
from otau.toolchain.gate.metrics import action_rms, relative_error
from otau.toolchain.gate.parity import LARGEST, judge
from otau.toolchain.gate.probes import CONTROL_PROBE, Probe
from otau.toolchain.thresholds import MAX_RELATIVE, GateLimit, GateLimits

__all__ = ["ActionErrors", "DecoderVerdict", "gate_decoder"]

_ROWS = 4
"""Rows that are decoded at once: at full size each takes 38 MB of cache."""
_CHUNK_PROBE = "full"
"""The probe whose first row is shown."""


@dataclass(frozen=True, eq=False)
class ActionErrors:
    """Errors of the chain's actions in the true dimensions, normalised."""

    error: np.ndarray
    """(T, a) float64: the largest over probes and rows, relative to the probe's scale."""
    reference: np.ndarray
    """(T, a) one chunk: delay 0 of the probe `full`, by PyTorch."""
    compiled: np.ndarray
    """(T, a) the same chunk, compiled."""


@dataclass(frozen=True, eq=False)
class DecoderVerdict:
    """What the gates of the decoder and of the chain found."""

    gates: list[GateResult]
    actions: ActionErrors


def gate_decoder(
    engines: Mapping[str, Engine],
    reference: Reference,
    caches: Mapping[str, PrefixAnswer],
    limits: GateLimits,
    num_steps: int,
) -> DecoderVerdict:
    """Judge the decoder on the reference's caches, the single step, and the whole chain.

    Args:
        engines: `ingest` and `decoder`, and `decoder_step` where there is one.
        reference: The policy's answers.
        caches: What the compiled prefix made of the probes.
        limits: Of this bundle's precisions.
        num_steps: How often a single step is repeated.
    """
    ingest, decoder = engines["ingest"], engines["decoder"]

    def run_all(inputs: dict[str, np.ndarray]) -> np.ndarray:
        return decoder.run(inputs)["actions"]

    def run_steps(inputs: dict[str, np.ndarray]) -> np.ndarray:
        engine, x = engines["decoder_step"], inputs.pop("noise")
        for step in range(num_steps):
            x = engine.run({**inputs, "x": x, "step": np.array(step)})["x_next"]
        return x

    def decode(
        probe: Probe, cache: PrefixAnswer, run: Callable[[dict[str, np.ndarray]], np.ndarray] = run_all
    ) -> np.ndarray:
        wanted = reference.caches[probe.name]
        wrong = np.full_like(reference.actions[probe.name], np.nan)
        if cache.keys.shape != wanted.keys.shape or cache.values.shape != wanted.values.shape:
            return wrong
        parts = [run(inputs) for inputs in _batches(ingest, probe, cache)]
        if any(part.shape[1:] != wrong.shape[1:] for part in parts) or sum(map(len, parts)) != len(wrong):
            return wrong
        return np.concatenate(parts)

    # On the policy's own cache, so that an error of the prefix cannot hide one of the decoder.
    alone = {probe.name: decode(probe, reference.caches[probe.name]) for probe in reference.probes}
    gates = [_judge_actions("decoder", limits.decoder, alone, reference)]
    if "decoder_step" in engines:
        control = reference.probe(CONTROL_PROBE)
        stepped = {control.name: decode(control, reference.caches[control.name], run_steps)}
        gates.append(_judge_actions("decoder_step", limits.decoder, stepped, reference))
    chained = {probe.name: decode(probe, caches[probe.name]) for probe in reference.probes}
    gates.append(_judge_actions("actions", limits.actions, chained, reference))
    return DecoderVerdict(gates, _action_errors(chained, reference))


def _batches(ingest: Engine, probe: Probe, cache: PrefixAnswer) -> Iterator[dict[str, np.ndarray]]:
    """The decoder's inputs, a few rows at a time, each with the ingested cache."""
    total = len(probe.decoder["noise"])
    for start in range(0, total, _ROWS):
        inputs = {name: value[start : start + _ROWS] for name, value in probe.decoder.items()}
        rows = len(inputs["noise"])
        # A batch for the ingest, too, where one row for all would do: it shows whether batch and heads keep
        # their places.
        shape = (cache.keys.shape[0], rows, *cache.keys.shape[2:])
        repeated = {
            "keys": np.ascontiguousarray(np.broadcast_to(cache.keys, shape)),
            "values": np.ascontiguousarray(np.broadcast_to(cache.values, shape)),
        }
        mask = np.ascontiguousarray(np.broadcast_to(cache.mask, (rows, cache.mask.shape[1])))
        yield {**ingest.run(repeated), **inputs, "prefix_mask": mask}


def _judge_actions(
    name: str, limit: GateLimit, got: Mapping[str, np.ndarray], reference: Reference
) -> GateResult:
    """Judge actions by probe; the control is the damage that this limit must just see."""
    facts = reference.facts

    def error(answers: Mapping[str, np.ndarray]) -> float:
        worst = 0.0
        for probe, actions in got.items():
            answer = answers.get(probe)
            if answer is None:
                continue
            rows = actions[: len(answer)]
            if limit.metric == MAX_RELATIVE:
                worst = max(worst, relative_error(rows, answer))
            else:
                delays = facts.row_delays(probe)[: len(answer)]
                worst = max(worst, action_rms(rows, answer, delays, facts.action_dim))
        return worst

    if limit.metric == MAX_RELATIVE:
        control = "fine"
    else:
        control = "floor" if limit.value <= reference.floor.actions else "seed"
    broken = {CONTROL_PROBE: reference.controls[control]}
    return judge(name, limit.value, error, reference.actions, broken, limit.metric)


def _action_errors(chained: Mapping[str, np.ndarray], reference: Reference) -> ActionErrors:
    dims = reference.facts.action_dim
    errors = []
    for name, answer in reference.actions.items():
        scale = max(1.0, float(np.abs(answer).max()))
        error = np.full(answer.shape, LARGEST)
        if chained[name].shape == answer.shape:
            error = np.abs(chained[name].astype(np.float64) - answer) / scale
        error = error[..., :dims]
        errors.append(np.nan_to_num(error, nan=LARGEST, posinf=LARGEST).max(axis=0))
    return ActionErrors(
        error=np.max(errors, axis=0),
        reference=reference.actions[_CHUNK_PROBE][0, :, :dims],
        compiled=chained[_CHUNK_PROBE][0, :, :dims],
    )
