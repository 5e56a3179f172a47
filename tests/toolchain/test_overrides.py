"""What the user knows of a checkpoint, end to end: golden weights in PyTorch behind the runtime's `Policy`.

The engines are stand-ins that run the PyTorch policy instead of its compiled graphs, which the overrides do
not change; `test_golden_bundles.py` holds the graphs against the same tensors.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from otau.runtime import ActionChunk, Policy
from otau.runtime.errors import CheckpointError, UsageError
from otau.runtime.prefix import LocalPrefix
from otau.runtime.recorded import RecordedInputs, read_recorded
from otau.toolchain.intake import load_checkpoint
from otau.toolchain.manifest import ManifestFromCheckpoint, head_names
from otau.toolchain.overrides import Overrides, apply_overrides, padded_dims, select_head
from otau.toolchain.targets import find_target
from otau.training.policies import Checkpoint, FlowPolicy, PrefixInputs, StateTokens, lay_out

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
BAR = 2e-5

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden tensors at {GOLDEN}")


@dataclass
class Resident:
    array: np.ndarray

    def numpy(self) -> np.ndarray:
        return self.array

    def shape(self) -> tuple[int, ...]:
        return self.array.shape


class Torch:
    """An engine of one program of a PyTorch policy."""

    def __init__(self, program) -> None:
        self.program, self.model = program, "PyTorch"

    def run_resident(self, inputs):
        given = {
            name: torch.from_numpy(np.asarray(value.numpy() if isinstance(value, Resident) else value))
            for name, value in inputs.items()
        }
        with torch.no_grad():
            return {name: Resident(tensor.numpy()) for name, tensor in self.program(given).items()}

    def run(self, inputs):
        return {name: tensor.numpy() for name, tensor in self.run_resident(inputs).items()}

    def close(self) -> None: ...


@cache
def loaded(folder: str) -> tuple[Checkpoint, FlowPolicy]:
    checkpoint = load_checkpoint(GOLDEN / folder)
    return checkpoint, checkpoint.load()


def run(
    checkpoint: Checkpoint, network: FlowPolicy, recorded: RecordedInputs, steps: int = 10
) -> ActionChunk:
    """What the runtime makes of a recording with this checkpoint's manifest and statistics."""

    def prefix(given):
        state = (given.get("state"), given.get("state_open"), given.get("state_close"))
        tokens = None if state[0] is None else StateTokens(*state)
        pictures = (given[name] for name in ("images", "image_masks", "tokens", "token_masks"))
        keys, values, mask = network.prefix(PrefixInputs(*pictures, tokens))
        return {"keys": keys, "values": values, "prefix_mask": mask}

    def decoder(given):
        kv = lay_out(given.pop("keys"), given.pop("values"))
        mask, noise = given.pop("prefix_mask"), given.pop("noise")
        return {"actions": network.decode(kv, mask, noise, num_steps=steps, **given)}

    manifest = manifest_of(checkpoint)
    grouped = {"state": {}, "action": {}}
    for key, value in checkpoint.statistics.items():
        kind, _, name = key.partition(".")
        grouped[kind][name] = value
    bundle = SimpleNamespace(manifest=manifest, path="here", stats=lambda: grouped, tokenizer=lambda: None)
    policy = Policy(bundle, LocalPrefix(bundle, Torch(prefix)), Torch(lambda given: given), Torch(decoder))
    return policy.decode_batch(
        policy.ingest(policy.prefix_batch(recorded.batch)),
        noise=recorded.noise,
        action_prefix=recorded.action_prefix,
        delay=recorded.delay,
    )


def manifest_of(checkpoint: Checkpoint):
    return ManifestFromCheckpoint(
        checkpoint,
        target=find_target("cpu", None)[0],
        precision="fp32",
        num_steps=10,
        tokenizer=None,
        graphs={},
        gates=(),
    )


def recording(case: str, checkpoint: Checkpoint | None = None) -> tuple[RecordedInputs, np.ndarray]:
    """A golden case's inputs and actions."""
    path = GOLDEN / f"{case}.safetensors"
    checkpoint = checkpoint or loaded(case.split("/")[0])[0]
    return read_recorded(path, manifest_of(checkpoint)), load_file(path)["outputs/actions"]


def without_head(recorded: RecordedInputs) -> RecordedInputs:
    return replace(recorded, batch=replace(recorded.batch, dataset_index=None))


def with_config(checkpoint: Checkpoint, **changes) -> Checkpoint:
    return replace(checkpoint, config=msgspec.structs.replace(checkpoint.config, **changes))


@pytest.mark.parametrize(
    "case", ["pi05_continuous/io", "pi05_continuous/io_delay3", "pi05_discrete/io", "pi0/io"]
)
def test_the_stand_ins_reach_the_golden_actions(case: str) -> None:
    recorded, wanted = recording(case)
    assert np.abs(run(*loaded(case.split("/")[0]), recorded).actions - wanted).max() <= BAR


@pytest.mark.parametrize("name", ["armB::joint", "1", "org/ds1"])
def test_a_selected_head_is_the_only_one_and_needs_no_choice(name: str) -> None:
    checkpoint, network = loaded("pi05_continuous")
    selected = select_head(checkpoint, name)
    assert head_names(selected) == ("armB::joint",)
    assert {len(value) for value in selected.statistics.values()} == {1}
    recorded, wanted = recording("pi05_continuous/io")
    assert recorded.batch.dataset_index.tolist() == [1]
    assert np.abs(run(selected, network, without_head(recorded)).actions - wanted).max() <= BAR
    other = run(select_head(checkpoint, "armA::joint"), network, without_head(recorded)).actions
    assert np.abs(other - wanted).max() > 0.1
    # A row of the whole checkpoint is not one of the bundle's any more.
    with pytest.raises(UsageError, match=r"0\.\.0 \(armB::joint\)"):
        run(selected, network, recorded)


def test_without_a_choice_several_heads_are_a_warning_and_then_a_refusal(caplog) -> None:
    checkpoint, network = loaded("pi05_continuous")
    with caplog.at_level(logging.WARNING):
        both = apply_overrides(checkpoint, Overrides())
    assert "2 heads" in caplog.text
    assert "armA::joint, armB::joint" in caplog.text
    with pytest.raises(UsageError, match="several normalisation heads"):
        run(both, network, without_head(recording("pi05_continuous/io")[0]))


def test_an_unknown_head_names_the_nearest() -> None:
    for name in ("armB::jont", "2", "org/ds9"):
        with pytest.raises(UsageError, match=r"--norm-head(.|\n)*armA::joint"):
            apply_overrides(loaded("pi05_continuous")[0], Overrides(norm_head=name))


def test_actions_of_true_width_are_the_golden_ones_without_the_tail(caplog) -> None:
    checkpoint, network = loaded("pi05_continuous")
    recorded, wanted = recording("pi05_continuous/io")
    with caplog.at_level(logging.WARNING):
        narrow = apply_overrides(checkpoint, Overrides(action_dims=7, norm_head="1"))
    assert "action" not in caplog.text
    manifest = manifest_of(narrow)
    assert (manifest.action.dim, manifest.action.max_dim, len(manifest.action.names)) == (7, 8, 7)
    actions = run(narrow, network, without_head(recorded)).actions
    assert actions.shape[-1] == 7
    assert np.abs(actions - wanted[..., :7]).max() <= BAR


@pytest.mark.parametrize("version", [0, 1])
def test_committed_actions_of_true_width_are_padded_before_they_are_normalised(version: int) -> None:
    """A constant dimension of version 0 normalises to -1: zeros put in afterwards would be another input."""
    checkpoint, network = loaded("pi05_continuous")
    checkpoint = with_config(checkpoint, config_version=version)
    recorded, _ = recording("pi05_continuous/io_delay3")
    wide = recorded.action_prefix.copy()
    wide[..., 7] = 0
    whole = run(checkpoint, network, replace(recorded, action_prefix=wide)).actions
    narrow = apply_overrides(checkpoint, Overrides(action_dims=7))
    given = replace(recorded, action_prefix=wide[..., :7])
    np.testing.assert_array_equal(run(narrow, network, given).actions, whole[..., :7])


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("folder", ["pi05_continuous", "pi0"])
def test_a_state_of_true_width_is_padded_before_it_is_normalised(folder: str, version: int) -> None:
    checkpoint, network = loaded(folder)
    modes = checkpoint.config.normalization_mapping | {"STATE": "MIN_MAX"}
    checkpoint = with_config(checkpoint, config_version=version, normalization_mapping=modes)
    mean, std = (checkpoint.statistics[f"state.{name}"] for name in ("mean", "std"))
    ranges = {"state.min": mean - std, "state.max": mean + std}
    checkpoint = replace(checkpoint, statistics=checkpoint.statistics | ranges)
    recorded, _ = recording(f"{folder}/io")
    width = checkpoint.config.state_dim - 2
    state = recorded.batch.state.copy()
    state[:, width:] = 0
    whole = run(checkpoint, network, replace(recorded, batch=replace(recorded.batch, state=state)))
    narrow = apply_overrides(checkpoint, Overrides(state_dims=width))
    assert manifest_of(narrow).state.dim == width
    given = replace(recorded, batch=replace(recorded.batch, state=state[:, :width]))
    np.testing.assert_array_equal(run(narrow, network, given).normalised, whole.normalised)


@pytest.mark.parametrize("mode", ["MIN_MAX", "IDENTITY"])
def test_a_prompt_goes_on_listing_padded_dimensions(mode: str) -> None:
    checkpoint, _ = loaded("pi05_discrete")
    modes = checkpoint.config.normalization_mapping | {"STATE": mode}
    checkpoint = with_config(checkpoint, normalization_mapping=modes)
    if mode == "IDENTITY":
        kept = {key: value for key, value in checkpoint.statistics.items() if "state" not in key}
        checkpoint = replace(checkpoint, statistics=kept)
    manifest = manifest_of(apply_overrides(checkpoint, Overrides(state_dims=6)))
    assert (manifest.state.dim, manifest.prompt.state_dims) == (6, 8)


def test_padding_that_shows_is_a_warning_with_the_flag(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        apply_overrides(loaded("pi05_discrete")[0], Overrides())
    assert "the last 1 of 8 action dimensions are constant zero" in caplog.text
    assert "--action-dims 7" in caplog.text
    assert "--state-dims 6" in caplog.text
    caplog.clear()
    apply_overrides(loaded("pi05_discrete")[0], Overrides(action_dims=7, state_dims=6))
    assert not caplog.records
    apply_overrides(loaded("pi05_discrete")[0], Overrides(action_dims=5, state_dims=6))
    assert "leaves out dimensions that are not constant" in caplog.text


def test_padding_is_zero_in_every_head() -> None:
    rows = np.float32([[1, 0, 0, 0], [1, 0, 2, 0]])
    assert padded_dims({"action.mean": rows, "action.std": np.ones((2, 4), np.float32)}, "action") == 1
    assert padded_dims({"action.q01": rows, "action.q99": rows * 0 + 3}, "action") == 0
    assert padded_dims({"action.min": rows * 0, "action.max": rows * 0}, "action") == 4
    assert padded_dims({"action.min": rows}, "state") == 0


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"action_dims": 9}, "--action-dims"),
        ({"action_dims": 0}, "--action-dims"),
        ({"state_dims": 9}, "--state-dims"),
        ({"state_dims": -1}, "--state-dims"),
        ({"absent_cameras": ("camera2",)}, "--absent-camera(.|\n)*did you mean 'camera[01]'"),
        ({"absent_cameras": ("camera0", "camera1")}, "no camera would be left"),
    ],
)
def test_choices_that_do_not_fit_are_refused(given: dict, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        apply_overrides(loaded("pi05_discrete")[0], Overrides(**given))


def test_relative_actions_must_be_among_the_true_ones() -> None:
    checkpoint = with_config(loaded("pi05_discrete")[0], delta_action_state_map={"6": 7})
    apply_overrides(checkpoint, Overrides())
    for given in ({"action_dims": 6}, {"state_dims": 7}):
        with pytest.raises(CheckpointError, match=r"delta_action_state_map(.|\n)*6 -> 7"):
            apply_overrides(checkpoint, Overrides(**given))


@pytest.mark.parametrize("case", ["io", "io_delay3", "io_delay2_longprefix"])
def test_relative_actions_are_made_so_on_the_way_in_and_undone_on_the_way_out(case: str) -> None:
    """The network sees committed actions minus the state at the chunk's start; the robot's are absolute."""
    checkpoint, network = loaded("pi05_continuous")
    relative = with_config(checkpoint, delta_action_state_map={"0": 3, "5": 0})
    recorded, wanted = recording(f"pi05_continuous/{case}")
    offset = np.zeros((1, 1, 8), np.float32)
    offset[..., 0], offset[..., 5] = recorded.batch.state[:, 3], recorded.batch.state[:, 0]
    if recorded.action_prefix is not None:
        recorded = replace(recorded, action_prefix=recorded.action_prefix + offset)
    actions = run(relative, network, recorded).actions
    assert np.abs(offset).max() > 0.01
    assert np.abs(actions - (wanted + offset)).max() <= BAR


@pytest.mark.parametrize("folder", ["pi05_discrete", "pi05_continuous", "pi0"])
@pytest.mark.parametrize(("case", "absent"), [("absent_cam", "camera1"), ("missing_first", "camera0")])
def test_a_bundle_without_a_camera_gives_what_opentau_does_when_it_is_absent(
    folder: str, case: str, absent: str
) -> None:
    """Left out or masked is the same to the actions, so one way serves both of OpenTau's cases."""
    checkpoint, network = loaded(folder)
    fewer = apply_overrides(checkpoint, Overrides(absent_cameras=(absent,)))
    recorded, wanted = recording(f"{folder}/io_{case}")
    assert [camera.name for camera in manifest_of(fewer).cameras] == sorted({"camera0", "camera1"} - {absent})
    assert np.abs(run(fewer, network, recorded).actions - wanted).max() <= BAR


def test_a_black_picture_is_not_an_absent_one() -> None:
    recorded, wanted = recording("pi05_continuous/io_zero_cam")
    images = dict(recorded.batch.images)
    assert not images.pop("camera1").any()
    absent = replace(recorded, batch=replace(recorded.batch, images=images))
    assert np.abs(run(*loaded("pi05_continuous"), recorded).actions - wanted).max() <= BAR
    assert np.abs(run(*loaded("pi05_continuous"), absent).actions - wanted).max() > 1e-3


def test_opentaus_features_of_empty_cameras_are_no_cameras_of_the_robot() -> None:
    """OpenTau writes them into the configuration; a robot would be refused for not delivering them."""
    checkpoint, network = loaded("pi05_continuous")
    features = dict(checkpoint.config.input_features)
    features["observation.images.empty_camera_0"] = type(features["camera0"])("VISUAL", (3, 480, 640))
    padded = with_config(checkpoint, input_features=features, empty_cameras=1, resize_imgs_with_padding=None)
    padded = apply_overrides(padded, Overrides())
    manifest = manifest_of(padded)
    assert ([camera.name for camera in manifest.cameras], manifest.empty_cameras) == (
        ["camera0", "camera1"],
        1,
    )
    for case in ("io", "io_missing_last"):
        recorded, wanted = recording(f"pi05_continuous/{case}")
        assert np.abs(run(padded, network, recorded).actions - wanted).max() <= BAR


def test_a_response_is_left_out_only_when_that_is_asked_for(caplog) -> None:
    """Its tokens are part of the KV cache that the decoder reads, so without them the actions are others."""
    checkpoint = with_config(loaded("pi05_discrete")[0], predict_response=True)
    with pytest.raises(UsageError, match=r"response(.|\n)*predict_response(.|\n)*--without-response"):
        apply_overrides(checkpoint, Overrides())
    with caplog.at_level(logging.WARNING):
        without = apply_overrides(checkpoint, Overrides(without_response=True))
    assert "is left out" in caplog.text
    assert manifest_of(without).prompt.response_left_out
    assert not manifest_of(loaded("pi05_discrete")[0]).prompt.response_left_out


def test_fewer_actions_than_the_chunk_are_recorded_and_told() -> None:
    checkpoint, network = loaded("pi0")
    short = with_config(checkpoint, n_action_steps=3)
    chunk = run(short, network, recording("pi0/io")[0])
    assert manifest_of(short).flow.n_action_steps == 3
    assert (chunk.n_action_steps, chunk.actions.shape[1]) == (3, 10)
