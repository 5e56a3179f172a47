"""openpi's PyTorch layout, written as its converter and its training write it, and opened.

openpi's own code cannot run here (it needs JAX): the layout is built from its file formats and key names, and
its formulas are written out again in these tests.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from otau.runtime.errors import CheckpointError, OtauError, UsageError
from otau.runtime.normalise import Normaliser
from otau.toolchain.intake import load_checkpoint
from otau.toolchain.intake.lerobot import is_lerobot
from otau.toolchain.intake.openpi import is_openpi, open_openpi
from otau.training.policies.checkpoint import check_checkpoint
from otau.training.policies.keys import TRAINING_ONLY

NORMS = ("normalize_", "unnormalize_")
RNG = np.random.default_rng(0)


def statistics(width: int) -> dict[str, list[float]]:
    """With a constant dimension 2, away from 0."""
    low = RNG.normal(size=width)
    spread = RNG.uniform(0.1, 4, size=width)
    spread[2] = 0
    return {
        "mean": (low + spread / 2).tolist(),
        "std": (spread / 4).tolist(),
        "q01": low.tolist(),
        "q99": (low + spread).tolist(),
    }


STATE, ACTION = statistics(6), statistics(7)
FACTS = {
    "cameras": ["base_0_rgb", "left_wrist_0_rgb"],
    "delta_action_state_map": {"0": 0, "5": 5},
    "discrete_state_input": True,
}


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")


@pytest.fixture
def openpi(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint as openpi's converter saves it, with otau.json beside."""

    def write(family: str, **facts: Any) -> Path:
        source, folder = tiny(family), tmp_path / "openpi"
        folder.mkdir()
        weights = {
            key.removeprefix("model."): value
            for key, value in load_file(source / "model.safetensors").items()
            if not key.startswith((*NORMS, *TRAINING_ONLY))
        }
        weights["paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.zeros(4, 4)
        save_file(weights, folder / "model.safetensors")
        (folder / "model_dims.json").write_bytes((source / "model_dims.json").read_bytes())
        write_json(
            folder / "config.json",
            {
                "action_dim": 8,
                "action_horizon": 10,
                "paligemma_variant": "gemma_2b",
                "action_expert_variant": "gemma_300m",
                "precision": "bfloat16",
            },
        )
        write_json(
            folder / "assets" / "physical-intelligence" / "libero" / "norm_stats.json",
            {"norm_stats": {"state": STATE, "actions": ACTION}},
        )
        stated = FACTS | ({"discrete_state_input": None} if family == "pi0" else {}) | facts
        stated = {key: value for key, value in stated.items() if value is not None}
        write_json(folder / "otau.json", stated)
        return folder

    return write


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_weights_and_configuration_are_those_that_were_saved(openpi, tiny, family):
    folder = openpi(family)
    assert is_openpi(folder)
    assert not is_lerobot(folder)
    opened = open_openpi(folder)
    checkpoint = check_checkpoint(folder, opened.weights, opened.config)
    original = load_checkpoint(tiny(family))
    assert checkpoint.weights.keys() == original.weights.keys()
    for name, tensor in original.weights.items():
        assert torch.equal(checkpoint.weights[name].read(), tensor.read()), name
    config = opened.config
    assert config.type == family
    assert config.cameras() == {"base_0_rgb": (56, 56), "left_wrist_0_rgb": (56, 56)}
    assert (config.chunk_size, config.n_action_steps, config.num_steps) == (10, 10, 10)
    assert (config.state_dim, config.action_dim, config.max_state_dim, config.max_action_dim) == (6, 7, 8, 8)
    assert config.delta_action_state_map == {"0": 0, "5": 5}
    assert (config.image_padding, config.image_resize, config.image_fill) == ("centre", "pillow", 0.0)
    assert (config.clean_task, config.state_text_dims, config.state_text_dtype) == (True, None, "float32")
    assert config.eps == 0
    if family == "pi05":
        assert config.prompt_template == "Task: {task}, State: {state};\nAction: "
        assert (config.state_bins, config.prompt_max_length) == ("digitize", 200)
        assert config.normalization_mapping["STATE"] == "QUANTILE"
    else:
        assert (config.prompt_template, config.tokenizer_max_length) == (None, 48)
        assert config.normalization_mapping["STATE"] == "MEAN_STD"
    names = {path.name for path in opened.files}
    assert names == {"model.safetensors", "norm_stats.json", "otau.json"}


@pytest.mark.parametrize("quantiles", [True, False])
def test_states_and_actions_are_scaled_as_openpi_scales_them(openpi, quantiles):
    opened = open_openpi(openpi("pi05", use_quantile_norm=quantiles))
    checkpoint = check_checkpoint(opened.folder, opened.weights, opened.config)
    low, high = ("q01", "q99") if quantiles else ("mean", "std")

    def normaliser(kind: str) -> Normaliser:
        values = {name: checkpoint.statistics[f"{kind}.{name}"] for name in (low, high)}
        mode = opened.config.normalization_mapping[kind.upper()]
        return Normaliser(mode, values, eps=opened.config.eps, centre_degenerate=False)

    head = np.zeros(300, np.int64)
    first, second = np.array(STATE[low]), np.array(STATE[high])
    states = RNG.normal(size=(300, 6))
    states[:100, 2] = first[2]
    if quantiles:
        expected = (states - first) / (second - first + 1e-6) * 2 - 1
    else:
        expected = (states - first) / (second + 1e-6)
    got = normaliser("state").normalise(states.astype(np.float32), head)
    usual = np.arange(6) != 2
    np.testing.assert_allclose(got[:, usual], expected[:, usual], rtol=2e-6, atol=2e-5)
    np.testing.assert_array_equal(got[:100, 2], -1 if quantiles else 0)

    first, second = np.array(ACTION[low]), np.array(ACTION[high])
    actions = RNG.normal(size=(300, 7))
    if quantiles:
        expected = (actions + 1) / 2 * (second - first + 1e-6) + first
    else:
        expected = actions * (second + 1e-6) + first
    got = normaliser("action").unnormalise(actions.astype(np.float32), head)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_a_pi05_without_the_state_in_its_prompt_has_pi0s(openpi):
    config = open_openpi(openpi("pi05", discrete_state_input=False)).config
    assert (config.prompt_template, config.clean_task) == ("{task}\n", True)


def test_statistics_that_are_padded_need_the_widths(openpi):
    folder = openpi("pi0")
    path = folder / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    padded = {name: [*values, 9.0, 9.0] for name, values in STATE.items()}
    write_json(path, {"norm_stats": {"state": padded, "actions": ACTION}})
    with pytest.raises(CheckpointError, match="width of the robot's state is not stated") as caught:
        open_openpi(folder)
    assert "state_dim in otau.json" in str(caught.value)
    facts = json.loads((folder / "otau.json").read_text()) | {"state_dim": 6}
    write_json(folder / "otau.json", facts)
    opened = open_openpi(folder)
    assert opened.config.state_dim == 6
    np.testing.assert_allclose(opened.weights["normalize_inputs.buffer_state.mean"].read()[0], STATE["mean"])


def test_what_openpi_does_not_say_is_asked_for_with_an_example(openpi):
    folder = openpi("pi05")
    (folder / "otau.json").unlink()
    with pytest.raises(UsageError, match="does not say what robot it is for") as caught:
        open_openpi(folder)
    assert caught.value.fix is not None
    example = json.loads(caught.value.fix.partition("for example ")[2])
    write_json(folder / "otau.json", example | {"state_dim": 6})
    opened = open_openpi(folder)
    check_checkpoint(folder, opened.weights, opened.config)


def test_several_assets_need_one_named(openpi):
    folder = openpi("pi0")
    write_json(folder / "assets" / "droid" / "norm_stats.json", {"norm_stats": {}})
    with pytest.raises(CheckpointError, match="not one set of normalisation statistics"):
        open_openpi(folder)
    facts = json.loads((folder / "otau.json").read_text()) | {"asset_id": "physical-intelligence/libero"}
    write_json(folder / "otau.json", facts)
    assert open_openpi(folder).config.state_dim == 6


def _adapter(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    key = "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(weights | {key: torch.zeros(2, 2)}, folder / "model.safetensors")


def _no_flow(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "time_mlp" not in key}
    save_file(kept, folder / "model.safetensors")


def _state(folder: Path, facts: dict[str, Any]) -> None:
    path = folder / "otau.json"
    known = json.loads(path.read_text()) | facts
    write_json(path, {key: value for key, value in known.items() if value is not None})


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    write_json(path, json.loads(path.read_text()) | changes)


def _statistics(folder: Path, document: Any) -> None:
    write_json(folder / "assets" / "physical-intelligence" / "libero" / "norm_stats.json", document)


SHORT = {"norm_stats": {"state": STATE | {"q99": [1.0]}, "actions": ACTION}}
SWAPPED = {"norm_stats": {"state": STATE, "actions": ACTION | {"q01": ACTION["q99"], "q99": ACTION["q01"]}}}
INFINITE = {"norm_stats": {"state": STATE | {"q01": [1e300] * 6}, "actions": ACTION}}

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapters": (_adapter, "LoRA adapters"),
    "a LoRA variant": (lambda f: _config(f, paligemma_variant="gemma_2b_lora"), "trained with LoRA"),
    "a policy without flow": (_no_flow, "policy that otau does not compile"),
    "a broken config": (lambda f: (f / "config.json").write_text("["), "not a JSON object"),
    "an unknown fact": (lambda f: _state(f, {"camera": []}), "did you mean 'cameras'"),
    "no cameras": (lambda f: _state(f, {"cameras": []}), "names no camera"),
    "an unknown camera": (lambda f: _state(f, {"cameras": ["base_1_rgb"]}), "no such camera"),
    "no word on relative actions": (
        lambda f: _state(f, {"delta_action_state_map": None}),
        "missing required field `delta_action_state_map`",
    ),
    "relative to what is not there": (
        lambda f: _state(f, {"delta_action_state_map": {"0": 6}}),
        "delta_action_state_map",
    ),
    "no word on the prompt": (lambda f: _state(f, {"discrete_state_input": None}), "whether the prompt"),
    "two lengths of the chunk": (lambda f: _state(f, {"chunk_size": 50}), "length of the action chunk"),
    "no length of the chunk": (lambda f: _config(f, action_horizon=None), "length of the action chunk"),
    "a width beyond the statistics": (lambda f: _state(f, {"state_dim": 7}), "state_dim does not fit"),
    "no statistics": (lambda f: (f / "assets").rename(f / "other"), "statistics"),
    "statistics of another mode": (
        lambda f: _statistics(f, {"norm_stats": {"state": {"mean": [0]}, "actions": ACTION}}),
        "statistics of the state are not those of QUANTILE",
    ),
    "statistics of two lengths": (lambda f: _statistics(f, SHORT), "statistics of the state"),
    "statistics beyond float32": (lambda f: _statistics(f, INFINITE), "not finite"),
    "quantiles that are swapped": (lambda f: _statistics(f, SWAPPED), "upper quantile below the lower"),
    "statistics that are a list": (lambda f: _statistics(f, []), "not a JSON object"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_what_would_act_differently_is_refused_by_name(openpi, damage):
    folder = openpi("pi05")
    change, message = REFUSED[damage]
    change(folder)
    with pytest.raises(OtauError, match=message):
        open_openpi(folder)


def test_a_pi0_with_the_state_in_its_prompt_is_refused(openpi):
    with pytest.raises(CheckpointError, match="pi0 with the state in its prompt"):
        open_openpi(openpi("pi0", discrete_state_input=True))


def test_statistics_outside_of_the_checkpoint_are_not_read(openpi, tmp_path):
    folder = openpi("pi0")
    inner = folder / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    inner.rename(tmp_path / "norm_stats.json")
    inner.symlink_to(tmp_path / "norm_stats.json")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        open_openpi(folder)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 100)
    | st.floats()
    | st.sampled_from(["", "base_0_rgb", "../x"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["a", "0"]), values),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_any_value_anywhere_in_a_file_is_opened_or_refused(openpi, tmp_path, data):
    folder = tmp_path / "openpi"
    folder = folder if folder.exists() else openpi("pi05")
    names = ("config.json", "otau.json", "assets/physical-intelligence/libero/norm_stats.json")
    path = folder / data.draw(st.sampled_from(names))
    text = path.read_text()
    document = node = json.loads(text)
    while True:
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
            node = inner
            continue
        node[key] = data.draw(JSON)
        break
    write_json(path, document)
    try:
        with contextlib.suppress(OtauError):
            is_openpi(folder)
            open_openpi(folder)
    finally:
        path.write_text(text)


def test_openpi_is_told_from_others_by_content(openpi, tiny, tmp_path):
    assert not is_openpi(tiny("pi05"))
    assert not is_openpi(tmp_path)
    folder = openpi("pi0")
    _config(folder, type="pi0")
    assert not is_openpi(folder)
