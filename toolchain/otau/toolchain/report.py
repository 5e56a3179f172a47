"""The bundle's card: what a person reads before using it."""

from __future__ import annotations

from otau.runtime.spec import Manifest

__all__ = ["card"]


def _cell(text: str) -> str:
    """Text inside a Markdown table."""
    return text.replace("|", "\\|")


def card(manifest: Manifest) -> str:
    """The bundle's `README.md`."""
    cameras = ", ".join(f"`{c.name}` {c.height} x {c.width}" for c in manifest.cameras)
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
- prompt: `{prompt.template!r}`, {prompt.max_length} tokens, {tokens}
- engine: {manifest.engine}, {manifest.precision}

## Gates
Compiled against PyTorch, on inputs nothing was tuned on. The control, a weight scaled by 1.01, must fail.

| gate | metric | value | limit | control failed |
|---|---|---|---|---|
{gates}

## Graphs
| graph | nodes | parameters |
|---|---|---|
{graphs}
"""
