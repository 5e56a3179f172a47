"""The reference: PyTorch's answers, the noise floor, the negative controls, and the measures."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from otau.toolchain.gate.answers import Reference
from otau.toolchain.gate.metrics import action_rms, relative_error, relative_rms
from otau.toolchain.gate.probes import CONTROL_PROBE, make_probes
from otau.toolchain.gate.reference import (
    ProbeFactsFromPolicy,
    decoder_reference,
    gate_fold,
    prefix_reference,
    scaled,
)
from otau.toolchain.graph.programs import DenoiseStep, Prefix
from otau.toolchain.intake import load_checkpoint
from otau.toolchain.thresholds import FP32
from otau.training.policies import FlowPolicy

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
FOLDERS = ("pi05_discrete", "pi05_continuous", "pi0")
STEPS = 3

pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason=f"no golden tensors at {GOLDEN}")


@cache
def policy_of(folder: str) -> FlowPolicy:
    return load_checkpoint(GOLDEN / folder).load()


@cache
def reference_of(folder: str) -> Reference:
    checkpoint = load_checkpoint(GOLDEN / folder)
    probes = make_probes(ProbeFactsFromPolicy(checkpoint.empty))
    prefix = prefix_reference(checkpoint.load("prefix"), probes)
    return decoder_reference(checkpoint.load("decoder"), prefix, STEPS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_fold_gate(folder: str) -> None:
    policy, reference = policy_of(folder), reference_of(folder)
    program = DenoiseStep(policy, STEPS)
    gate = gate_fold(program, reference)
    assert gate.passed
    assert gate.control_failed
    program.schedule = program.schedule.roll(1, 0)
    assert not gate_fold(program, reference).passed


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("damage", [0.01, 0.5])
def test_the_prefix_control_is_what_a_damaged_policy_answers(folder: str, damage: float) -> None:
    policy, reference = policy_of(folder), reference_of(folder)
    sound = reference.caches[CONTROL_PROBE]
    with scaled(policy.vlm.layers[-1].self_attn.v_proj.weight, 1 + damage):
        inputs = reference.probe(CONTROL_PROBE).prefix
        with torch.no_grad():
            tensors = Prefix(policy)(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    keys, values, _ = (tensor.numpy() for tensor in tensors)
    assert np.array_equal(keys, sound.keys)
    assert np.array_equal(values[:-1], sound.values[:-1])
    assert relative_error(values[-1], sound.values[-1] * np.float32(1 + damage)) < 1e-6


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_decoder_controls_are_damaged_by_what_their_limits_must_see(folder: str) -> None:
    reference = reference_of(folder)
    sound, floor = reference.actions[CONTROL_PROBE][:1], reference.floor
    dims = reference.facts.action_dim
    effects = {name: action_rms(broken, sound, (0,), dims) for name, broken in reference.controls.items()}
    assert relative_error(reference.controls["fine"], sound) > 4 * FP32.actions.value
    assert 4 * floor.actions <= effects["floor"] <= 40 * floor.actions
    assert 2 * floor.seed_spread <= effects["seed"] <= 20 * floor.seed_spread


def test_scaling_a_weight_is_undone() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 3) / 3)
    before = weight.detach().clone()
    with scaled(weight, 1.01):
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)
    with pytest.raises(ZeroDivisionError), scaled(weight, 1.01):
        _ = 1 / 0
    assert torch.equal(weight, before)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_floor_is_of_the_magnitude_that_opentau_has(folder: str) -> None:
    """noise.json has the worst of all variants, in absolute RMS; the floor is of one probe, and relative."""
    reference = reference_of(folder)
    noise = json.loads((GOLDEN / folder / "noise.json").read_text())["bf16_vs_f32"]
    cache, mask = reference.caches[CONTROL_PROBE], reference.caches[CONTROL_PROBE].mask

    def rms(array: np.ndarray) -> float:
        return float(np.sqrt(np.square(array, dtype=np.float64).mean()))

    for name, floors, tensors in (
        ("key_states", reference.floor.keys, cache.keys),
        ("value_states", reference.floor.values, cache.values),
    ):
        measured = [f * rms(tensor[mask]) for f, tensor in zip(floors, tensors, strict=True)]
        assert noise[name]["rms"] / 3 < max(measured) < noise[name]["rms"] * 3
        assert min(measured) > noise[name]["rms"] / 6
    actions = reference.floor.actions * rms(reference.actions[CONTROL_PROBE][:2])
    assert noise["actions_norm"]["rms"] / 5 < actions < noise["actions_norm"]["rms"] * 3
    assert reference.floor.seed_spread > 20 * reference.floor.actions


def test_frozen_actions_are_exact_in_any_precision() -> None:
    reference = np.random.default_rng(0).standard_normal((2, 6, 4))
    free, frozen = reference.copy(), reference.copy()
    free[0, 5] += 0.01
    frozen[0, 0] += 0.01
    assert 0 < action_rms(free, reference, (2, 0), 4) < 0.1
    assert action_rms(frozen, reference, (2, 0), 4) == float("inf")
    assert action_rms(frozen, reference, (0, 0), 4) < 0.1
    tail = reference.copy()
    tail[..., 3] += 1
    assert action_rms(tail, reference, (0, 0), 3) == 0.0, "a padded dimension is no action"
    assert action_rms(reference, reference, (6, 6), 4) == 0.0


def test_relative_rms() -> None:
    reference = np.array([3.0, 4.0], np.float32)
    assert relative_rms(reference * 1.5, reference) == pytest.approx(0.5)
    assert relative_rms(reference, reference) == 0.0
    assert relative_rms(np.zeros(2), np.zeros(2)) == 0.0
    assert relative_rms(np.ones(2), np.zeros(2)) == float("inf")
    assert relative_rms(np.array([np.nan, 4.0]), reference) == float("inf")
    assert relative_rms(np.zeros(3), reference) == float("inf")


def test_relative_error() -> None:
    reference = np.array([4.0, 0.0], np.float32)
    assert relative_error(np.array([4.0, 0.2], np.float32), reference) == pytest.approx(0.05)
    assert relative_error(np.array([0.1], np.float32), np.zeros(1, np.float32)) == pytest.approx(0.1)
    assert relative_error(np.array([np.nan, 0.0], np.float32), reference) == float("inf")
    assert relative_error(np.zeros(3, np.float32), reference) == float("inf")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_half_is_loaded_without_the_other(folder: str) -> None:
    """At full size both do not fit; the answers are those of the whole policy."""
    checkpoint, reference = load_checkpoint(GOLDEN / folder), reference_of(folder)
    half = checkpoint.load("decoder")
    assert half.vlm.norm.weight.is_meta
    assert not half.expert.norm.state_dict()[next(iter(half.expert.norm.state_dict()))].is_meta
    probe, cache_of = reference.probe("full"), reference.caches["full"]
    with torch.no_grad():
        inputs = {name: torch.from_numpy(value) for name, value in probe.prefix.items()}
        keys, values, mask = Prefix(policy_of(folder))(**inputs)
    assert np.array_equal(keys, cache_of.keys)
    assert np.array_equal(values, cache_of.values)
    assert np.array_equal(mask, cache_of.mask)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_infinitely_wrong_on_either_side(value: float) -> None:
    sound, broken = np.zeros((1, 3, 2), np.float32), np.zeros((1, 3, 2), np.float32)
    broken[0, 1, 0] = value
    for got, reference in ((sound, broken), (broken, sound), (broken, broken)):
        assert relative_error(got, reference) == float("inf")
        assert relative_rms(got, reference) == float("inf")
        assert action_rms(got, reference, (0,), 2) == float("inf")
