from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from otau.training.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny checkpoint a family; not to be changed."""
    root = tmp_path_factory.mktemp("checkpoints")
    for policy in ("pi05", "pi0"):
        write_random_checkpoint(root / policy, policy, "tiny")
    return {policy: root / policy for policy in ("pi05", "pi0")}


@pytest.fixture
def tiny_copy(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Make a copy to damage."""

    def copy(policy: str = "pi05") -> Path:
        return Path(shutil.copytree(tiny_checkpoints[policy], tmp_path / policy))

    return copy
