"""New probes for a bundle, answered by the checkpoint that it came from. Needs PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from otau.runtime.bundle import Bundle
from otau.runtime.errors import CheckpointError
from otau.runtime.spec import Manifest
from otau.toolchain.gate.answers import Reference
from otau.toolchain.gate.probes import make_probes
from otau.toolchain.gate.reference import ProbeFactsFromPolicy, decoder_reference, prefix_reference
from otau.toolchain.intake import load_checkpoint
from otau.toolchain.manifest import ManifestFromCheckpoint, head_names
from otau.toolchain.overrides import Overrides, apply_overrides
from otau.toolchain.targets import find_target
from otau.toolchain.tokenizer import has_tokenizer, read_tokenizer
from otau.training.policies import Checkpoint

__all__ = ["new_reference"]

_OF_THE_COMPILATION = ("fingerprint", "target", "engine", "versions", "files")
"""What of a manifest does not follow from the checkpoint."""


def new_reference(
    bundle: Bundle, folder: Path, seed: int, on_stage: Callable[[str], None] = lambda name: None
) -> Reference:
    """Answer new probes in PyTorch, one half of the policy after the other.

    Args:
        bundle: What is to be judged.
        folder: The checkpoint that it was compiled from.
        seed: Of the probes; the bundle's own have another.
        on_stage: Told the name of each stage before it runs.

    Raises:
        UsageError: There is no checkpoint.
        CheckpointError: It is not the one that was compiled, has another tokenizer, or is damaged.
    """
    on_stage("read the checkpoint")
    # Its values are judged by what comes out.
    checkpoint = _as_compiled(load_checkpoint(folder, values=False), bundle.manifest)
    _refuse_other_policy(checkpoint, bundle)
    probes = make_probes(ProbeFactsFromPolicy(checkpoint.empty), seed)
    on_stage("answer with the prefix in PyTorch")
    prefix = prefix_reference(checkpoint.load("prefix"), probes)
    on_stage("answer with the decoder in PyTorch")
    return decoder_reference(checkpoint.load("decoder"), prefix, bundle.manifest.flow.num_steps)


def _as_compiled(checkpoint: Checkpoint, manifest: Manifest) -> Checkpoint:
    """The checkpoint with the choices that the user made when the bundle was compiled."""
    config, folder = checkpoint.config, checkpoint.folder
    cameras = {camera.name for camera in manifest.cameras}
    heads, names = manifest.norm.heads, head_names(checkpoint)
    if config.type != manifest.policy:
        raise _other_policy(folder, "policy type", manifest.policy, config.type)
    if not cameras <= config.cameras().keys():
        raise _other_policy(folder, "cameras", ", ".join(sorted(cameras)), ", ".join(config.cameras()))
    if not set(heads) <= set(names):
        raise _other_policy(folder, "normalisation heads", ", ".join(heads), ", ".join(names))
    narrowed = {
        kind: given if given < stored else None
        for kind, given, stored in (
            ("action_dims", manifest.action.dim, config.action_dim),
            ("state_dims", manifest.state.dim, config.state_dim),
        )
    }
    overrides = Overrides(
        norm_head=heads[0] if len(heads) < len(names) else None,
        absent_cameras=tuple(name for name in config.cameras() if name not in cameras),
        without_response=manifest.prompt.response_left_out,
        **narrowed,
    )
    with _silent(apply_overrides.__module__):
        return apply_overrides(checkpoint, overrides)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep warnings back that were given when the bundle was compiled."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _refuse_other_policy(checkpoint: Checkpoint, bundle: Bundle) -> None:
    """Refuse a checkpoint that would not have become this bundle."""
    manifest = bundle.manifest
    target, _ = find_target(manifest.target, None)
    expected = ManifestFromCheckpoint(
        checkpoint,
        target=target,
        precision=manifest.precision,
        num_steps=manifest.flow.num_steps,
        tokenizer=manifest.prompt.tokenizer,
        graphs=manifest.graphs,
        gates=manifest.gates,
    )
    fields = [name for name in manifest.__struct_fields__ if name not in _OF_THE_COMPILATION]
    for name in fields:
        if getattr(manifest, name) != getattr(expected, name):
            raise _other_policy(checkpoint.folder, name, getattr(manifest, name), getattr(expected, name))
    _refuse_other_tokenizer(checkpoint, bundle)
    stored = {f"{kind}.{name}": v for kind, by_name in bundle.stats().items() for name, v in by_name.items()}
    given = checkpoint.statistics
    differing = [key for key in stored.keys() | given.keys() if not _equal(stored.get(key), given.get(key))]
    if differing:
        name = f"statistics ({', '.join(sorted(differing))})"
        raise _other_policy(checkpoint.folder, name, "those in the bundle", "others")


def _refuse_other_tokenizer(checkpoint: Checkpoint, bundle: Bundle) -> None:
    """Refuse a checkpoint whose tokenizer, if it has one, is not the bundle's."""
    name = bundle.manifest.prompt.tokenizer
    if name is None or not has_tokenizer(checkpoint.folder):
        return
    given = read_tokenizer(checkpoint.folder, checkpoint.dims.vocab)
    compiled = bundle.tokenizer()
    if compiled is None or compiled.to_str() != given:
        raise CheckpointError(
            "this checkpoint is not the one that was compiled: its tokenizer differs",
            where=checkpoint.folder,
            expected=f"that in {bundle.file(name)}",
            got="another one",
            fix="name the checkpoint of this bundle; if that was compiled with --tokenizer, take its own"
            " tokenizer out of it",
        )


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is not None and other is not None and np.array_equal(one, other)


def _other_policy(folder: Path, field: str, compiled: object, given: object) -> CheckpointError:
    return CheckpointError(
        f"this checkpoint is not the one that was compiled: its {field} differ",
        where=folder,
        expected=compiled,
        got=given,
        fix="name the checkpoint of this bundle",
    )
