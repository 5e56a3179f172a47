"""TEMPORARY, until the pipeline uses the new gates.

Observations that a compiled policy is judged on, and the policy's own answer to them.

Nothing is tuned on the probes. They cover every delay up to the trained maximum and some beyond, and prefixes
of several lengths, with a padded prompt and masked cameras among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from otau.runtime.engines import Engine
from otau.runtime.spec import GateResult
from otau.toolchain.gate.parity import judge, relative_error
from otau.toolchain.graph.export import decoder_inputs, prefix_inputs
from otau.toolchain.graph.programs import DenoiseStep, Prefix
from otau.toolchain.thresholds import Limits
from otau.training.policies import FlowPolicy, lay_out

__all__ = ["Answer", "Probe", "answer", "damaged", "folded_actions", "make_probes"]


@dataclass(frozen=True)
class Probe:
    """Inputs of the prefix and of the decoder."""

    name: str
    prefix: dict[str, Tensor]
    decoder: dict[str, Tensor]
    """Without the cache."""


@dataclass(frozen=True)
class Answer:
    """What a policy makes of a probe."""

    keys: np.ndarray
    """(layers, B, P, Hkv, D) float32."""
    values: np.ndarray
    """(layers, B, P, Hkv, D) float32."""
    mask: np.ndarray
    """(B, P) bool."""
    actions: np.ndarray
    """(B, T, A) float32, normalised."""


def make_probes(policy: FlowPolicy, seed: int = 1) -> list[Probe]:
    """The probes of a policy."""
    cameras = len(policy.config.cameras())
    longest = policy.prompt_length(policy.config)
    delays = _delays(policy)
    probes = []
    for number, (name, tokens) in enumerate({"full": longest, "padded": longest, "short": 3}.items()):
        prefix = prefix_inputs(policy, 1, cameras, tokens, seed=seed + number)
        if name == "padded":
            prefix["token_masks"][:, longest // 2 :] = False
            prefix["image_masks"][:, 1:] = False
        # One row a delay: all of them against the same observation.
        decoder = decoder_inputs(policy, len(delays), seed=seed + 100 + number)
        if policy.real_time_chunking:
            decoder["delay"] = torch.tensor(delays)
        probes.append(Probe(name, prefix, decoder))
    return probes


def _delays(policy: FlowPolicy) -> list[int]:
    """Every delay that was trained, and one, half and all of the chunk, which the graph serves too."""
    if not policy.real_time_chunking:
        return [0]
    chunk = policy.config.chunk_size
    return sorted({*range(policy.config.max_delay + 1), 1, chunk // 2, chunk})


@torch.no_grad()
def answer(policy: FlowPolicy, probe: Probe, num_steps: int, given: Answer | None = None) -> Answer:
    """The policy's answer, in PyTorch, with nothing folded.

    Args:
        policy: The reference.
        probe: What it is asked.
        num_steps: Euler steps.
        given: Decode against the cache of this answer instead of the policy's own, so that a damaged
            decoder is told from a damaged prefix.
    """
    keys, values, mask = Prefix(policy)(**probe.prefix)
    cache = (keys, values, mask) if given is None else _tensors(given)
    laid_out, decoder_mask, inputs = _decoder_side(probe, *cache)
    actions = policy.decode(laid_out, decoder_mask, inputs.pop("noise"), num_steps=num_steps, **inputs)
    return Answer(keys.numpy(), values.numpy(), mask.numpy(), actions.numpy())


@torch.no_grad()
def folded_actions(program: DenoiseStep, probe: Probe, given: Answer) -> np.ndarray:
    """The actions (B, T, A) of the folded steps in PyTorch, on the cache of an answer."""
    cache, mask, inputs = _decoder_side(probe, *_tensors(given))
    keys, values = ([kv[i] for kv in cache] for i in (0, 1))
    x = inputs.pop("noise")
    for step in range(len(program.schedule)):
        x = program(x, torch.tensor(step), keys, values, mask, **inputs)
    return x.numpy()


def _tensors(given: Answer) -> tuple[Tensor, Tensor, Tensor]:
    return torch.from_numpy(given.keys), torch.from_numpy(given.values), torch.from_numpy(given.mask)


def _decoder_side(
    probe: Probe, keys: Tensor, values: Tensor, mask: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, dict[str, Tensor]]:
    rows = len(probe.decoder["noise"])
    cache = lay_out(keys.expand(-1, rows, -1, -1, -1), values.expand(-1, rows, -1, -1, -1))
    return cache, mask.expand(rows, -1), dict(probe.decoder)


@contextmanager
def damaged(policy: FlowPolicy) -> Iterator[None]:
    """Scale one weight of each network by 1.01 for a while: the negative control of the gates.

    The last layers, where damage has the least way to spread: the value projection of the VLM and the
    feed-forward of the expert.
    """
    weights = (policy.vlm.layers[-1].self_attn.v_proj.weight, policy.expert.layers[-1].mlp.down_proj.weight)
    originals = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.01)
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)


def gate_engines(
    engines: Mapping[str, Engine],
    probes: Sequence[Probe],
    sound: Sequence[Answer],
    broken: Sequence[Answer],
    limits: Limits,
) -> list[GateResult]:
    """Judge the three engines: the prefix and the decoder alone, and all three in a row.

    Args:
        engines: `prefix`, `ingest` and `decoder`.
        probes: What they are judged on.
        sound: The policy's answers.
        broken: The damaged policy's answers, for the negative controls.
        limits: Of this precision.
    """
    caches = [engines["prefix"].run(_numpy(probe.prefix)) for probe in probes]

    def decode(probe: Probe, keys: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
        inputs = _numpy(probe.decoder)
        rows = len(inputs["noise"])
        laid_out = engines["ingest"].run({"keys": _rows(keys, rows), "values": _rows(values, rows)})
        prefix_mask = np.ascontiguousarray(np.broadcast_to(mask, (rows, mask.shape[1])))
        return engines["decoder"].run({**laid_out, **inputs, "prefix_mask": prefix_mask})["actions"]

    def cache_error(answers: Sequence[Answer]) -> float:
        worst = 0.0
        for cache, given in zip(caches, answers, strict=True):
            if not np.array_equal(cache["prefix_mask"], given.mask):
                return float("inf")
            for name, reference in (("keys", given.keys), ("values", given.values)):
                for got, wanted in zip(cache[name], reference, strict=True):
                    worst = max(worst, relative_error(got[given.mask], wanted[given.mask]))
        return worst

    chained = [
        decode(probe, cache["keys"], cache["values"], cache["prefix_mask"])
        for probe, cache in zip(probes, caches, strict=True)
    ]
    # On the policy's own cache, so that an error of the prefix cannot hide one of the decoder.
    alone = [
        decode(probe, given.keys, given.values, given.mask)
        for probe, given in zip(probes, sound, strict=True)
    ]

    def action_error(got: Sequence[np.ndarray]) -> Callable[[Sequence[Answer]], float]:
        return lambda answers: max(
            relative_error(actions, given.actions) for actions, given in zip(got, answers, strict=True)
        )

    return [
        judge("prefix", limits.cache, cache_error, sound, broken),
        judge("decoder", limits.actions, action_error(alone), sound, broken),
        judge("actions", limits.actions, action_error(chained), sound, broken),
    ]


def _numpy(tensors: Mapping[str, object]) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def _rows(cache: np.ndarray, rows: int) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(cache, (cache.shape[0], rows, *cache.shape[2:])))
