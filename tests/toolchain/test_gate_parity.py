"""The gates on engines that run in PyTorch: each passes on the policy, and fails on anything damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from otau.runtime.errors import GateError
from otau.runtime.spec import GateResult
from otau.toolchain.gate.answers import PrefixAnswer, Reference
from otau.toolchain.gate.decoder import DecoderVerdict, gate_decoder
from otau.toolchain.gate.metrics import relative_error
from otau.toolchain.gate.parity import refuse_failed
from otau.toolchain.gate.prefix import PrefixVerdict, gate_prefix
from otau.toolchain.gate.probes import CONTROL_PROBE, make_probes
from otau.toolchain.gate.reference import (
    ProbeFactsFromPolicy,
    decoder_reference,
    prefix_reference,
)
from otau.toolchain.graph.programs import DenoiseStep, Ingest, Prefix
from otau.toolchain.intake import load_checkpoint
from otau.toolchain.thresholds import (
    FP32,
    MAX_RELATIVE,
    NOISE_FLOORS,
    RELATIVE_RMS,
    gate_limits,
    prefix_limit,
)
from otau.training.policies import FlowPolicy

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
FOLDERS = ("pi05_discrete", "pi05_continuous", "pi0")
STEPS = 3

pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason=f"no golden tensors at {GOLDEN}")

Outputs = dict[str, np.ndarray]


class TorchEngine:
    """A program of the policy as an engine; stands for a compiled graph, whose outputs a test may change."""

    def __init__(self, run: Callable[[Mapping[str, torch.Tensor]], Outputs], model: str) -> None:
        self.model = Path(model)
        self.function = run

    def run(self, inputs: Mapping[str, np.ndarray]) -> Outputs:
        with torch.no_grad():
            return self.function({name: torch.from_numpy(np.asarray(v)) for name, v in inputs.items()})

    def remembering(self) -> TorchEngine:
        """The same, which computes each answer once."""
        answers: dict[bytes, Outputs] = {}

        def run(inputs: Mapping[str, torch.Tensor]) -> Outputs:
            key = b"".join(name.encode() + inputs[name].numpy().tobytes() for name in sorted(inputs))
            if key not in answers:
                answers[key] = self.function(inputs)
            return {name: output.copy() for name, output in answers[key].items()}

        return TorchEngine(run, str(self.model))


def change(engine: TorchEngine, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> TorchEngine:
    """The engine with one output edited."""

    def run(inputs: Mapping[str, torch.Tensor]) -> Outputs:
        outputs = engine.function(inputs)
        return outputs | {name: edit(outputs[name])}

    return TorchEngine(run, "changed")


def engines_of(policy: FlowPolicy, num_steps: int = STEPS) -> dict[str, TorchEngine]:
    """All graphs of a bundle, run in PyTorch in the weights' precision."""
    layers = policy.dims.vlm.layers
    dtype = policy.action_out_proj.weight.dtype

    def prefix(inputs: Mapping[str, torch.Tensor]) -> Outputs:
        keys, values, mask = Prefix(policy)(**inputs)
        return {
            "keys": keys.float().numpy(),
            "values": values.float().numpy(),
            "prefix_mask": mask.numpy(),
        }

    def ingest(inputs: Mapping[str, torch.Tensor]) -> Outputs:
        tensors = Ingest()(inputs["keys"], inputs["values"])
        names = [f"{kind}_{layer}" for kind in ("key", "value") for layer in range(layers)]
        return {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}

    def laid_out(rest: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(rest.pop(f"key_{n}").to(dtype), rest.pop(f"value_{n}").to(dtype)) for n in range(layers)]

    def decoder(inputs: Mapping[str, torch.Tensor]) -> Outputs:
        rest = dict(inputs)
        kv = laid_out(rest)
        mask, noise = rest.pop("prefix_mask"), rest.pop("noise")
        return {"actions": policy.decode(kv, mask, noise, num_steps=num_steps, **rest).numpy()}

    program = DenoiseStep(policy, num_steps)

    def decoder_step(inputs: Mapping[str, torch.Tensor]) -> Outputs:
        rest = dict(inputs)
        keys, values = zip(*laid_out(rest), strict=True)
        x, step, mask = rest.pop("x"), rest.pop("step"), rest.pop("prefix_mask")
        return {"x_next": program(x, step, list(keys), list(values), mask, **rest).numpy()}

    functions = {"prefix": prefix, "ingest": ingest, "decoder": decoder, "decoder_step": decoder_step}
    return {name: TorchEngine(function, name) for name, function in functions.items()}


@cache
def policy_of(folder: str) -> FlowPolicy:
    return load_checkpoint(GOLDEN / folder).load()


@cache
def sound_engines(folder: str) -> dict[str, TorchEngine]:
    return {name: engine.remembering() for name, engine in engines_of(policy_of(folder)).items()}


@cache
def reference_of(folder: str) -> Reference:
    checkpoint = load_checkpoint(GOLDEN / folder)
    probes = make_probes(ProbeFactsFromPolicy(checkpoint.empty))
    prefix = prefix_reference(checkpoint.load("prefix"), probes)
    return decoder_reference(checkpoint.load("decoder"), prefix, STEPS)


@cache
def sound_prefix(folder: str) -> PrefixVerdict:
    return gate_prefix(sound_engines(folder)["prefix"], reference_of(folder), FP32.prefix)


def judged(
    folder: str, caches: Mapping[str, PrefixAnswer] | None = None, **changed: TorchEngine
) -> DecoderVerdict:
    """The decoder's gates, with some engines replaced."""
    caches = caches or sound_prefix(folder).caches
    return gate_decoder(sound_engines(folder) | changed, reference_of(folder), caches, FP32, STEPS)


def only(reference: Reference, *names: str) -> Reference:
    """The reference of some of the probes."""
    probes = tuple(probe for probe in reference.probes if probe.name in names)
    return replace(reference, probes=probes, caches={name: reference.caches[name] for name in names})


def by_name(verdict: DecoderVerdict) -> dict[str, GateResult]:
    return {gate.name: gate for gate in verdict.gates}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_policy_itself_passes_every_gate(folder: str) -> None:
    reference = reference_of(folder)
    prefix, decoder = sound_prefix(folder), judged(folder)
    gates = [prefix.gate, *decoder.gates]
    assert [gate.name for gate in gates] == ["prefix", "decoder", "decoder_step", "actions"]
    assert all(gate.passed and gate.control_failed and gate.metric == MAX_RELATIVE for gate in gates)
    refuse_failed(gates)
    facts = reference.facts
    assert max(prefix.layers.keys_max + prefix.layers.values_rms) < 1e-6
    assert len(prefix.layers.keys_max) == facts.layers
    assert decoder.actions.error.shape == (facts.chunk, facts.action_dim)
    assert decoder.actions.error.max() <= 2e-6
    assert np.array_equal(decoder.actions.reference, reference.actions["full"][0, :, : facts.action_dim])
    assert relative_error(decoder.actions.compiled, decoder.actions.reference) <= 2e-6


def last_layer(values: np.ndarray) -> np.ndarray:
    values[-1] *= 1.0001
    return values


def first_layer(values: np.ndarray) -> np.ndarray:
    values[0] *= 1.0001
    return values


def one_nan(values: np.ndarray) -> np.ndarray:
    values.reshape(-1)[0] = np.nan
    return values


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("keys", first_layer),
        ("keys", last_layer),
        ("values", first_layer),
        ("values", last_layer),
        ("values", one_nan),
        ("keys", lambda keys: keys[:-1]),
        ("keys", lambda keys: keys[:, :, :-1]),
        ("prefix_mask", np.logical_not),
        ("prefix_mask", lambda mask: mask[:, 1:]),
    ],
)
def test_a_damaged_prefix_is_seen(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    engine = change(sound_engines("pi05_discrete")["prefix"], name, edit)
    verdict = gate_prefix(engine, reference_of("pi05_discrete"), FP32.prefix)
    assert not verdict.gate.passed
    assert verdict.gate.value <= 1e30, "JSON has no infinity"
    with pytest.raises(GateError, match="prefix failed"):
        refuse_failed([verdict.gate])
    if name != "prefix_mask":
        chain = by_name(judged("pi05_discrete", verdict.caches))
        assert chain["decoder"].passed, "on the reference's cache a damaged prefix does no harm"
        assert not chain["actions"].passed


@pytest.mark.parametrize("side", ["keys", "values"])
def test_the_layer_with_the_error_is_named(side: str) -> None:
    def second(values: np.ndarray) -> np.ndarray:
        values[1] += 0.5
        return values

    engine = change(sound_engines("pi0")["prefix"], side, second)
    layers = gate_prefix(engine, reference_of("pi0"), FP32.prefix).layers
    damaged, whole = (
        (layers.keys_max, layers.values_max) if side == "keys" else (layers.values_max, layers.keys_max)
    )
    assert np.argmax(damaged) == 1
    assert max(whole) < 1e-6 < damaged[1]


def test_a_damaged_token_that_is_masked_does_not_count() -> None:
    mask = reference_of("pi0").caches["padded"].mask[0]

    def masked(values: np.ndarray) -> np.ndarray:
        if values.shape[2] == len(mask):
            values[:, :, ~mask] = 7.0
        return values

    assert not mask.all()
    engine = change(sound_engines("pi0")["prefix"], "values", masked)
    padded = only(reference_of("pi0"), "padded", CONTROL_PROBE)
    assert gate_prefix(engine, padded, FP32.prefix).gate.passed


def last_action(actions: np.ndarray) -> np.ndarray:
    actions[-1, -1, -1] += 1e-3
    return actions


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("edit", [last_action, one_nan, lambda a: a[:, :-1], lambda a: a[:0], lambda a: a[0]])
def test_damaged_actions_are_seen(folder: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    engines = sound_engines(folder)
    decoder = change(engines["decoder"], "actions", edit)
    gates = by_name(judged(folder, decoder=decoder))
    assert not gates["decoder"].passed
    assert not gates["actions"].passed
    assert gates["decoder_step"].passed


def test_a_damaged_step_is_seen() -> None:
    engines = sound_engines("pi05_discrete")
    step = change(engines["decoder_step"], "x_next", last_action)
    gates = by_name(judged("pi05_discrete", decoder_step=step))
    assert not gates["decoder_step"].passed
    assert gates["decoder"].passed


def test_a_step_that_does_not_heed_its_number_is_seen() -> None:
    engines = sound_engines("pi05_discrete")
    sound = engines["decoder_step"].function
    stuck = TorchEngine(lambda inputs: sound({**inputs, "step": torch.tensor(0)}), "stuck")
    assert not by_name(judged("pi05_discrete", decoder_step=stuck))["decoder_step"].passed


def test_keys_of_another_layer_are_seen() -> None:
    def swapped(inputs: Mapping[str, torch.Tensor]) -> Outputs:
        outputs = sound_engines("pi0")["ingest"].function(inputs)
        return outputs | {"key_0": outputs["key_1"], "key_1": outputs["key_0"]}

    gates = by_name(judged("pi0", ingest=TorchEngine(swapped, "swapped")))
    assert not any(gate.passed for gate in gates.values())


@pytest.mark.parametrize("row", range(14))
def test_every_delay_counts(row: int) -> None:
    """An error in one row alone, which is one delay and one seed, fails the gate."""
    wanted = reference_of("pi05_discrete").actions[CONTROL_PROBE]
    noise = reference_of("pi05_discrete").probe(CONTROL_PROBE).decoder["noise"][row]

    def wrong(inputs: Mapping[str, torch.Tensor]) -> Outputs:
        outputs = sound_engines("pi05_discrete")["decoder"].function(inputs)
        for index, given in enumerate(inputs["noise"].numpy()):
            outputs["actions"][index] += 1e-4 * np.array_equal(given, noise)
        return outputs

    assert len(wanted) == 14
    assert not by_name(judged("pi05_discrete", decoder=TorchEngine(wrong, "wrong")))["decoder"].passed


@pytest.mark.parametrize("gate", ["prefix", "decoder", "decoder_step", "actions"])
def test_a_gate_that_cannot_see_is_refused(gate: str) -> None:
    """As on a checkpoint whose last layers are all zero."""
    reference = reference_of("pi0")
    blind = replace(
        reference,
        controls={name: reference.actions[CONTROL_PROBE][:1] for name in reference.controls},
        caches={
            name: PrefixAnswer(
                c.keys, c.values * (np.arange(len(c.values)) < 2)[:, None, None, None, None], c.mask
            )
            for name, c in reference.caches.items()
        },
    )
    if gate == "prefix":
        answers = iter(blind.caches.values())

        def run(_: object) -> Outputs:
            cache = next(answers)
            return {"keys": cache.keys, "values": cache.values, "prefix_mask": cache.mask}

        verdict = gate_prefix(TorchEngine(run, "zero"), blind, FP32.prefix).gate
    else:
        seen = replace(blind, caches=reference.caches)
        engines = sound_engines("pi0")
        verdict = by_name(gate_decoder(engines, seen, seen.caches, FP32, STEPS))[gate]
    assert verdict.passed
    assert not verdict.control_failed
    with pytest.raises(GateError, match=f"cannot tell a damaged policy from a sound one: {gate}"):
        refuse_failed([verdict])


def rounded(folder: str, dtype: torch.dtype) -> FlowPolicy:
    """A policy whose weights were stored in 16 bits and which computes in float32."""
    policy = load_checkpoint(GOLDEN / folder).load()
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return policy


@pytest.mark.parametrize("folder", FOLDERS)
def test_weights_in_16_bits_pass_by_the_noise_floor_and_not_by_fp32s_limits(folder: str) -> None:
    reference = reference_of(folder)
    limits = gate_limits(reference.floor, prefix="fp16", decoder="fp16")
    assert limits.prefix.metric == NOISE_FLOORS
    assert (limits.prefix.value, limits.decoder.metric) == (1.0, RELATIVE_RMS)
    engines = engines_of(rounded(folder, torch.float16))
    prefix = gate_prefix(engines["prefix"], reference, limits.prefix)
    decoder = gate_decoder(engines, reference, prefix.caches, limits, STEPS)
    gates = [prefix.gate, *decoder.gates]
    refuse_failed(gates)
    assert all(0 < gate.value < gate.limit for gate in gates)
    assert not gate_prefix(engines["prefix"], reference, FP32.prefix).gate.passed
    strict = by_name(gate_decoder(engines, reference, prefix.caches, FP32, STEPS))
    assert not any(gate.passed for gate in strict.values())


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_bad_16_bit_graph_fails_by_the_floor(folder: str) -> None:
    """As the accumulation in fp16 of a public recipe: an error of the order of the actions."""
    reference = reference_of(folder)
    limits = gate_limits(reference.floor, prefix="fp16", decoder="fp16")
    engines = sound_engines(folder)
    off = change(engines["decoder"], "actions", lambda a: a * (1 + 2 * reference.floor.actions))
    verdict = gate_decoder(engines | {"decoder": off}, reference, reference.caches, limits, STEPS)
    gates = by_name(verdict)
    assert not gates["decoder"].passed
    assert not gates["actions"].passed
    seeds = gate_limits(reference.floor, prefix="fp16", decoder="fp16", allow="seed")
    assert seeds.actions.value == pytest.approx(0.5 * reference.floor.seed_spread)
    assert seeds.prefix == prefix_limit("fp16", "seed")
    assert seeds.prefix.value == 10.0
    inverted = change(engines["decoder"], "actions", np.negative)
    for decoder, passes in ((off, reference.facts.real_time_chunking is False), (inverted, False)):
        gates = by_name(
            gate_decoder(engines | {"decoder": decoder}, reference, reference.caches, seeds, STEPS)
        )
        assert gates["decoder"].passed is passes
        assert gates["decoder"].control_failed


def test_bfloat16_keys_and_values_are_one_noise_floor_off() -> None:
    reference = reference_of("pi05_discrete")
    limits = gate_limits(reference.floor, prefix="bf16", decoder="fp32")
    served = load_checkpoint(GOLDEN / "pi05_discrete").load().to_bfloat16()
    gate = gate_prefix(engines_of(served)["prefix"], only(reference, CONTROL_PROBE), limits.prefix).gate
    assert gate.value == pytest.approx(1.0, rel=0.15), "but for the rounded pictures, the run of the floor"
    assert limits.decoder == FP32.decoder
    assert limits.actions.metric == RELATIVE_RMS
