"""What a manifest says of a checkpoint, for every kind of configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from otau.runtime.normalise import Normaliser
from otau.runtime.prompt import fill_template, state_bins, state_text
from otau.runtime.spec import PictureSpec
from otau.runtime.vectors import ActionSpace, StateSpace
from otau.toolchain.intake import load_checkpoint
from otau.toolchain.manifest import ManifestFromCheckpoint
from otau.toolchain.targets import find_target
from otau.training.policies import Checkpoint

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
FOLDERS = ("pi05_discrete", "pi05_continuous", "pi0")
STATISTICS = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILE": ("q01", "q99")}

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden tensors at {GOLDEN}")


@cache
def golden(folder: str) -> Checkpoint:
    return load_checkpoint(GOLDEN / folder)


def manifest_of(folder: str, statistics: dict | None = None, **config):
    """The manifest of a golden checkpoint with another configuration."""
    checkpoint = golden(folder)
    checkpoint = replace(
        checkpoint,
        config=msgspec.structs.replace(checkpoint.config, **config),
        statistics=checkpoint.statistics if statistics is None else statistics,
    )
    return ManifestFromCheckpoint(
        checkpoint,
        target=find_target("cpu", None)[0],
        precision="fp32",
        num_steps=10,
        tokenizer=None,
        graphs={},
        gates=(),
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_prompts_are_those_that_opentaus_tokenizer_saw(folder: str) -> None:
    """All golden prompts of its serving; the one that its ONNX scripts build is none of them."""
    manifest = manifest_of(folder)
    states = StateSpace(manifest, by_name("state", golden(folder).statistics))
    cases = json.loads((GOLDEN / folder / "cases.json").read_text())
    served = {name: facts for name, facts in cases.items() if name.startswith("bf16")}
    assert len(served) >= 9
    for facts in served.values():
        inputs = load_file(GOLDEN / folder / facts["inputs_from"])
        tasks = cases[facts["inputs_from"]]["tasks"]
        normalised = states.normalise(inputs["inputs/state"], inputs["inputs/dataset_index"])
        for row, wanted in enumerate(facts["prompt_strings"]):
            listed = normalised[row, : manifest.prompt.state_dims]
            text = state_text(state_bins(listed, manifest.prompt.state_bins))
            assert fill_template(manifest.prompt.template, tasks[row], text) == wanted
            assert "<eos>" not in wanted
    assert "<eos>" not in manifest.prompt.template


def by_name(kind: str, statistics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix(f"{kind}."): v for k, v in statistics.items() if k.startswith(f"{kind}.")}


@pytest.mark.parametrize(
    ("advantage", "template"),
    [
        ("ignore", "{task}\n"),
        ("on", "{task}\nAdvantage: positive\n"),
        # OpenTau's default; without an advantage in the batch, which serving has not, it says positive.
        ("use", "{task}\nAdvantage: positive\n"),
    ],
)
def test_the_advantage_of_a_served_pi0_is_positive(advantage: str, template: str) -> None:
    assert manifest_of("pi0", advantage=advantage).prompt.template == template


@pytest.mark.parametrize(
    ("folder", "config", "route", "dims", "dtype"),
    [
        ("pi05_discrete", {}, "prompt", 8, "bfloat16"),
        ("pi05_discrete", {"state_text_dtype": "float32"}, "prompt", 8, "float32"),
        (
            "pi05_discrete",
            {"prompt_template": "{task}: {state}", "state_text_dims": 5},
            "prompt",
            5,
            "bfloat16",
        ),
        ("pi05_discrete", {"prompt_template": "{task}\n"}, "none", None, "float32"),
        ("pi05_continuous", {}, "prefix", None, "float32"),
        ("pi0", {"prompt_template": "do {task}"}, "decoder", None, "float32"),
    ],
)
def test_where_the_state_is_read(folder: str, config: dict, route: str, dims: int | None, dtype: str) -> None:
    manifest = manifest_of(folder, **config)
    assert (manifest.state_route, manifest.prompt.state_dims, manifest.norm.state_dtype) == (
        route,
        dims,
        dtype,
    )
    if "prompt_template" in config:
        assert manifest.prompt.template == config["prompt_template"]


def test_what_other_trainers_do_otherwise_is_recorded() -> None:
    manifest = manifest_of(
        "pi05_discrete",
        clean_task=True,
        state_bins="digitize",
        norm_eps=0.0,
        image_padding="centre",
        image_resize="pillow",
        image_fill=-1.0,
    )
    assert (manifest.prompt.clean_task, manifest.prompt.state_bins, manifest.norm.eps) == (
        True,
        "digitize",
        0,
    )
    assert manifest.pictures == PictureSpec(padding="centre", resize="pillow", fill=-1.0)
    usual = manifest_of("pi05_discrete")
    assert (usual.prompt.clean_task, usual.prompt.state_bins, usual.norm.eps) == (False, "clip", 1e-6)
    assert usual.pictures == PictureSpec(padding="left_top", resize="bilinear", fill=0.0)


@pytest.mark.parametrize("version", [None, 0, 1])
@pytest.mark.parametrize("mode", sorted(STATISTICS))
def test_a_bundle_normalises_as_golden_in_every_mode_and_version(mode: str, version: int | None) -> None:
    """From the configuration over the manifest to the numbers, degenerate dimensions among them."""
    tensors = load_file(GOLDEN / "preproc" / "normalize.safetensors")
    keys = STATISTICS[mode]
    width = tensors[f"stats/{keys[0]}"].shape[1]
    statistics = {f"{kind}.{key}": tensors[f"stats/{key}"] for kind in ("state", "action") for key in keys}
    features = {kind: getattr(golden("pi0").config, f"{kind}_features") for kind in ("input", "output")}
    feature = next(iter(features["output"].values()))
    manifest = manifest_of(
        "pi0",
        statistics,
        normalization_mapping={"STATE": mode, "ACTION": mode},
        config_version=version,
        input_features=features["input"] | {"state": type(feature)("STATE", (width,))},
        output_features={"actions": type(feature)("ACTION", (width,))},
        max_state_dim=width,
        max_action_dim=width,
        chunk_size=tensors["x_actions"].shape[1],
    )
    assert (manifest.norm.state, manifest.norm.action) == (mode, mode)
    assert len(manifest.norm.heads) == len(tensors[f"stats/{keys[0]}"])
    states, actions = (
        space(manifest, by_name(kind, statistics))
        for space, kind in ((StateSpace, "state"), (ActionSpace, "action"))
    )
    head, state = tensors["dataset_index"], tensors["x_state"]
    got = {
        "norm_state": states.normalise(state, head),
        "norm_actions": actions.prefix(tensors["x_actions"], state, head),
        "unnorm_u_actions": actions.raw(tensors["u_actions"], state, head),
    }
    if version is None:
        # The newer epsilon with the older edge, which golden has no case of: as the formulas have it.
        usual = Normaliser(mode, by_name("state", statistics), eps=1e-6, centre_degenerate=False)
        np.testing.assert_array_equal(got["norm_state"], usual.normalise(state, head))
        return
    for name, value in got.items():
        np.testing.assert_array_equal(value, tensors[f"{mode}/v{version}/f32/{name}"], err_msg=name)


def test_identity_needs_no_statistics() -> None:
    manifest = manifest_of("pi05_discrete", {}, normalization_mapping={})
    assert (manifest.norm.state, manifest.norm.action, manifest.norm.heads) == ("IDENTITY",) * 2 + (
        ("lerobot/droid_100",),
    )
    assert manifest.prompt.state_dims == 8
    state = np.float32([[1, 2, 3, 4, 5, 6, 7, 8]])
    np.testing.assert_array_equal(StateSpace(manifest, {}).normalise(state, np.array([0])), state)
