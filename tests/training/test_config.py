"""Configurations: what OpenTau's say, what otau's own keys say, and what no policy can be compiled from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otau.runtime.errors import CheckpointError, UsageError
from otau.toolchain.intake import load_checkpoint
from otau.training import random_checkpoint
from otau.training.policies import FAMILIES, PrefixInputs
from otau.training.policies.config import Feature, PolicyConfig, check_config, read_config
from otau.training.policies.flow import flow_times
from otau.training.random_checkpoint import SIZES, random_config, write_random_checkpoint

Copy = Callable[..., Path]
TINY = random_config("pi05", SIZES["tiny"])
HERE = Path("here")


def changed(**changes: Any) -> PolicyConfig:
    return msgspec.structs.replace(TINY, **changes)


def written(folder: Path, **keys: Any) -> PolicyConfig:
    """Read back what a file says."""
    (folder / "config.json").write_text(json.dumps(msgspec.to_builtins(TINY) | keys))
    return read_config(folder, tuple(FAMILIES))


def test_otaus_own_keys_are_told_from_opentaus(tmp_path: Path) -> None:
    own = {
        "prompt_template": "{task} {state}",
        "clean_task": True,
        "state_bins": "digitize",
        "state_text_dims": 3,
        "state_text_dtype": "float32",
        "norm_eps": 0.0,
        "image_padding": "centre",
        "image_resize": "pillow",
        "image_fill": -1.0,
        "flow_times": "multiples",
    }
    assert written(tmp_path, **own) == TINY
    config = written(tmp_path, **{f"otau_{name}": value for name, value in own.items()})
    assert {name: getattr(config, name) for name in own} == own
    assert msgspec.convert(msgspec.to_builtins(config), PolicyConfig) == config


def test_a_misspelt_key_of_otaus_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="did you mean 'otau_clean_task'"):
        written(tmp_path, otau_cleantask=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_template": "pick it up"}, "otau_prompt_template"),
        ({"prompt_template": "{task} {task}"}, "otau_prompt_template"),
        ({"prompt_template": "{task} {goal}"}, "otau_prompt_template"),
        ({"state_text_dims": 0}, "otau_state_text_dims"),
        ({"state_text_dims": 9}, "otau_state_text_dims"),
        ({"norm_eps": -1e-9}, "otau_norm_eps"),
        ({"norm_eps": float("nan")}, "otau_norm_eps"),
        ({"image_fill": float("inf")}, "otau_image_fill"),
        ({"delta_action_state_map": {"7": 0}}, "below 7"),
        ({"delta_action_state_map": {"0": 8}}, "below 8"),
        ({"delta_action_state_map": {"-1": 0}}, "-1 -> 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        check_config(changed(**changes), HERE)
    assert caught.value.fix


@given(
    st.dictionaries(
        st.integers(-2, 9).map(str) | st.text(max_size=3), st.integers(-2, 10), min_size=1, max_size=3
    )
)
def test_relative_actions_name_dimensions_that_are_there(mapping: dict[str, int]) -> None:
    sound = all(action in "0123456" and action and 0 <= state < 8 for action, state in mapping.items())
    sound = sound and all(len(action) == 1 for action in mapping)
    try:
        check_config(changed(delta_action_state_map=mapping), HERE)
    except CheckpointError:
        assert not sound
    else:
        assert sound


@pytest.mark.parametrize(
    ("key", "value"), [("advantage", "off"), ("otau_state_bins", "round"), ("state_type", 1)]
)
def test_unknown_choices_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=key):
        written(tmp_path, **{key: value})


def test_empty_cameras_are_not_the_robots() -> None:
    empty = {f"observation.images.empty_camera_{i}": Feature("VISUAL", (3, 480, 640)) for i in range(2)}
    features = TINY.input_features | empty
    both = changed(input_features=features, empty_cameras=2, resize_imgs_with_padding=None)
    check_config(both, HERE)
    assert both.cameras() == TINY.cameras()
    # Only as many as are configured: another camera may have such a name.
    one = changed(input_features=features, empty_cameras=1)
    assert list(one.cameras()) == ["camera0", "camera1", "observation.images.empty_camera_1"]


def test_cameras_of_several_sizes_need_a_common_one() -> None:
    features = TINY.input_features | {"camera1": Feature("VISUAL", (3, 56, 42))}
    check_config(changed(input_features=features), HERE)
    with pytest.raises(CheckpointError, match="do not share one picture size(.|\n)*resize_imgs_with_padding"):
        check_config(changed(input_features=features, resize_imgs_with_padding=None), HERE)


@pytest.mark.parametrize("resized", [True, False])
def test_pictures_need_not_be_square_nor_224(tmp_path: Path, monkeypatch, resized: bool) -> None:
    """42 x 70 pixels with patches of 14: three rows of five, as the position table has them."""
    vision = dataclasses.replace(SIZES["tiny"].dims.vision, height=42, width=70)
    dims = dataclasses.replace(SIZES["tiny"].dims, vision=vision)
    monkeypatch.setitem(random_checkpoint.SIZES, "wide", dataclasses.replace(SIZES["tiny"], dims=dims))
    folder = tmp_path / "wide"
    write_random_checkpoint(folder, "pi05", "wide")
    if not resized:
        edit(folder, resize_imgs_with_padding=None)
    checkpoint = load_checkpoint(folder)
    assert set(checkpoint.config.cameras().values()) == {(42, 70)}
    assert checkpoint.dims.vision.tokens == 15
    pictures = PrefixInputs(
        torch.zeros(1, 2, 3, 42, 70),
        torch.ones(1, 2, dtype=torch.bool),
        torch.zeros(1, 4, dtype=torch.int64),
        torch.ones(1, 4, dtype=torch.bool),
    )
    with torch.no_grad():
        _, _, mask = checkpoint.load("prefix").prefix(pictures)
    assert mask.shape == (1, 2 * 15 + 4)


def test_a_picture_size_that_is_not_the_position_tables_is_refused(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    edit(folder, resize_imgs_with_padding=[224, 224])
    with pytest.raises(
        CheckpointError, match=r"position_embedding\.weight: expected \[256, 32\], got \[16, 32\]"
    ):
        load_checkpoint(folder)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "train_config.json"
    document = json.loads(path.read_text())
    document["policy"].update(changes)
    path.write_text(json.dumps(document))


def test_flow_times_are_a_running_sum_or_multiples() -> None:
    multiples = flow_times(10, "multiples")
    assert multiples.dtype == torch.float32
    assert multiples.tolist() == [pytest.approx(1 - step / 10, abs=1e-7) for step in range(10)]
    summed = flow_times(10)
    assert summed[2].item() == torch.tensor(0.79999995).item()
    assert multiples[2].item() == torch.tensor(0.8).item()
    assert not torch.equal(summed, multiples)


def test_a_policy_decodes_at_the_flow_times_of_its_configuration(tiny_copy: Copy) -> None:
    answers, folder = {}, tiny_copy("pi0")
    for rule in ("sum", "multiples"):
        edit(folder, otau_flow_times=rule)
        policy = load_checkpoint(folder).load()
        vlm, chunk = policy.dims.vlm, policy.config.chunk_size
        random = torch.Generator().manual_seed(0)
        cache = [
            (
                torch.randn(1, 1, vlm.head_dim, 5, generator=random),
                torch.randn(1, 1, 5, vlm.head_dim, generator=random),
            )
            for _ in range(vlm.layers)
        ]
        with torch.no_grad():
            answers[rule] = policy.decode(
                cache,
                torch.ones(1, 5, dtype=torch.bool),
                torch.randn(1, chunk, policy.config.max_action_dim, generator=random),
                state=torch.zeros(1, policy.config.max_state_dim),
            )
    difference = (answers["sum"] - answers["multiples"]).abs().max()
    assert 0 < difference < 1e-3


def test_cameras_are_counted() -> None:
    picture = Feature("VISUAL", (3, 224, 224))

    def with_cameras(count: int) -> PolicyConfig:
        state = {name: f for name, f in TINY.input_features.items() if f.type != "VISUAL"}
        return changed(input_features=state | {f"camera{number}": picture for number in range(count)})

    check_config(with_cameras(16), HERE)
    with pytest.raises(CheckpointError, match="at most 16 features of type VISUAL"):
        check_config(with_cameras(17), HERE)


@pytest.mark.parametrize("index", ["1" * 5000, "\u00b2", "\u0661", "01", "-1", "", "1000000000"])
def test_an_action_index_is_a_short_plain_number(index: str) -> None:
    with pytest.raises(CheckpointError, match="a dimension that is not there"):
        check_config(changed(delta_action_state_map={index: 0}), HERE)


@pytest.mark.parametrize("shape", [[10**18], [3, 70_000, 4], [1] * 9, [10**30]])
def test_shapes_are_bounded_when_they_are_read(shape: list[int], tmp_path: Path) -> None:
    features = {"state": {"type": "STATE", "shape": shape}}
    with pytest.raises(CheckpointError, match=r"<= (65536|8)"):
        written(tmp_path, input_features=features)


@pytest.mark.parametrize("kind", ["pi05" * 500_000, ["pi05"] * 100_000, {"a": [[[]]]}, None])
def test_an_unknown_type_is_named_in_short(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown policy type") as refused:
        written(tmp_path, type=kind)
    assert len(str(refused.value)) < 1000
