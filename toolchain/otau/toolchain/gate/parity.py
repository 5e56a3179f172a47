"""Gates: what was compiled against what it was compiled from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from otau.runtime.engines import Engine
from otau.runtime.errors import GateError
from otau.runtime.spec import GateResult
from otau.toolchain.gate.probes import Answer, Probe
from otau.toolchain.thresholds import Limits

__all__ = ["METRIC", "gate_engines", "judge", "refuse_failed", "relative_error"]

METRIC = "max |error| / max(1, max |reference|)"


def relative_error(got: np.ndarray, reference: np.ndarray) -> float:
    """Largest error relative to the reference's scale, which is max |reference| and at least 1.

    A result of another shape, or one that is not finite, is infinitely wrong.
    """
    if got.shape != reference.shape or not np.isfinite(got).all():
        return float("inf")
    scale = max(1.0, float(np.abs(reference).max(initial=0.0)))
    return float(np.abs(got.astype(np.float64) - reference).max(initial=0.0)) / scale


def judge(
    name: str,
    limit: float,
    measure: Callable[[Sequence[Answer]], float],
    sound: Sequence[Answer],
    broken: Sequence[Answer],
) -> GateResult:
    """Measure a gate against the sound answers, and against those of a damaged policy, where it must fail.

    Args:
        name: Of the gate.
        limit: Largest error that passes.
        measure: Error of what was compiled against answers.
        sound: The policy's answers, one a probe.
        broken: The damaged policy's.

    Returns:
        The result; it passes only if its control failed.
    """
    value, control = measure(sound), measure(broken)
    # A number, since the manifest's JSON has no infinity.
    value = min(value, 1e30)
    return GateResult(
        name=name,
        metric=METRIC,
        value=value,
        limit=limit,
        passed=value <= limit,
        control_failed=control > limit,
    )


def gate_engines(
    engines: Mapping[str, Engine],
    probes: Sequence[Probe],
    sound: Sequence[Answer],
    broken: Sequence[Answer],
    limits: Limits,
) -> list[GateResult]:
    """Judge the three engines: the prefix and the decoder alone, and all three in a row.

    Args:
        engines: `prefix`, `ingest` and `decoder`.
        probes: What they are judged on.
        sound: The policy's answers.
        broken: The damaged policy's answers, for the negative controls.
        limits: Of this precision.
    """
    caches = [engines["prefix"].run(_numpy(probe.prefix)) for probe in probes]

    def decode(probe: Probe, keys: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
        inputs = _numpy(probe.decoder)
        rows = len(inputs["noise"])
        laid_out = engines["ingest"].run({"keys": _rows(keys, rows), "values": _rows(values, rows)})
        prefix_mask = np.ascontiguousarray(np.broadcast_to(mask, (rows, mask.shape[1])))
        return engines["decoder"].run({**laid_out, **inputs, "prefix_mask": prefix_mask})["actions"]

    def cache_error(answers: Sequence[Answer]) -> float:
        worst = 0.0
        for cache, given in zip(caches, answers, strict=True):
            if not np.array_equal(cache["prefix_mask"], given.mask):
                return float("inf")
            for name, reference in (("keys", given.keys), ("values", given.values)):
                for got, wanted in zip(cache[name], reference, strict=True):
                    worst = max(worst, relative_error(got[given.mask], wanted[given.mask]))
        return worst

    chained = [
        decode(probe, cache["keys"], cache["values"], cache["prefix_mask"])
        for probe, cache in zip(probes, caches, strict=True)
    ]
    # On the policy's own cache, so that an error of the prefix cannot hide one of the decoder.
    alone = [
        decode(probe, given.keys, given.values, given.mask)
        for probe, given in zip(probes, sound, strict=True)
    ]

    def action_error(got: Sequence[np.ndarray]) -> Callable[[Sequence[Answer]], float]:
        return lambda answers: max(
            relative_error(actions, given.actions) for actions, given in zip(got, answers, strict=True)
        )

    return [
        judge("prefix", limits.cache, cache_error, sound, broken),
        judge("decoder", limits.actions, action_error(alone), sound, broken),
        judge("actions", limits.actions, action_error(chained), sound, broken),
    ]


def refuse_failed(gates: Sequence[GateResult]) -> None:
    """Stop where a gate failed, or where its control did not.

    Raises:
        GateError: Names every gate that failed, its value and its limit.
    """
    failed = [gate for gate in gates if not gate.passed]
    blind = [gate for gate in gates if not gate.control_failed]
    if failed:
        raise GateError(
            f"the compiled policy is not the checkpoint's: {', '.join(gate.name for gate in failed)} failed",
            where=failed[0].name,
            expected=f"{failed[0].metric} <= {failed[0].limit:g}",
            got="; ".join(f"{gate.name} {gate.value:.3g}" for gate in failed),
            fix="no bundle was written; report this with the output of `otau doctor`",
        )
    if blind:
        raise GateError(
            f"a gate cannot tell a damaged policy from a sound one: {', '.join(gate.name for gate in blind)}",
            where=blind[0].name,
            expected=f"a damaged weight to exceed {blind[0].limit:g}",
            got="no difference",
            fix="the checkpoint's last layers may be all zero; no bundle was written",
        )


def _numpy(tensors: Mapping[str, object]) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def _rows(cache: np.ndarray, rows: int) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(cache, (cache.shape[0], rows, *cache.shape[2:])))
