"""The bundle's card: what a person reads before using it."""

from __future__ import annotations

from otau.runtime.messages import printable, shortened
from otau.runtime.spec import Manifest
from otau.toolchain.thresholds import (
    CONTROL_DAMAGE,
    CONTROL_FACTOR,
    MAX_RELATIVE,
    SEED_FLOORS,
    SEED_SHARE,
)

__all__ = ["card"]

_MARKUP = "`<>|\n\t"
"""What would end a code span or its line, or be taken for HTML."""


def _cell(text: str) -> str:
    """Text inside a Markdown table."""
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    """A text from the checkpoint as a code span."""
    shown = printable(shortened(text))
    return "`" + "".join(f"\\x{ord(char):02x}" if char in _MARKUP else char for char in shown) + "`"


def _control(manifest: Manifest) -> str:
    """What the negative controls are, in words."""
    scaled = f"a weight scaled by {1 + CONTROL_DAMAGE:g}"
    metrics = {gate.metric for gate in manifest.gates}
    if metrics <= {MAX_RELATIVE}:
        return f"The control, {scaled}, must fail."
    words = f"The control, a weight damaged to an effect of {CONTROL_FACTOR:g} times the limit, must fail."
    if MAX_RELATIVE in metrics:
        words += f" Of a gate on {_code(MAX_RELATIVE)} it is {scaled}."
    return words


def _allowed(allow: str | None) -> str:
    """What was let pass besides, in words."""
    if allow is None:
        return ""
    return (
        f"\n\n**Compiled with `--allow {allow}`**: actions may be off by {SEED_SHARE:g} of the distance"
        f" between two noise seeds, and K and V by {SEED_FLOORS:g} noise floors."
    )


def card(manifest: Manifest, allow: str | None = None) -> str:
    """The bundle's `README.md`.

    Args:
        manifest: Of the bundle.
        allow: What `--allow` was given when it was compiled.
    """
    cameras = ", ".join(f"{_code(c.name)} {c.height} x {c.width}" for c in manifest.cameras)
    gates = "\n".join(
        f"| {g.name} | {_cell(g.metric)} | {g.value:.2e} | {g.limit:.0e} |"
        f" {'yes' if g.control_failed else 'no'} |"
        for g in manifest.gates
    )
    graphs = "\n".join(f"| {name} | {g.nodes} | {g.parameters:,} |" for name, g in manifest.graphs.items())
    prompt = manifest.prompt
    tokens = "with `tokenizer.json`" if prompt.tokenizer else "as token ids: this bundle has no tokenizer"
    flow = manifest.flow
    return f"""# {manifest.policy} for {manifest.target}

A policy compiled by otau {manifest.versions["otau"]}. Run it with `otau infer` or `otau run`.

- cameras: {cameras} [px]
- state: {manifest.state.dim} dimensions, read by the {manifest.state_route}
- actions: {manifest.action.dim} dimensions, chunks of {flow.chunk}, {flow.n_action_steps} executed
- denoising: {flow.num_steps} steps; trained for delays up to {flow.max_delay} control ticks
- prompt: {_code(repr(prompt.template))}, {prompt.max_length} tokens, {tokens}
- engine: {manifest.engine}, {manifest.precision}

## Gates
Compiled against PyTorch, on inputs nothing was tuned on. {_control(manifest)}{_allowed(allow)}

| gate | metric | value | limit | control failed |
|---|---|---|---|---|
{gates}

## Graphs
| graph | nodes | parameters |
|---|---|---|
{graphs}
"""
