"""The policy's answers in PyTorch, half by half; see `answers.py`.

Memory at full size: `prefix_reference` needs the 11.7 GB of the prefix's weights, which become bfloat16 one
by one when the float32 answers are there; `decoder_reference` needs 1.7 GB, and 0.9 for a copy in bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from otau.runtime.spec import GateResult
from otau.toolchain.gate.answers import NoiseFloor, PrefixAnswer, PrefixReference, Reference
from otau.toolchain.gate.metrics import action_rms, relative_error, relative_rms
from otau.toolchain.gate.parity import judge
from otau.toolchain.gate.probes import (
    CONTROL_PROBE,
    CONTROL_ROWS,
    FLOOR_PROBES,
    FLOOR_ROWS,
    SEED_ROWS,
    Probe,
    ProbeFacts,
)
from otau.toolchain.graph.programs import DenoiseStep, Prefix
from otau.toolchain.thresholds import CONTROL_DAMAGE, CONTROL_FACTOR, FP32, action_allowance
from otau.training.policies import FlowPolicy, lay_out

if TYPE_CHECKING:
    from otau.training.policies.flow_policy import Cache

__all__ = ["ProbeFactsFromPolicy", "decoder_reference", "gate_fold", "prefix_reference", "scaled"]

_ROWS = 4
"""Rows that are decoded at once: at full size each takes 38 MB of cache."""
_ATTEMPTS = 8
"""To find a damage that a lower precision's gate must see."""


def ProbeFactsFromPolicy(policy: FlowPolicy) -> ProbeFacts:  # noqa: N802 (<Target>From<Source>)
    """The facts of a policy, which needs no weights for it."""
    config, dims = policy.config, policy.dims
    return ProbeFacts(
        cameras=len(config.cameras()),
        height=dims.vision.height,
        width=dims.vision.width,
        image_tokens=dims.vision.tokens,
        prompt_length=policy.prompt_length(config),
        vocab=dims.vocab,
        layers=dims.vlm.layers,
        kv_heads=dims.vlm.kv_heads,
        head_dim=dims.vlm.head_dim,
        chunk=config.chunk_size,
        action_dim=config.action_dim,
        max_action_dim=config.max_action_dim,
        max_state_dim=config.max_state_dim,
        max_delay=config.max_delay,
        real_time_chunking=policy.real_time_chunking,
        state_in_prefix=policy.state_in_prefix,
        state_in_decoder=policy.state_in_decoder,
    )


@torch.no_grad()
def prefix_reference(policy: FlowPolicy, probes: tuple[Probe, ...]) -> PrefixReference:
    """The prefix's half.

    Args:
        policy: With the prefix's weights in float32; they are bfloat16 afterwards, so drop it.
        probes: As `make_probes` made them.
    """
    caches = {probe.name: _cache(policy, probe) for probe in probes}
    policy.to_bfloat16()
    served = {probe.name: _cache(policy, probe) for probe in probes if probe.name in FLOOR_PROBES}
    return PrefixReference(ProbeFactsFromPolicy(policy), probes, caches, served)


@torch.no_grad()
def decoder_reference(policy: FlowPolicy, prefix: PrefixReference, num_steps: int) -> Reference:
    """The decoder's half.

    Args:
        policy: With the decoder's weights in float32, which stay as they are.
        prefix: The first half.
        num_steps: Euler steps.
    """
    facts, control = prefix.facts, prefix.probe(CONTROL_PROBE)
    actions = {
        probe.name: _actions(policy, probe, prefix.caches[probe.name], num_steps) for probe in prefix.probes
    }
    served = copy.deepcopy(policy).to_bfloat16()
    errors = [
        action_rms(
            _actions(served, prefix.probe(name), cache, num_steps, FLOOR_ROWS),
            actions[name][FLOOR_ROWS],
            facts.row_delays(name)[FLOOR_ROWS],
            facts.action_dim,
        )
        for name, cache in prefix.served.items()
    ]
    del served
    seeds = actions[CONTROL_PROBE][SEED_ROWS]
    floor = NoiseFloor(
        keys=prefix.floor.keys,
        values=prefix.floor.values,
        actions=max(errors),
        seed_spread=action_rms(seeds[1:], seeds[:1], (0,), facts.action_dim),
    )
    sound = prefix.caches[CONTROL_PROBE]
    controls = _controls(policy, control, sound, actions[CONTROL_PROBE], num_steps, floor, facts)
    return Reference(facts, prefix.probes, prefix.caches, actions, controls, floor)


@torch.no_grad()
def gate_fold(program: DenoiseStep, reference: Reference) -> GateResult:
    """Judge the folded steps in PyTorch against the policy, on every delay of the control probe.

    Args:
        program: In float32.
        reference: Of the same number of steps.
    """
    probe = reference.probe(CONTROL_PROBE)
    folded = []
    for cache, mask, inputs in _batches(probe, reference.caches[CONTROL_PROBE], slice(None), torch.float32):
        keys, values = ([kv[i] for kv in cache] for i in (0, 1))
        x = inputs.pop("noise")
        for step in range(len(program.schedule)):
            x = program(x, torch.tensor(step), keys, values, mask, **inputs)
        folded.append(x.numpy())
    got = np.concatenate(folded)
    return judge(
        "fold",
        FP32.decoder.value,
        lambda answer: relative_error(got[: len(answer)], answer),
        reference.actions[CONTROL_PROBE],
        reference.controls["fine"],
    )


@contextmanager
def scaled(weight: Tensor, factor: float) -> Iterator[None]:
    """Scale a weight for a while: a damaged policy, for the negative controls."""
    original = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(factor)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(original)


def _controls(
    policy: FlowPolicy,
    probe: Probe,
    cache: PrefixAnswer,
    sound: np.ndarray,
    num_steps: int,
    floor: NoiseFloor,
    facts: ProbeFacts,
) -> Mapping[str, np.ndarray]:
    """The damaged decoder's actions on the control rows.

    `fine` scales the last feed-forward, where damage has the least way to spread. The coarse ones scale the
    projection to actions, because the norm before it bounds what any damage further up can do.
    """
    sound = sound[CONTROL_ROWS]

    def broken(weight: Tensor, damage: float) -> np.ndarray:
        with scaled(weight, 1 + damage):
            return _actions(policy, probe, cache, num_steps, CONTROL_ROWS)

    controls = {"fine": broken(policy.expert.layers[-1].mlp.down_proj.weight, CONTROL_DAMAGE)}
    # The actions are the noise plus the sum of all velocities: what scales every velocity by 1 + d moves them
    # by about d times that sum.
    travelled = relative_rms(probe.decoder["noise"][CONTROL_ROWS], sound)
    for name, allow in (("floor", None), ("seed", "seed")):
        wanted = CONTROL_FACTOR * action_allowance(floor, allow)
        damage = 1.5 * wanted / max(travelled, 1e-3)
        for _ in range(_ATTEMPTS):
            controls[name] = broken(policy.action_out_proj.weight, damage)
            effect = action_rms(controls[name], sound, (0,), facts.action_dim)
            if effect >= wanted or effect == 0.0:
                break
            damage *= max(2.0, 1.2 * wanted / effect)
    return controls


def _cache(policy: FlowPolicy, probe: Probe) -> PrefixAnswer:
    """The prefix of a policy in float32 or bfloat16."""
    served = policy.vlm.norm.weight.dtype
    inputs = {name: torch.from_numpy(value) for name, value in probe.prefix.items()}
    # Served in bfloat16, pictures and state arrive so, too.
    inputs = {name: t.to(served).float() if t.is_floating_point() else t for name, t in inputs.items()}
    keys, values, mask = Prefix(policy)(**inputs)
    return PrefixAnswer(keys.float().numpy(), values.float().numpy(), mask.numpy())


def _actions(
    policy: FlowPolicy, probe: Probe, given: PrefixAnswer, num_steps: int, rows: slice = slice(None)
) -> np.ndarray:
    """Some rows' actions (rows, T, A) on a cache, by a policy in float32 or bfloat16."""
    dtype = policy.action_out_proj.weight.dtype
    parts = []
    for cache, mask, inputs in _batches(probe, given, rows, dtype):
        if "state" in inputs:
            inputs["state"] = inputs["state"].to(dtype).float()
        parts.append(policy.decode(cache, mask, inputs.pop("noise"), num_steps=num_steps, **inputs).numpy())
    return np.concatenate(parts)


def _batches(
    probe: Probe, given: PrefixAnswer, rows: slice, dtype: torch.dtype
) -> Iterator[tuple[Cache, Tensor, dict[str, Tensor]]]:
    """A probe's decoder inputs, a few rows at a time, each with the cache in the decoder's layout."""
    keys, values, mask = (torch.from_numpy(array) for array in (given.keys, given.values, given.mask))
    keys, values = keys.to(dtype), values.to(dtype)
    chosen = {name: torch.from_numpy(value[rows]) for name, value in probe.decoder.items()}
    for start in range(0, len(chosen["noise"]), _ROWS):
        inputs = {name: value[start : start + _ROWS] for name, value in chosen.items()}
        size = len(inputs["noise"])
        cache = lay_out(keys.expand(-1, size, -1, -1, -1), values.expand(-1, size, -1, -1, -1))
        yield cache, mask.expand(size, -1), inputs
