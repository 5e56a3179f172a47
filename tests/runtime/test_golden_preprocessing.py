"""Letterbox, normalisation and state bins against the tensors that OpenTau's own code made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize

from otau.runtime.images import letterbox, letterbox_size, pixels_from_image
from otau.runtime.normalise import Normaliser, round_to_bfloat16
from otau.runtime.prompt import fill_template, state_bins, state_text

KINDS = {"F32": np.float32, "I64": np.int64, "BF16": np.uint16}


def load(path: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for name, entry in deserialize(path.read_bytes()):
        array = np.frombuffer(entry["data"], KINDS[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX", "QUANTILE"])
def test_normalisation_is_the_golden_one_to_the_bit(golden, mode, version, dtype):
    tensors = load(golden / "preproc/normalize.safetensors")
    statistics = {name.removeprefix("stats/"): value for name, value in tensors.items() if "stats/" in name}
    normaliser = Normaliser(
        mode, statistics, eps=(1e-8, 1e-6)[version], centre_degenerate=version == 1, dtype=dtype
    )
    head = tensors["dataset_index"]
    case = f"{mode}/v{version}/{'f32' if dtype == 'float32' else 'bf16'}"
    actions = normaliser.normalise(tensors["x_actions"], head)
    np.testing.assert_array_equal(
        normaliser.normalise(tensors["x_state"], head), tensors[f"{case}/norm_state"]
    )
    np.testing.assert_array_equal(actions, tensors[f"{case}/norm_actions"])
    np.testing.assert_array_equal(
        normaliser.unnormalise(tensors["u_actions"], head), tensors[f"{case}/unnorm_u_actions"]
    )
    roundtrip = normaliser.unnormalise(actions, head)
    expected = tensors[f"{case}/roundtrip_actions"]
    if dtype == "float32":
        np.testing.assert_array_equal(roundtrip, expected)
    else:
        # The golden round trip rounds each step to bfloat16, `unnormalise` none: three half units in
        # the last of 8 bits, of the largest term.
        first = statistics[{"MEAN_STD": "mean", "MIN_MAX": "min", "QUANTILE": "q01"}[mode]][head]
        largest = np.maximum(np.abs(expected), np.abs(first)[:, None])
        assert np.all(np.abs(roundtrip - expected) <= 3 * 2.0**-8 * 2 * largest)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_state_bins_and_strings_are_exact(golden, dtype):
    tensors = load(golden / "preproc/discrete_state.safetensors")
    strings = json.loads((golden / "preproc/discrete_state.json").read_text())
    bins = state_bins(tensors[f"state_{dtype}"])
    np.testing.assert_array_equal(bins, tensors[f"bins_{dtype}"])
    assert [state_text(row) for row in bins] == strings[f"strings_{dtype}"]


def test_bfloat16_rounding_is_the_golden_cast(golden):
    tensors = load(golden / "preproc/discrete_state.safetensors")
    np.testing.assert_array_equal(round_to_bfloat16(tensors["state_f32"]), tensors["state_bf16"])


@pytest.mark.parametrize("folder", ["pi05_discrete", "pi05_continuous", "pi0"])
def test_prompts_are_the_golden_strings(golden, folder):
    template = json.loads((golden / "preproc/discrete_state.json").read_text())["prompt_template"][folder]
    cases = json.loads((golden / folder / "cases.json").read_text())
    compared = 0
    for file, case in cases.items():
        if not file.startswith("io"):
            continue
        inputs = load_named(golden / folder / file, "outputs/state_norm")
        for row, (task, expected) in enumerate(zip(case["tasks"], case["prompt_strings"], strict=True)):
            state = state_text(state_bins(inputs["outputs/state_norm"][row]))
            assert fill_template(template, task, state) == expected
            compared += 1
    assert compared


def load_named(path: Path, *names: str) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as tensors:
        return {name: tensors.get_tensor(name) for name in names}


@pytest.mark.parametrize("index", range(6))
def test_letterbox_is_the_golden_one(golden, index):
    tensors = load(golden / "preproc/letterbox.safetensors")
    case = json.loads((golden / "preproc/letterbox.json").read_text())[f"img{index}"]
    height, width = case["target_hw"]
    image = tensors[f"img{index}/input"]
    assert list(letterbox_size(*case["input_hw"], height, width)) == case["resized_hw"]
    np.testing.assert_allclose(
        letterbox(image, height, width), tensors[f"img{index}/letterbox"], rtol=0, atol=2e-5
    )
    np.testing.assert_allclose(
        pixels_from_image(image, height, width), tensors[f"img{index}/pixels"], rtol=0, atol=2e-5
    )
    # In bfloat16 the golden result is computed in float32 and rounded once: one unit in the last place.
    rounded = round_to_bfloat16(letterbox(round_to_bfloat16(image), height, width))
    np.testing.assert_allclose(rounded, tensors[f"img{index}/letterbox_bf16"], rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize("folder", ["pi05_discrete", "pi05_continuous", "pi0"])
def test_odd_images_reach_the_golden_pixels(golden, folder):
    path = golden / folder / "io_odd_images.safetensors"
    names = [f"inputs/image{i}" for i in range(2)] + [f"outputs/pixels_{i}" for i in range(2)]
    tensors = load_named(path, *names)
    for index in range(2):
        expected = tensors[f"outputs/pixels_{index}"]
        pixels = pixels_from_image(tensors[f"inputs/image{index}"], *expected.shape[2:])
        np.testing.assert_allclose(pixels, expected, rtol=0, atol=2e-5)
