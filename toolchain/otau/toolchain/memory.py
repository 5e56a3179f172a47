"""The process's peak of resident memory, which Linux can start anew."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

__all__ = ["peak_rss_mb", "reset_peak_rss"]


def reset_peak_rss() -> None:
    """Forget the peak so far; where the kernel does not allow it, the whole process's peak stays."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_rss_mb() -> float:
    """Largest resident memory since the last reset [MiB]."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return round(int(peak.split()[1]) / 1024, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
