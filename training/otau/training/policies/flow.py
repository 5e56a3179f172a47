"""Flow time: its embedding and the schedule of the Euler steps.

Flow time runs from 1 (noise) to 0 (action). The sinusoid is computed in float64: in float32 the same
formula moves actions by up to 3e-5 (measured on the golden cases).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["MAX_PERIOD", "MIN_PERIOD", "euler_dt", "flow_times", "time_sincos"]

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0


def euler_dt(num_steps: int) -> Tensor:
    """The step of flow time, a float32 scalar, negative."""
    return torch.tensor(-1.0 / num_steps, dtype=torch.float32)


def flow_times(num_steps: int, rule: Literal["sum", "multiples"] = "sum") -> Tensor:
    """Flow time at the start of each Euler step.

    Args:
        num_steps: Number of steps, at least 1.
        rule: `sum` is a running sum in float32, as OpenTau and openpi have it (0.9, 0.79999995, ...).
            `multiples` are those of the step, rounded once, as LeRobot has them since 0.4.3.

    Returns:
        (num_steps,) float32, from 1 down.
    """
    if rule == "multiples":
        steps = [1.0 + step * (-1.0 / num_steps) for step in range(num_steps)]
        return torch.tensor(steps, dtype=torch.float32)
    times = [torch.tensor(1.0)]
    for _ in range(num_steps - 1):
        times.append(times[-1] + euler_dt(num_steps))
    return torch.stack(times)


def time_sincos(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of flow time.

    Args:
        t: (...) flow time in [0, 1].
        width: Even width of the embedding.

    Returns:
        (..., width) float64, sines then cosines, periods from 4e-3 to 4 in geometric steps.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=t.device)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angle = t.double()[..., None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
