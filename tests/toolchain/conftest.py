from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from otau.toolchain.cache.store import CompileCache
from otau.toolchain.compilation import Compilation
from otau.toolchain.pipeline import compile_bundle
from otau.toolchain.targets import find_target
from otau.training.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="session")
def new_compilation(compile_cache: Path) -> Callable[..., Compilation]:
    """What to compile, not begun; options are fields of `Compilation`."""

    def new(source: Path, out: Path, num_steps: int | None = None, **options: Any) -> Compilation:
        target, precision = find_target("cpu", options.pop("precision", None))
        cache = CompileCache(options.pop("cache", compile_cache))
        return Compilation(source, out, target, precision, cache, num_steps=num_steps, **options)

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
