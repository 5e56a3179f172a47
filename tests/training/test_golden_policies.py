"""The PyTorch policies against tensors made by OpenTau's own code: every variant of every folder."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from otau.runtime.images import pixels_from_image
from otau.runtime.normalise import Normaliser
from otau.toolchain.intake import load_checkpoint
from otau.training.policies import Checkpoint, FlowPolicy, PrefixInputs, StateTokens, lay_out
from otau.training.policies.flow import flow_times, time_sincos
from otau.training.policies.flow_policy import Cache, prefix_attention_mask, prefix_positions
from otau.training.policies.pi0 import suffix_mask

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
FOLDERS = ("pi05_discrete", "pi05_continuous", "pi0")
CASES = [
    f"{folder}/{file.name}"
    for folder in FOLDERS
    for file in sorted((GOLDEN / folder).glob("io*.safetensors"))
]

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden tensors at {GOLDEN}")

# Suggested bars of the golden set's README; what was seen is about a tenth of them.
BARS = {
    "pixels": 2e-5, "image_emb": 2e-5, "prefix_embs": 2e-5, "cache": 2e-5, "prefix_out": 2e-5,
    "state_norm": 2e-6, "sincos": 1e-12, "time_cond": 2e-6, "velocity": 5e-5, "actions": 2e-5,
}  # fmt: skip


@functools.cache
def checkpoint(folder: str) -> Checkpoint:
    return load_checkpoint(GOLDEN / folder)


class Case:
    """One variant: its inputs and OpenTau's outputs."""

    def __init__(self, name: str, dtype: str = "float32") -> None:
        self.dtype = dtype
        folder, file = name.split("/")
        tensors = load_file(GOLDEN / name)
        self.given = {k.removeprefix("inputs/"): v for k, v in tensors.items() if k.startswith("inputs/")}
        self.wanted = {k.removeprefix("outputs/"): v for k, v in tensors.items() if k.startswith("outputs/")}
        self.facts = json.loads((GOLDEN / folder / "cases.json").read_text())[file]
        self.checkpoint = checkpoint(folder)
        self.policy: FlowPolicy = self.checkpoint.load()
        self.config = self.checkpoint.config
        self.heads = self.given["dataset_index"].numpy()

    def normaliser(self, kind: str) -> Normaliser:
        mode = self.config.normalization_mapping["STATE" if kind == "state" else "ACTION"]
        statistics = {
            k.partition(".")[2]: v for k, v in self.checkpoint.statistics.items() if k.startswith(f"{kind}.")
        }
        return Normaliser(
            mode,
            statistics,
            eps=self.config.eps,
            centre_degenerate=self.config.centre_degenerate,
            dtype=self.dtype,
            name=kind,
        )

    def pixels(self) -> list[Tensor]:
        """Cameras that are there, in the configuration's order, then masked placeholders."""
        (height, width), *_ = self.config.cameras().values()
        images = [self.given[f"image{i}"] for i in range(9) if f"image{i}" in self.given]
        pixels = [torch.from_numpy(pixels_from_image(image.numpy(), height, width)) for image in images]
        if self.dtype == "bfloat16":
            pixels = [image.bfloat16().float() for image in pixels]
        return pixels + [torch.full_like(pixels[0], -1.0)] * self.facts["empty_cameras"]

    def padded(self, vector: Tensor, width: int) -> Tensor:
        return torch.nn.functional.pad(vector, (0, width - vector.shape[-1]))

    def state(self) -> Tensor:
        normalised = self.normaliser("state").normalise(self.given["state"].numpy(), self.heads)
        return torch.from_numpy(normalised)

    def prefix_inputs(self) -> PrefixInputs:
        pixels = self.pixels()
        masks = torch.ones(len(pixels[0]), len(pixels), dtype=torch.bool)
        masks[:, len(pixels) - self.facts["empty_cameras"] :] = False
        tokens = None
        if "state_open_ids" in self.given:
            state = self.padded(self.state(), self.config.max_state_dim)
            tokens = StateTokens(state, self.given["state_open_ids"], self.given["state_close_ids"])
        images = torch.stack(pixels, dim=1)
        return PrefixInputs(images, masks, self.given["lang_tokens"], self.given["lang_masks"], tokens)

    def decoder_inputs(self) -> dict[str, Tensor]:
        inputs = {}
        if "action_prefix" in self.given:
            raw = self.given["action_prefix"].numpy()
            rows = torch.zeros_like(self.given["noise"])
            normalised = self.normaliser("action").normalise(raw, self.heads)
            rows[:, : raw.shape[1], : raw.shape[2]] = torch.from_numpy(normalised)
            inputs = {"action_prefix": rows, "delay": self.given["delay"].expand(len(rows))}
        if self.policy.state_in_decoder:
            inputs["state"] = self.padded(self.state(), self.config.max_state_dim)
        return inputs


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def assert_close(got: Tensor, wanted: Tensor, bar: str, rows: Tensor | None = None) -> None:
    assert got.shape == wanted.shape
    error = (got - wanted).abs()
    worst = (error if rows is None else error[rows]).max().item()
    assert worst <= BARS[bar], f"{bar}: {worst:.3g} > {BARS[bar]:g}"


def test_prefix(case: Case) -> None:
    for j, image in enumerate(case.pixels()):
        assert_close(image, case.wanted[f"pixels_{j}"], "pixels")
        assert_close(case.policy.vision(image), case.wanted[f"image_emb_{j}"], "image_emb")
    assert f"pixels_{len(case.pixels())}" not in case.wanted
    assert_close(case.state(), case.wanted["state_norm"], "state_norm")

    embedded, mask = case.policy.embed_prefix(case.prefix_inputs())
    assert torch.equal(mask, case.wanted["prefix_pad_masks"])
    assert_close(embedded, case.wanted["prefix_embs"], "prefix_embs", mask)
    assert torch.equal(prefix_positions(mask), case.wanted["prefix_position_ids"])
    assert torch.equal(prefix_attention_mask(mask), case.wanted["prefix_att_2d_mask"])

    keys, values, out = case.policy.vlm.encode(embedded, prefix_positions(mask), prefix_attention_mask(mask))
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        assert_close(key, case.wanted[f"key_states_{layer}"], "cache", mask)
        assert_close(value, case.wanted[f"value_states_{layer}"], "cache", mask)
    assert f"key_states_{len(keys)}" not in case.wanted
    assert_close(out, case.wanted["prefix_out"], "prefix_out", mask)


class Trace:
    """What the policy computes on its way: x and v of every step, the expert's input and output."""

    def __init__(self, policy: FlowPolicy) -> None:
        self.policy = policy
        self.x: list[Tensor] = []
        self.v: list[Tensor] = []
        self.suffix: list[Tensor] = []
        self.suffix_out: list[Tensor] = []

    def __enter__(self) -> Trace:
        velocity, decode = self.policy.velocity, self.policy.expert.decode

        def traced_velocity(x: Tensor, *rest) -> Tensor:
            self.x.append(x)
            self.v.append(velocity(x, *rest))
            return self.v[-1]

        def traced_decode(x: Tensor, *rest) -> Tensor:
            self.suffix.append(x)
            self.suffix_out.append(decode(x, *rest))
            return self.suffix_out[-1]

        self.policy.velocity, self.policy.expert.decode = traced_velocity, traced_decode
        return self

    def __exit__(self, *error: object) -> None:
        del self.policy.velocity, self.policy.expert.decode


def cache_of(case: Case) -> tuple[Cache, Tensor]:
    keys, values, mask = case.policy.prefix(case.prefix_inputs())
    return lay_out(keys, values), mask


def test_decoder(case: Case) -> None:
    policy, noise = case.policy, case.given["noise"]
    cache, mask = cache_of(case)
    inputs = case.decoder_inputs()
    chunk = noise.shape[1]

    length = chunk + int(policy.state_in_decoder)
    own = suffix_mask(length) if policy.state_in_decoder else torch.ones(length, length, dtype=torch.bool)
    wanted_mask = case.wanted["suffix_att_2d_mask"]
    prefix_part = mask[:, None].expand(-1, length, -1)
    assert torch.equal(torch.cat([prefix_part, own.expand(len(mask), -1, -1)], -1), wanted_mask)
    assert torch.equal(policy.suffix_positions(mask, length), case.wanted["suffix_position_ids"])

    for t, wanted in zip(case.wanted["probe_t"], case.wanted["probe_v_t"], strict=True):
        condition = policy.time_condition(t.expand(1, chunk))
        assert_close(policy.velocity(noise, condition, cache, mask, inputs.get("state")), wanted, "velocity")

    steps = int(case.given["num_steps"])
    with Trace(policy) as trace:
        actions = policy.decode(cache, mask, noise, num_steps=steps, **inputs)
    assert_close(torch.stack(trace.v), case.wanted["v_t"], "velocity")
    assert_close(torch.stack([*trace.x, actions]), case.wanted["x_t"], "actions")
    assert_close(trace.suffix[0], case.wanted["suffix_embs_step0"], "prefix_embs")
    assert_close(trace.suffix_out[0], case.wanted["suffix_out_step0"], "velocity")
    assert_close(actions, case.wanted["actions_norm"], "actions")
    raw = case.normaliser("action").unnormalise(actions[..., : case.config.action_dim].numpy(), case.heads)
    assert_close(torch.from_numpy(raw), case.wanted["actions"], "actions")


def test_flow_time(case: Case) -> None:
    times = flow_times(int(case.given["num_steps"]))
    # One time a row; frozen rows have 0 instead.
    assert torch.equal(times, case.wanted["step_time"].flatten(1)[:, -1])
    width = case.policy.dims.expert.hidden
    sincos = time_sincos(case.wanted["probe_t"], width)
    assert_close(sincos, case.wanted["time_sincos_f64"], "sincos")
    if "time_cond_step0" in case.wanted:
        delay = int(case.given["delay"]) if "action_prefix" in case.given else 0
        rows = torch.where(torch.arange(case.given["noise"].shape[1]) < delay, 0.0, 1.0)
        assert_close(case.policy.conditioning(rows)[None], case.wanted["time_cond_step0"], "time_cond")
    if "probe_time_cond" in case.wanted:
        assert_close(
            case.policy.conditioning(case.wanted["probe_t"]), case.wanted["probe_time_cond"], "time_cond"
        )


@pytest.mark.parametrize(
    "name", [case for case in CASES if case.endswith(("/io.safetensors", "_padded.safetensors"))]
)
def test_weights_rounded_as_opentaus_loader_does(name: str) -> None:
    """Golden tensors of OpenTau's own loader tell whether our exact loading is the only difference."""
    case = Case(name)
    wanted = load_file(GOLDEN / name.replace("/io", "/f32_rounded_weights"))
    policy = load_checkpoint(GOLDEN / name.split("/")[0]).load()
    # The loader leaves these in float32.
    exact = ("vision.tower.embeddings", "action_", "time_mlp", "state_proj", "expert.norm")
    for parameter_name, parameter in policy.named_parameters():
        if not parameter_name.startswith(exact):
            parameter.data = parameter.data.bfloat16().float()
    case.policy = policy
    cache, mask = cache_of(case)
    actions = policy.decode(cache, mask, case.given["noise"], **case.decoder_inputs())
    assert_close(actions, wanted["outputs/actions_norm"], "actions")


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_serving_path(name: str) -> None:
    """The policy is no further from OpenTau's bfloat16 than that is from float32: the noise floor."""
    case = Case(name, dtype="bfloat16")
    folder = name.split("/")[0]
    wanted = load_file(GOLDEN / name.replace("/io", "/bf16"))
    case.policy = load_checkpoint(GOLDEN / folder).load().to_bfloat16()
    cache, mask = cache_of(case)
    assert cache[0][0].dtype == torch.bfloat16
    steps = int(case.given["num_steps"])
    actions = case.policy.decode(cache, mask, case.given["noise"], num_steps=steps, **case.decoder_inputs())
    assert actions.dtype == torch.float32
    error = (actions - wanted["outputs/actions_norm"]).numpy()
    noise = json.loads((GOLDEN / folder / "noise.json").read_text())
    floor = noise["bf16_vs_f32"]["actions_norm"]["rms"]
    assert 0 < np.sqrt((error**2).mean()) <= floor
