"""LeRobot's layouts, written as its releases write them, and opened.

LeRobot does not install here: what it saves is built from its file formats and key names, and its formulas
are written out again in these tests.
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
from otau.toolchain.intake import OpenedCheckpoint, load_checkpoint
from otau.toolchain.intake.lerobot import is_lerobot, open_lerobot
from otau.training.policies.checkpoint import check_checkpoint
from otau.training.policies.keys import TRAINING_ONLY

NORMS = ("normalize_", "unnormalize_")
EXPERT_HEAD = "model.paligemma_with_expert.gemma_expert.lm_head.weight"
RNG = np.random.default_rng(0)
STATE = {
    "q01": np.linspace(-1, 0.5, 8, dtype=np.float32),
    "q99": np.linspace(1, 2, 8, dtype=np.float32),
    "mean": RNG.normal(size=8).astype(np.float32),
    "std": np.array([0, 1e-9, 0.01, 0.3, 1, 2, 5, 100], np.float32),
}
ACTION = {name: values[:7].copy() for name, values in STATE.items()}
for _statistics in (STATE, ACTION):
    _statistics["q99"][2] = _statistics["q01"][2]
    _statistics["q01"][5] = _statistics["q99"][5] = 0
    _statistics["min"], _statistics["max"] = _statistics["q01"] - 1, _statistics["q99"] + 1
    _statistics["max"][4] = _statistics["min"][4]
EPS = 1e-8


def plain_weights(source: Path) -> dict[str, torch.Tensor]:
    """The weights that act, by OpenTau's names."""
    weights = load_file(source / "model.safetensors")
    return {key: value for key, value in weights.items() if not key.startswith((*NORMS, *TRAINING_ONLY))}


def write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=4), encoding="utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in document.items() if value is not ...})


def flat(feature: str, statistics: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {f"{feature}.{name}": torch.from_numpy(values.copy()) for name, values in statistics.items()}


def write_pipelines(folder: Path, family: str, mode: str) -> None:
    features = {
        "observation.state": {"type": "STATE", "shape": [8]},
        "action": {"type": "ACTION", "shape": [7]},
    }
    norm = {
        "eps": EPS,
        "features": features,
        "norm_map": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
    }
    text = "pi0_new_line_processor" if family == "pi0" else "pi05_prepare_state_tokenizer_processor_step"
    state_file = "policy_preprocessor_step_3_normalizer_processor.safetensors"
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {
            "registry_name": "relative_actions_processor",
            "config": {"enabled": False, "exclude_joints": ["gripper"], "action_names": None},
        },
        {"registry_name": "normalizer_processor", "config": norm, "state_file": state_file},
        {"registry_name": text, "config": {}},
        {
            "registry_name": "tokenizer_processor",
            "config": {
                "max_length": 90,
                "padding_side": "right",
                "tokenizer_name": "google/paligemma-3b-pt-224",
            },
        },
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
    ]
    back_file = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    after = [
        {"registry_name": "unnormalizer_processor", "config": norm, "state_file": back_file},
        {"registry_name": "absolute_actions_processor", "config": {"enabled": False}},
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
    ]
    write_json(folder / "policy_preprocessor.json", {"name": "policy_preprocessor", "steps": before})
    write_json(folder / "policy_postprocessor.json", {"name": "policy_postprocessor", "steps": after})
    everything = flat("observation.state", STATE) | flat("action", ACTION)
    everything["observation.images.top.mean"] = torch.zeros(3, 1, 1)
    save_file(everything, folder / state_file)
    save_file(everything, folder / back_file)


@pytest.fixture
def lerobot(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint as LeRobot 0.6 saves it."""

    def write(family: str, mode: str = "QUANTILES") -> Path:
        source, folder = tiny(family), tmp_path / "lerobot"
        folder.mkdir()
        weights = plain_weights(source) | {EXPERT_HEAD: torch.zeros(4, 4)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model_dims.json").write_bytes((source / "model_dims.json").read_bytes())
        write_pipelines(folder, family, mode)
        camera = {"type": "VISUAL", "shape": [3, 480, 640]}
        write_json(
            folder / "config.json",
            {
                "type": family,
                "n_obs_steps": 1,
                "input_features": {
                    "observation.images.top": camera,
                    "observation.state": {"type": "STATE", "shape": [8]},
                    "observation.images.wrist": camera,
                    "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 56, 56]},
                },
                "output_features": {"action": {"type": "ACTION", "shape": [7]}},
                "device": "cuda",
                "use_amp": False,
                "use_peft": False,
                "push_to_hub": True,
                "repo_id": "somebody/policy",
                "paligemma_variant": "gemma_2b",
                "action_expert_variant": "gemma_300m",
                "dtype": "float32",
                "chunk_size": 10,
                "n_action_steps": 5,
                "max_state_dim": 8 if family == "pi0" else 12,
                "max_action_dim": 8,
                "num_inference_steps": 7,
                "time_sampling_beta_alpha": 1.5,
                "min_period": 0.004,
                "max_period": 4.0,
                "use_relative_actions": False,
                "relative_exclude_joints": ["gripper"],
                "action_feature_names": None,
                "rtc_config": None,
                "image_resolution": [56, 56],
                "empty_cameras": 1,
                "tokenizer_max_length": 90,
                "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
                "freeze_vision_encoder": False,
                "train_expert_only": False,
                "optimizer_lr": 2.5e-05,
                "scheduler_warmup_steps": 1000,
            },
        )
        return folder

    return write


def same_weights(opened: OpenedCheckpoint, source: Path) -> None:
    """The policy that is opened has the weights of the one it was written from, and passes their check."""
    checkpoint = check_checkpoint(opened.folder, opened.weights, opened.config, opened.head_dims)
    original = load_checkpoint(source)
    assert checkpoint.weights.keys() == original.weights.keys()
    for name, tensor in original.weights.items():
        assert torch.equal(checkpoint.weights[name].read(), tensor.read()), name


def theirs(mode: str, low: torch.Tensor, high: torch.Tensor) -> tuple[Callable, Callable]:
    """LeRobot's formulas since 0.4, in float32: forth and back."""
    if mode == "MEAN_STD":
        return lambda x: (x - low) / (high + EPS), lambda x: x * high + low
    spread = high - low
    spread = torch.where(spread == 0, torch.tensor(EPS), spread)
    return lambda x: 2 * (x - low) / spread - 1, lambda x: (x + 1) * spread / 2 + low


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_weights_and_configuration_are_those_that_were_saved(lerobot, tiny, family):
    folder = lerobot(family)
    assert is_lerobot(folder)
    opened = open_lerobot(folder)
    same_weights(opened, tiny(family))
    config = opened.config
    assert list(config.cameras()) == ["observation.images.top", "observation.images.wrist"]
    assert set(config.cameras().values()) == {(56, 56)}
    assert (config.type, config.chunk_size, config.n_action_steps, config.num_steps) == (family, 10, 5, 7)
    assert (config.state_dim, config.action_dim, config.empty_cameras) == (8, 7, 1)
    assert (config.image_padding, config.image_resize, config.image_fill) == ("centre", "bilinear", 0.0)
    assert (config.eps, config.centre_degenerate, config.state_text_dtype) == (0.0, False, "float32")
    assert (config.prompt_max_length, config.tokenizer_max_length) == (90, 90)
    assert config.delta_action_state_map is None
    if family == "pi05":
        assert config.prompt_template == "Task: {task}, State: {state};\nAction: "
        assert (config.clean_task, config.state_bins, config.state_text_dims) == (True, "digitize", None)
    else:
        assert (config.prompt_template, config.clean_task, config.state_bins) == (None, False, "clip")
    assert {path.name for path in opened.files} >= {"model.safetensors", "policy_preprocessor.json"}


@pytest.mark.parametrize("mode", ["QUANTILES", "MEAN_STD", "MIN_MAX"])
def test_states_and_actions_are_scaled_as_lerobot_scales_them(lerobot, mode):
    opened = open_lerobot(lerobot("pi05", mode))
    checkpoint = check_checkpoint(opened.folder, opened.weights, opened.config)
    low, high = {"QUANTILES": ("q01", "q99"), "MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max")}[mode]
    ours = {"QUANTILES": "QUANTILE"}.get(mode, mode)
    head = np.zeros(200, np.int64)

    def normaliser(kind: str) -> Normaliser:
        prefix = f"{kind}."
        values = {k.removeprefix(prefix): v for k, v in checkpoint.statistics.items() if k.startswith(prefix)}
        return Normaliser(ours, values, eps=opened.config.eps, centre_degenerate=False)

    states = RNG.normal(size=(200, 8)).astype(np.float32)
    states[:50] = STATE[low]
    forth, _ = theirs(mode, torch.from_numpy(STATE[low]), torch.from_numpy(STATE[high]))
    constant = STATE[high] == (0 if mode == "MEAN_STD" else STATE[low])
    expected, got = forth(torch.from_numpy(states)).numpy(), normaliser("state").normalise(states, head)
    np.testing.assert_array_equal(got[:, ~constant], expected[:, ~constant])
    np.testing.assert_array_equal(got[:50], expected[:50])  # constant dimensions at their value
    np.testing.assert_array_equal(np.clip(got, -1, 1), np.clip(expected, -1, 1))

    actions = RNG.normal(size=(200, 7)).astype(np.float32)
    _, back = theirs(mode, torch.from_numpy(ACTION[low]), torch.from_numpy(ACTION[high]))
    expected, got = back(torch.from_numpy(actions)).numpy(), normaliser("action").unnormalise(actions, head)
    np.testing.assert_allclose(got, expected, rtol=3e-7, atol=3e-7)
    assert np.isfinite(normaliser("action").normalise(actions, head)).all()


def test_the_tenth_quantiles_are_quantiles(lerobot):
    folder = lerobot("pi05")
    for pipeline, feature, wide in (("pre", "observation.state", STATE), ("post", "action", ACTION)):
        path = folder / f"policy_{pipeline}processor.json"
        document = json.loads(path.read_text())
        (step,) = [step for step in document["steps"] if "state_file" in step]
        step["config"]["norm_map"] = {"STATE": "QUANTILE10", "ACTION": "QUANTILE10"}
        write_json(path, document)
        named = {"q10": wide["q01"] / 2, "q90": wide["q99"] / 2 + 1}
        save_file(flat(feature, named), folder / step["state_file"])
    opened = open_lerobot(folder)
    assert opened.config.normalization_mapping["STATE"] == "QUANTILE"
    q99 = opened.weights["normalize_inputs.buffer_state.q99"].read()
    np.testing.assert_array_equal(q99[0], STATE["q99"] / 2 + 1)


@pytest.mark.parametrize(
    ("changes", "training", "release", "fill", "bins", "times"),
    [
        ({}, None, None, 0.0, None, "multiples"),
        ({"use_relative_actions": ..., "freeze_vision_encoder": ...}, None, None, -1.0, 12, "sum"),
        ({"use_relative_actions": ...}, {"seed": 1}, None, -1.0, 12, "multiples"),
        (
            {"use_relative_actions": ...},
            {"seed": 1, "cudnn_deterministic": False},
            None,
            0.0,
            None,
            "multiples",
        ),
        ({"use_relative_actions": ...}, None, "0.4.2", -1.0, 12, "sum"),
        ({"use_relative_actions": ...}, None, "0.4.3", -1.0, 12, "multiples"),
        ({"use_relative_actions": ...}, None, "0.5.0", 0.0, None, "multiples"),
        ({}, None, "0.4.0", -1.0, 12, "sum"),
        ({}, None, "1.0.0rc1", 0.0, None, "multiples"),
    ],
)
def test_what_the_releases_do_differently_follows_the_release(
    lerobot, changes, training, release, fill, bins, times
):
    folder = lerobot("pi05")
    edit_json(folder / "config.json", **changes)
    if training is not None:
        write_json(folder / "train_config.json", training)
    if release is not None:
        write_json(folder / "otau.json", {"lerobot_version": release})
    config = open_lerobot(folder).config
    assert (config.image_fill, config.state_text_dims, config.flow_times) == (fill, bins, times)


def test_an_unknown_release_is_asked_for_only_where_it_matters(lerobot):
    folder = lerobot("pi05")
    edit_json(folder / "config.json", use_relative_actions=...)
    with pytest.raises(CheckpointError, match=r"LeRobot 0\.4 and 0\.5 would act differently") as caught:
        open_lerobot(folder)
    assert "otau.json" in str(caught.value)
    features = json.loads((folder / "config.json").read_text())["input_features"]
    for name in ("observation.images.top", "observation.images.wrist"):
        features[name]["shape"] = [3, 256, 256]
    edit_json(folder / "config.json", input_features=features, max_state_dim=8)
    assert open_lerobot(folder).config.image_fill == 0.0


def test_relative_actions_leave_out_the_excluded_joints(lerobot):
    folder = lerobot("pi05")
    names = ["shoulder.pos", "elbow.pos", "wrist.pos", "Gripper_left.pos", "a", "b", "c"]
    edit_json(folder / "config.json", use_relative_actions=True)
    for pipeline, config in (
        ("pre", {"enabled": True, "exclude_joints": ["gripper"], "action_names": names}),
        ("post", {"enabled": True}),
    ):
        path = folder / f"policy_{pipeline}processor.json"
        document = json.loads(path.read_text())
        for step in document["steps"]:
            if step["registry_name"] in ("relative_actions_processor", "absolute_actions_processor"):
                step["config"] = config
        write_json(path, document)
    expected = {str(i): i for i in (0, 1, 2, 4, 5, 6)}
    assert open_lerobot(folder).config.delta_action_state_map == expected
    document["steps"][1]["config"] = {"enabled": False}
    write_json(folder / "policy_postprocessor.json", document)
    with pytest.raises(CheckpointError, match="do not agree on whether actions are relative"):
        open_lerobot(folder)


def old_key(key: str) -> str:
    """A weight's name before transformers 4.52."""
    paligemma = "model.paligemma_with_expert.paligemma."
    for new, old in (
        (f"{paligemma}model.language_model.", f"{paligemma}language_model.model."),
        (f"{paligemma}model.", paligemma),
        (f"{paligemma}lm_head.", f"{paligemma}language_model.lm_head."),
    ):
        if key.startswith(new):
            return old + key.removeprefix(new)
    return key


@pytest.fixture
def old(lerobot, tiny) -> Callable[..., Path]:
    """A pi0 as LeRobot 0.3 saves it, with the names of an old transformers."""

    def write(mode: str = "MEAN_STD", **changes: Any) -> Path:
        folder = lerobot("pi0")
        for path in folder.glob("policy_*"):
            path.unlink()
        low, high = ("mean", "std") if mode == "MEAN_STD" else ("min", "max")
        weights = {old_key(key): value for key, value in plain_weights(tiny("pi0")).items()}
        for buffer, values in (
            ("normalize_inputs.buffer_observation_state", STATE),
            ("normalize_targets.buffer_action", ACTION),
            ("unnormalize_outputs.buffer_action", ACTION),
        ):
            for name in (low, high):
                weights[f"{buffer}.{name}"] = torch.from_numpy(values[name].copy())
        save_file(weights, folder / "model.safetensors")
        gone = ("paligemma_variant", "action_expert_variant", "image_resolution", "num_inference_steps")
        edit_json(
            folder / "config.json",
            **dict.fromkeys((*gone, "use_relative_actions", "freeze_vision_encoder"), ...),
            **{
                "resize_imgs_with_padding": [56, 56],
                "num_steps": 6,
                "proj_width": 48,
                "adapt_to_pi_aloha": False,
                "attention_implementation": "eager",
                "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
            }
            | changes,
        )
        return folder

    return write


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX"])
def test_the_old_layout_has_its_statistics_among_its_weights(old, tiny, mode):
    folder = old(mode)
    assert is_lerobot(folder)
    opened = open_lerobot(folder)
    same_weights(opened, tiny("pi0"))
    config = opened.config
    assert (config.image_padding, config.num_steps, config.prompt_template) == ("left_top", 6, None)
    assert config.flow_times == "sum"
    checkpoint = check_checkpoint(opened.folder, opened.weights, config)
    low, high = ("mean", "std") if mode == "MEAN_STD" else ("min", "max")
    values = {name: checkpoint.statistics[f"state.{name}"] for name in (low, high)}
    normaliser = Normaliser(mode, values, eps=config.eps, centre_degenerate=config.centre_degenerate)
    states = torch.randn(100, 8)
    first, second = (torch.from_numpy(STATE[name]) for name in (low, high))
    if mode == "MEAN_STD":
        expected = (states - first) / (second + 1e-8)
    else:
        expected = (states - first) / (second - first + 1e-8) * 2 - 1
    got = normaliser.normalise(states.numpy(), np.zeros(100, np.int64))
    constant = (second == (0 if mode == "MEAN_STD" else first)).numpy()
    np.testing.assert_array_equal(got[:, ~constant], expected.numpy()[:, ~constant])


def _adapter(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    key = "model.paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(weights | {key: torch.zeros(2, 2)}, folder / "model.safetensors")


def _step(folder: Path, name: str, **changes: Any) -> None:
    path = folder / "policy_preprocessor.json"
    document = json.loads(path.read_text())
    for step in document["steps"]:
        if step["registry_name"] == name:
            step.update(changes)
    write_json(path, document)


def _no_statistics(folder: Path) -> None:
    save_file(flat("action", ACTION), folder / "policy_preprocessor_step_3_normalizer_processor.safetensors")


def _infinite(folder: Path) -> None:
    statistics = {name: np.full(8, np.inf, np.float32) for name in STATE}
    path = folder / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    save_file(flat("observation.state", statistics), path)


def _swapped(folder: Path) -> None:
    statistics = {"q01": STATE["q99"], "q99": STATE["q01"]}
    path = folder / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    save_file(flat("observation.state", statistics), path)


def _configure(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


REFUSED = {
    "another policy": (_configure(type="pi0_fast"), "'pi0_fast', which otau does not compile"),
    "an adapter": (_configure(use_peft=True), "use_peft"),
    "adapter weights": (_adapter, "LoRA adapters"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "an unknown setting": (_configure(use_visual_memory=True), "use_visual_memory = True"),
    "a setting of another type": (_configure(chunk_size="ten"), "not valid"),
    "a state without dimensions": (
        _configure(input_features={"observation.state": {"type": "STATE", "shape": []}}),
        "feature's shape",
    ),
    "another period": (_configure(min_period=0.1), "min_period"),
    "a history": (_configure(n_obs_steps=2), "n_obs_steps"),
    "guidance": (_configure(rtc_config={"enabled": True}), "rtc_config"),
    "an oblong picture": (_configure(image_resolution=[56, 112]), "pictures' size"),
    "a chunk out of range": (_configure(n_action_steps=11), "n_action_steps"),
    "no pipeline": (lambda folder: (folder / "policy_preprocessor.json").unlink(), "pipeline .* is missing"),
    "no pipeline behind": (lambda folder: (folder / "policy_postprocessor.json").unlink(), "is missing"),
    "a broken pipeline": (
        lambda folder: (folder / "policy_preprocessor.json").write_text('{"steps": [1]}'),
        "is not valid",
    ),
    "an unknown step": (
        lambda folder: _step(folder, "to_batch_processor", registry_name="smooth_processor"),
        "smooth_processor",
    ),
    "a missing step": (
        lambda folder: _step(
            folder, "pi05_prepare_state_tokenizer_processor_step", registry_name="to_batch_processor"
        ),
        "one pi05_prepare_state",
    ),
    "rounded inputs": (
        lambda folder: _step(folder, "device_processor", config={"float_dtype": "bfloat16"}),
        "rounds its inputs",
    ),
    "an escaping file": (
        lambda folder: _step(folder, "normalizer_processor", state_file="../model.safetensors"),
        "leaves its folder",
    ),
    "normalised pictures": (
        lambda folder: _step(
            folder, "normalizer_processor", config={"norm_map": {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD"}}
        ),
        "pictures are normalised",
    ),
    "an unknown normalisation": (
        lambda folder: _step(folder, "normalizer_processor", config={"norm_map": {"STATE": "RANK"}}),
        "RANK",
    ),
    "no statistics": (_no_statistics, "statistics for QUANTILES are missing"),
    "infinite statistics": (_infinite, "not finite"),
    "swapped statistics": (_swapped, "do not fit each other"),
    "an unknown fact": (
        lambda folder: write_json(folder / "otau.json", {"lerobot_versoin": "0.4"}),
        "did you mean 'lerobot_version'",
    ),
    "half a release": (
        lambda folder: write_json(folder / "otau.json", {"lerobot_version": "0.4"}),
        "with all three numbers",
    ),
    "a release without pipelines": (
        lambda folder: write_json(folder / "otau.json", {"lerobot_version": "0.3.3"}),
        "none that saves pipelines",
    ),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_what_would_act_differently_is_refused_by_name(lerobot, damage):
    folder = lerobot("pi05")
    change, message = REFUSED[damage]
    change(folder)
    with pytest.raises(OtauError, match=f"(?s){message}"):
        open_lerobot(folder)


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX"])
def test_the_old_layout_without_statistics_is_refused(old, monkeypatch, mode):
    for name in STATE:
        monkeypatch.setitem(STATE, name, np.full(8, np.inf, np.float32))
    with pytest.raises(CheckpointError, match="not finite"):
        open_lerobot(old(mode))


def test_what_the_old_layout_could_do_is_refused(old):
    with pytest.raises(CheckpointError, match="adapt_to_pi_aloha"):
        open_lerobot(old(adapt_to_pi_aloha=True))


def test_a_policy_of_another_name_is_a_usage_error(lerobot):
    folder = lerobot("pi05")
    edit_json(folder / "config.json", type="smolvla")
    assert is_lerobot(folder)
    with pytest.raises(UsageError, match="smolvla"):
        open_lerobot(folder)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 100)
    | st.floats()
    | st.sampled_from(["", "STATE", "pi05", "../x"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["a", "eps"]), values),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_any_value_anywhere_in_a_file_is_opened_or_refused(lerobot, tmp_path, data):
    folder = tmp_path / "lerobot"
    folder = folder if folder.exists() else lerobot("pi05")
    names = ("config.json", "policy_preprocessor.json", "policy_postprocessor.json")
    path = folder / data.draw(st.sampled_from(names))
    text = path.read_text()
    document = node = json.loads(text)
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
            node = inner
            continue
        node[key] = data.draw(JSON)
        break
    write_json(path, document)
    try:
        with contextlib.suppress(OtauError):
            is_lerobot(folder)
            open_lerobot(folder)
    finally:
        path.write_text(text)


def test_lerobot_is_told_from_others_by_content(lerobot, tiny, tmp_path):
    folder = lerobot("pi05")
    outer = tmp_path / "000040"
    (outer / "training_state").mkdir(parents=True)
    folder.rename(outer / "pretrained_model")
    assert is_lerobot(outer)
    assert open_lerobot(outer).folder == outer / "pretrained_model"
    assert not is_lerobot(tiny("pi05"))
    assert not is_lerobot(tmp_path)
    published = json.loads((tiny("pi05") / "train_config.json").read_text())["policy"]
    write_json(tmp_path / "config.json", published)
    assert not is_lerobot(tmp_path)
    (tmp_path / "config.json").write_text("[")
    assert not is_lerobot(tmp_path)
