from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from otau.toolchain.pipeline import Compilation, compile_bundle
from otau.toolchain.targets import find_target
from otau.training.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="session")
def new_compilation() -> Callable[..., Compilation]:
    """What to compile, not begun."""

    def new(source: Path, out: Path, num_steps: int | None = None) -> Compilation:
        target, precision = find_target("cpu", None)
        return Compilation(source, out, target, precision, num_steps=num_steps)

    return new


@pytest.fixture(scope="session")
def compiled(
    tmp_path_factory: pytest.TempPathFactory, new_compilation: Callable[..., Compilation]
) -> Callable[..., Compilation]:
    """Compile a checkpoint, once a session for each number of steps."""
    done: dict[tuple[Path, int | None], Compilation] = {}

    def compile_once(source: Path, num_steps: int | None = None) -> Compilation:
        if (source, num_steps) not in done:
            out = tmp_path_factory.mktemp("bundles") / source.name
            compilation = new_compilation(source, out, num_steps)
            compile_bundle(compilation)
            done[source, num_steps] = compilation
        return done[source, num_steps]

    return compile_once


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint of a family; not to be changed."""
    root = tmp_path_factory.mktemp("checkpoints")

    def checkpoint(policy: str) -> Path:
        if not (root / policy).exists():
            write_random_checkpoint(root / policy, policy, "tiny")
        return root / policy

    return checkpoint
