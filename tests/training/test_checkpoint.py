"""Checkpoints are read strictly, and what is wrong with one is said by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from otau.runtime.errors import CheckpointError, OtauError, UsageError
from otau.toolchain.intake import load_checkpoint
from otau.toolchain.memory import peak_rss_mb, reset_peak_rss
from otau.training.policies.files import MAX_TEXT_BYTES
from otau.training.policies.keys import EMBED_TOKENS, LM_HEAD

Copy = Callable[..., Path]
OUT = "model.action_out_proj.weight"


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "train_config.json"
    document = json.loads(path.read_text())
    document["policy"].update(changes)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("policy", ["pi05", "pi0"])
def test_a_sound_checkpoint_loads_with_its_exact_weights(tiny_copy: Copy, policy: str) -> None:
    folder = tiny_copy(policy)
    stored = load_file(folder / "model.safetensors")
    checkpoint = load_checkpoint(folder)
    assert checkpoint.config.type == policy
    assert torch.equal(checkpoint.load().action_out_proj.weight, stored[OUT])
    assert torch.equal(checkpoint.load().embed_tokens.weight, stored[LM_HEAD])
    assert set(checkpoint.statistics) == {"state.min", "state.max", "action.mean", "action.std"}
    assert not any(parameter.is_meta for parameter in checkpoint.load().parameters())


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.action_out_projection.weight"] = tensors.pop(OUT)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[OUT] = tensors[OUT][:, :-1].clone()


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[OUT][1, 2] = float("nan")


def untie(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EMBED_TOKENS] = tensors[LM_HEAD] + 1


def quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors[OUT] = tensors[OUT].to(torch.float8_e4m3fn)


def empty_statistics(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "buffer_" in key]:
        tensors[key] = tensors[key][:0]


def drop_statistic(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["normalize_inputs.buffer_state.max"]


def split_statistics(tensors: dict[str, torch.Tensor]) -> None:
    tensors["unnormalize_outputs.buffer_actions.std"] = tensors["unnormalize_outputs.buffer_actions.std"] * 2


def drop_first_layer_key(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.paligemma_with_expert.gemma_expert.model.layers.0.mlp.gate_proj.weight"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename, ["1 missing", "1 unexpected", OUT, "model.action_out_projection.weight"]),
        (reshape, ["1 of another shape", f"{OUT}: expected [8, 48], got [8, 47]"]),
        (poison, ["1 not finite", OUT]),
        (quantise, ["floating-point type", f"{OUT}: torch.float8_e4m3fn"]),
        (empty_statistics, ["empty", "normalize_inputs.buffer_state.max"]),
        (untie, ["tied, but different", LM_HEAD]),
        (drop_statistic, ["1 missing", "normalize_inputs.buffer_state.max"]),
        (split_statistics, ["action.std"]),
        (drop_first_layer_key, ["gemma_expert.model.layers.0.mlp.gate_proj.weight", "did you mean"]),
    ],
)
def test_wrong_weights_are_listed(tiny_copy: Copy, change: Callable[..., None], words: list[str]) -> None:
    folder = tiny_copy()
    edit_weights(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    for word in words:
        assert word in str(caught.value)


def test_both_names_of_the_token_table_are_fine_when_equal(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    edit_weights(folder, lambda tensors: tensors.update({EMBED_TOKENS: tensors[LM_HEAD].clone()}))
    load_checkpoint(folder)


def test_no_weights(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        load_checkpoint(folder)


def test_no_configuration(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    (folder / "train_config.json").unlink()
    with pytest.raises(UsageError, match="no configuration"):
        load_checkpoint(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "missing")


def test_unknown_policy_type_names_the_known_ones(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    edit_config(folder, type="pi5")
    with pytest.raises(UsageError, match="pi0, pi05") as caught:
        load_checkpoint(folder)
    assert "did you mean" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_size": 0},
        {"chunk_size": 10**12},
        {"max_delay": -1},
        {"prompt_max_length": 0},
        {"prompt_max_length": 10**12},
        {"empty_cameras": -1},
        {"config_version": -1},
        {"proj_width": 47},
        {"resize_imgs_with_padding": [-56, -56]},
        {"delta_action_state_map": {"3": 0, "03": 1}},
        {
            "input_features": {
                "state": {"type": "STATE", "shape": [8]},
                "c": {"type": "VISUAL", "shape": [4, 56, 56]},
            }
        },
        {"chunk_size": "ten"},
        {"num_steps": -1},
        {"n_action_steps": 11},
        {"max_delay": 11},
        {"max_action_dim": 6},
        {"input_features": {}},
        {"output_features": {"actions": {"type": "ACTION", "shape": []}}},
        {"normalization_mapping": {"STATE": "MEDIAN"}},
        {"state_type": "spoken"},
        {"delta_action_state_map": {"0": 99}},
        {"delta_action_state_map": {"first": 0}},
    ],
)
def test_configurations_that_make_no_sense(tiny_copy: Copy, changes: dict[str, Any]) -> None:
    folder = tiny_copy()
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


def test_without_model_dims_the_heads_must_be_the_full_size_ones(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    (folder / "model_dims.json").unlink()
    with pytest.raises(CheckpointError, match=r"model_dims\.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"heads": 4}', "\xff"])
def test_model_dims_that_cannot_be_read(tiny_copy: Copy, text: str) -> None:
    folder = tiny_copy()
    (folder / "model_dims.json").write_text(text, encoding="latin1")
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 0},
        {"heads": "four"},
        {"heads": 4, "kv_heads": 3},
        {"heads": 8},
        {"vis_heads": 3},
        {"rope_theta": 0},
        {"rms_norm_eps": -1e-6},
        {"layers": 99},
        {"vlm_hidden": 7},
    ],
)
def test_model_dims_that_do_not_fit(tiny_copy: Copy, changes: dict[str, Any]) -> None:
    folder = tiny_copy()
    path = folder / "model_dims.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


def test_no_version_means_the_newer_epsilon_and_no_centring(tiny_copy: Copy) -> None:
    """As the golden set's formulas have it."""
    folder = tiny_copy()
    for version, eps, centred in ((None, 1e-6, False), (0, 1e-8, False), (1, 1e-6, True)):
        edit_config(folder, config_version=version)
        config = load_checkpoint(folder).config
        assert (config.eps, config.centre_degenerate) == (eps, centred)


@pytest.mark.parametrize("keep", [0, 4, 8, 1000, -1])
def test_truncated_weights(tiny_copy: Copy, keep: int) -> None:
    folder = tiny_copy()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(folder)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_headers_never_escape_the_error_tree(
    tiny_checkpoints: dict[str, Path], tmp_path: Path, data
) -> None:
    """Any byte of header or configuration may change: the loader refuses, or loads a whole policy."""
    folder = tmp_path / "fuzzed"
    folder.mkdir(exist_ok=True)
    for name in ("model.safetensors", "train_config.json", "model_dims.json"):
        content = bytearray((tiny_checkpoints["pi05"] / name).read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            limit = min(len(content), 20_000)
            content[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
        (folder / name).write_bytes(content)
    try:
        loaded = load_checkpoint(folder)
    except OtauError:
        return
    assert loaded.load().state_dict()


@given(text=st.one_of(st.text(), st.binary().map(lambda b: b.decode("latin1"))))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_as_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(OtauError):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["train_config.json", "model_dims.json", "config.json"])
def test_a_configuration_of_gigabytes_is_not_read(name: str, tiny_copy: Copy) -> None:
    path = tiny_copy() / name
    path.touch()
    os.truncate(path, MAX_TEXT_BYTES + 1 if name == "config.json" else 6 << 30)  # takes no room on the disk
    reset_peak_rss()
    before = peak_rss_mb()
    with pytest.raises(CheckpointError, match="too large"):
        load_checkpoint(path.parent)
    assert peak_rss_mb() - before < 50


VLM_LAYERS = "model.paligemma_with_expert.paligemma.model.language_model.layers."


@pytest.mark.parametrize("numbers", [range(10, 3000), ["7"], ["01"], ["x"], ["\u00b2"], [""]])
def test_layers_are_counted_by_their_numbers(numbers: Any, tiny_copy: Copy) -> None:
    folder = tiny_copy()
    extra = {f"{VLM_LAYERS}{number}.x": torch.zeros(0) for number in numbers}
    edit_weights(folder, lambda tensors: tensors.update(extra))
    with pytest.raises(CheckpointError, match="not numbered from 0 on"):
        load_checkpoint(folder)


def test_a_layer_left_out(tiny_copy: Copy) -> None:
    folder = tiny_copy()

    def move(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{VLM_LAYERS}1.")]:
            tensors[key.replace(f"{VLM_LAYERS}1.", f"{VLM_LAYERS}5.")] = tensors.pop(key)

    edit_weights(folder, move)
    with pytest.raises(CheckpointError, match="not numbered from 0 on"):
        load_checkpoint(folder)
