"""What every gate is: a measure, a limit, and a negative control, which must fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from otau.runtime.errors import GateError
from otau.runtime.spec import GateResult
from otau.toolchain.thresholds import MAX_RELATIVE

__all__ = ["LARGEST", "judge", "refuse_failed"]

LARGEST = 1e30
"""What stands for an infinite error, since JSON has none."""

_Answers = TypeVar("_Answers")


def judge(
    name: str,
    limit: float,
    measure: Callable[[_Answers], float],
    sound: _Answers,
    broken: _Answers,
    metric: str = MAX_RELATIVE,
) -> GateResult:
    """Measure a gate against the sound answers, and against those of a damaged policy, where it must fail.

    Args:
        name: Of the gate.
        limit: Largest error that passes.
        measure: Error of what was compiled against answers.
        sound: The policy's answers.
        broken: The damaged policy's.
        metric: What is measured.

    Returns:
        The result; it passes only if its control failed.
    """
    value, control = measure(sound), measure(broken)
    value = min(value, LARGEST)
    return GateResult(
        name=name,
        metric=metric,
        value=value,
        limit=limit,
        passed=value <= limit,
        control_failed=control > limit,
    )


def refuse_failed(gates: Sequence[GateResult], fix: str = "no bundle was written") -> None:
    """Stop where a gate failed, or where its control did not.

    Args:
        gates: What was measured.
        fix: What became of the bundle, or is to become of it.

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
            fix=f"{fix}; report this with the output of `otau doctor`",
        )
    if blind:
        raise GateError(
            f"a gate cannot tell a damaged policy from a sound one: {', '.join(gate.name for gate in blind)}",
            where=blind[0].name,
            expected=f"a damaged weight to exceed {blind[0].limit:g}",
            got="no difference",
            fix=f"the checkpoint's last layers may be all zero; {fix}",
        )
