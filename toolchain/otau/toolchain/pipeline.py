"""The compiler: one visible list of stages from a checkpoint to a bundle.

Each stage is a module of `stages/` whose `run(compilation, folder)` leaves its results in a folder of the
compile cache. The folder is named by a key: the hash of the code, of the options that the stage reads, and of
the keys of the stages it follows. A stage whose results are there is not run again, nor is its module
imported.
"""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import otau
from otau.runtime.bundle_writer import BundleWriter
from otau.runtime.errors import OtauError, UsageError
from otau.runtime.spec import Manifest
from otau.toolchain.cache.sources import digest, folder_digest
from otau.toolchain.compilation import Compilation, StageRun
from otau.toolchain.memory import peak_rss_mb, reset_peak_rss
from otau.toolchain.tokenizer import TOKENIZER_FILES, has_tokenizer
from otau.toolchain.versions import package_versions

__all__ = ["STAGES", "Stage", "compile_bundle", "stage_keys"]


@dataclass(frozen=True)
class Stage:
    """A step of the compilation."""

    name: str
    """Of its module in `stages/`."""
    after: tuple[str, ...] = ()
    """The stages whose results it reads."""
    options: Callable[[Compilation], object] = field(default=lambda c: None)
    """What else its results depend on, as a JSON document."""

    def run(self, c: Compilation, folder: Path) -> None:
        """Leave the results in a folder."""
        importlib.import_module(f"otau.toolchain.stages.{self.name}").run(c, folder)


def _intake_options(c: Compilation) -> object:
    def weights() -> tuple[Path, ...]:
        from otau.toolchain.intake import open_checkpoint

        return open_checkpoint(c.source).files

    source = folder_digest(c.cache, c.source, weights)
    folder = c.tokenizer or c.source
    if c.tokenizer is not None and not has_tokenizer(folder):
        raise UsageError(
            "this folder holds no tokenizer",
            where=f"--tokenizer {folder}",
            expected=" or ".join(TOKENIZER_FILES),
            fix="give the folder of the PaliGemma tokenizer, or leave --tokenizer out to feed token ids",
        )
    tokenizer = {
        path.name: c.cache.hashes.sha256(path)
        for path in (folder / name for name in (*TOKENIZER_FILES, "tokenizer_config.json"))
        if path.is_file()
    }
    # A ZeRO tag folder is read with the configuration of the folder above it.
    above = c.source.parent
    configuration = sorted(above.glob("*.json")) if (above / "latest").is_file() else []
    return [
        source,
        [(path.name, c.cache.hashes.sha256(path)) for path in configuration if path.is_file()],
        tokenizer,
        dict(c.overrides),
    ]


def _target_options(c: Compilation) -> object:
    return [c.target.name, c.precision]


def _decoder_options(c: Compilation) -> object:
    return [c.target.name, c.precision, c.num_steps, c.decoder]


def _gate_options(c: Compilation) -> object:
    return [c.target.name, c.precision, c.allow]


STAGES = (
    Stage("intake", (), _intake_options),
    Stage("prefix_graph", ("intake",), _target_options),
    Stage("prefix_reference", ("intake",)),
    Stage("prefix_gate", ("prefix_graph", "prefix_reference"), _gate_options),
    Stage("decoder_reference", ("prefix_reference",), lambda c: c.num_steps),
    Stage("fold", ("decoder_reference",)),
    Stage("decoder_graph", ("fold",), _decoder_options),
    Stage("decoder_gate", ("prefix_gate", "decoder_graph"), _gate_options),
)
"""What a compilation does, in this order, before the bundle is sealed."""


def compile_bundle(c: Compilation, on_stage: Callable[[str], None] = lambda name: None) -> Manifest:
    """Run every stage whose results are not there, and seal the bundle.

    Args:
        c: What to compile; filled as the stages pass.
        on_stage: Told the name of each stage before it runs.

    Returns:
        The manifest of the bundle, which is at `c.destination`.

    Raises:
        OtauError: A stage refused its input or failed its gate; nothing is left at the destination.
    """
    # Refuses a destination that is taken now, and not when all is done.
    BundleWriter(c.destination)
    with c.cache.in_use():
        c.cache.sweep()
        keys = stage_keys(c)
        for stage in STAGES:
            on_stage(stage.name)
            with _naming(stage.name, c):
                c.pass_stage(stage.name, _run(c, stage, keys[stage.name]))
        on_stage("seal")
        with _naming("seal", c):
            # Not cached: its result is the bundle.
            from otau.toolchain.stages.seal import seal

            seal(c, digest(keys))
    assert c.manifest is not None
    return c.manifest


def stage_keys(c: Compilation) -> dict[str, str]:
    """The key of every stage."""
    keys: dict[str, str] = {}
    for stage in STAGES:
        keys[stage.name] = digest(
            [stage.name, _code(), stage.options(c), [keys[name] for name in stage.after]]
        )
    return keys


def _run(c: Compilation, stage: Stage, key: str) -> StageRun:
    entry = c.cache.find(stage.name, key)
    if entry is not None:
        return StageRun(c.cache.folder(stage.name, key), entry, cached=True)
    with c.cache.writing(stage.name, key) as (folder, keep):
        reset_peak_rss()
        start = time.perf_counter()
        stage.run(c, folder)
        entry = keep(round(time.perf_counter() - start, 3), peak_rss_mb())
    return StageRun(c.cache.folder(stage.name, key), entry, cached=False)


@contextmanager
def _naming(stage: str, c: Compilation) -> Iterator[None]:
    """Name the stage in an error, and those that have passed."""
    try:
        yield
    except OtauError as error:
        if c.runs:
            error.where = f"{error.where or 'compilation'} (stage {stage}, after {', '.join(c.runs)})"
        raise


@cache
def _code() -> str:
    """The hash of otau's own code and of the versions of what it calls."""
    hashed = hashlib.sha256(repr(sorted(package_versions().items())).encode())
    parts = ("runtime", "toolchain", "training")
    roots = [root for path in otau.__path__ for part in parts if (root := Path(path, part)).is_dir()]
    for root in roots:
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.css")]):
            hashed.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()
