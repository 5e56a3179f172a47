"""`otau infer`: runs a bundle on recorded or made-up observations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from otau.runtime.cli.options import RequireSignature
from otau.runtime.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from otau.runtime.policy import ActionChunk, Policy
    from otau.runtime.prefix import KVCache
    from otau.runtime.recorded import RecordedInputs

__all__ = ["infer"]


def infer(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory of the bundle.")],
    inputs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Recorded observations, a safetensors file.", show_default=False),
    ] = None,
    dummy: Annotated[bool, typer.Option("--dummy", help="Make up one observation instead.")] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write actions, KV cache and masks there.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The task, instead of the file's text or token ids."),
    ] = None,
    norm_head: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Normalisation head, by name or number, where the file has no dataset_index.",
            show_default="the bundle's only one",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of noise and of made-up observations.")] = 0,
    require_signature: RequireSignature = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run a bundle on recorded or made-up observations.

    The file's tensors, with or without the prefix `inputs/`: state (B, s); image0, image1, ... uint8
    (B, h, w, 3) or float (B, 3, h, w) in [0, 1], in the order of the bundle's cameras, any but not all of
    which may be missing (which is not the same as black: the policy sees a black picture); either
    lang_tokens and lang_masks (B, L), or prompt (UTF-8 bytes as uint8, or the entry "prompt" of the file's
    metadata); state_open_ids and state_close_ids (n,), for a policy with a state token in its prefix only;
    noise (B, T, A); action_prefix (B, k, a), raw and absolute; delay; dataset_index (B,), the rows of the
    normalisation heads; num_steps, which must be the bundle's. Tensors outputs/... are skipped.

    Saved are actions (B, T, a), actions_norm (B, T, A), prefix_pad_masks (B, P), and for every layer l
    key_states_{l} and value_states_{l} (B, P, Hkv, D).

    Example: otau infer my_bundle --inputs io.safetensors --save out.safetensors --json
    """
    import numpy as np

    from otau.runtime.bundle import Bundle
    from otau.runtime.policy import Policy
    from otau.runtime.recorded import check_writable, write_tensors

    if (inputs is None) != dummy:
        raise UsageError("give either --inputs FILE or --dummy")
    if save is not None:
        check_writable(save)
        if inputs is not None and save.resolve() == inputs.resolve():
            raise UsageError("--save would overwrite --inputs", got=save, fix="save to another file")
    rng = np.random.default_rng(seed)
    opened = Bundle.open(bundle, require_signature=require_signature)
    with Policy.open(opened, norm_head=norm_head) as policy:
        recorded = _observations(policy, inputs, prompt, norm_head, rng)
        cache = policy.prefix_batch(recorded.batch)
        chunk = policy.decode_batch(
            policy.ingest(cache),
            noise=recorded.noise,
            action_prefix=recorded.action_prefix,
            delay=recorded.delay,
            rng=rng,
        )
        outputs = _outputs(cache, chunk)
        if save is not None:
            write_tensors(save, outputs)
        document = {
            "bundle": str(bundle),
            "policy": policy.manifest.policy,
            "num_steps": policy.manifest.flow.num_steps,
            "n_action_steps": chunk.n_action_steps,
            "inputs": None if inputs is None else str(inputs),
            "save": None if save is None else str(save),
            "outputs": {
                name: {"shape": list(value.shape), "dtype": value.dtype.name}
                for name, value in outputs.items()
            },
            "timings_ms": {stage: round(value, 3) for stage, value in chunk.timings.items()},
        }
    if json_output:
        typer.echo(json.dumps(document, indent=2))
    else:
        _print(document)


def _observations(
    policy: Policy,
    inputs: Path | None,
    prompt: str | None,
    norm_head: str | None,
    rng: np.random.Generator,
) -> RecordedInputs:
    """The recorded observations, or made-up ones."""
    from dataclasses import replace

    import numpy as np

    from otau.runtime.observation import dummy_batch
    from otau.runtime.recorded import RecordedInputs, read_recorded

    if inputs is not None:
        return read_recorded(inputs, policy.manifest, prompt=prompt)
    batch = dummy_batch(policy.manifest, rng)
    if norm_head is not None:
        batch = replace(batch, dataset_index=None)
    if prompt is not None:
        batch = replace(batch, prompts=(prompt,), tokens=None, token_masks=None)
    return RecordedInputs(batch, noise=None, action_prefix=None, delay=np.zeros(1, np.int64))


def _outputs(cache: KVCache, chunk: ActionChunk) -> dict[str, np.ndarray]:
    """The results under the names of the golden files."""
    outputs = {"actions": chunk.actions, "actions_norm": chunk.normalised, "prefix_pad_masks": cache.mask}
    outputs |= {f"key_states_{layer}": value for layer, value in enumerate(cache.keys)}
    outputs |= {f"value_states_{layer}": value for layer, value in enumerate(cache.values)}
    return outputs


def _print(document: dict[str, Any]) -> None:
    """The document for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("output", "shape", "dtype")
    for name, tensor in document["outputs"].items():
        table.add_row(name, " x ".join(str(size) for size in tensor["shape"]), tensor["dtype"])
    console = Console()
    console.print(table)
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in document["timings_ms"].items())
    console.print(f"{document['policy']}, {document['num_steps']} flow steps; [ms] {stages}", markup=False)
    if document["save"] is not None:
        console.print(f"saved {document['save']}", markup=False)
