"""What a manifest chooses and the policy does accordingly: heads, pictures, prompts, steps to execute."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from otau.runtime import Observation, Policy
from otau.runtime.bundle import Bundle
from otau.runtime.errors import UsageError
from otau.runtime.prompt import PromptEncoder

CHUNK, MAX_ACTION = 5, 4


def observation(**changes):
    rng = np.random.default_rng(1)
    fields = {
        "images": {name: rng.integers(0, 256, (8, 8, 3), np.uint8) for name in ("front", "wrist")},
        "state": np.float32([0.5, -1, 1.5]),
        "prompt": "pick up",
        "dataset_index": 0,
    }
    return Observation(**(fields | changes))


def test_a_chunk_says_how_much_of_it_is_to_be_executed(make_bundle, tmp_path, manifest):
    flow = msgspec.structs.replace(manifest.flow, n_action_steps=2)
    with Policy.open(make_bundle(tmp_path / "short", flow=flow)) as short:
        chunk = short.infer(observation())
    assert (chunk.n_action_steps, len(chunk.actions)) == (2, CHUNK)


def test_of_several_heads_one_must_be_chosen(bundle):
    """Row 0 would be another robot's scale for all but one of them."""
    with (
        Policy.open(bundle) as policy,
        pytest.raises(UsageError, match=r"several(.|\n)*arm::joint, arm::pose(.|\n)*--norm-head"),
    ):
        policy.infer(observation(dataset_index=None))
    noise = np.zeros((CHUNK, MAX_ACTION), np.float32)
    for name in ("arm::pose", "1"):
        with Policy.open(bundle, norm_head=name) as policy:
            chosen = policy.infer(observation(dataset_index=None), noise=noise)
            given = policy.infer(observation(dataset_index=1), noise=noise)
            other = policy.infer(observation(dataset_index=0), noise=noise)
        np.testing.assert_array_equal(chosen.actions, given.actions)
        assert not np.array_equal(chosen.actions, other.actions)
    with pytest.raises(UsageError, match="did you mean 'arm::pose'"):
        Policy.open(bundle, norm_head="arm::pse")


def test_a_single_head_needs_no_choice(make_bundle, tmp_path, manifest):
    norm = msgspec.structs.replace(manifest.norm, heads=("arm::joint",))
    with Policy.open(make_bundle(tmp_path / "one", norm=norm)) as policy:
        assert policy.prefix(observation(dataset_index=None)).dataset_index.tolist() == [0]
        with pytest.raises(UsageError, match=r"0\.\.0 \(arm::joint\)"):
            policy.prefix(observation(dataset_index=1))


def test_a_black_picture_is_seen_and_an_absent_one_is_not(make_bundle, tmp_path):
    images = observation().images
    black = images | {"front": np.zeros((8, 8, 3), np.uint8)}
    absent = {"wrist": images["wrist"]}
    with Policy.open(make_bundle(tmp_path / "empty", empty_cameras=1)) as policy:
        masks = [policy.prefix_batch(observation(images=i).batch()).mask[0, :2] for i in (black, absent)]
        assert [mask.tolist() for mask in masks] == [[True, True], [True, False]]
        # Placeholders are for recordings: a robot says so by a black picture, or has another bundle.
        with pytest.raises(UsageError, match=r"lacks a camera(.|\n)*black picture(.|\n)*--absent-camera"):
            policy.infer(observation(images=absent))


def test_pictures_are_fitted_as_the_manifest_says(make_bundle, tmp_path, manifest):
    images = {"front": np.full((8, 4, 3), 255, np.uint8), "wrist": np.zeros((8, 8, 3), np.uint8)}
    means = {}
    for fill in (0.0, 0.5, -1.0):
        pictures = msgspec.structs.replace(manifest.pictures, fill=fill)
        with Policy.open(make_bundle(tmp_path / f"fill{fill}", pictures=pictures)) as policy:
            means[fill] = policy.prefix(observation(images=images)).keys[0, 0, 0, 0, 0]
    # Half the frame is white, the other half free: 2 * fill - 1.
    np.testing.assert_allclose(list(means.values()), [0, 0.5, -1], atol=1e-6)
    calls = []
    pictures = msgspec.structs.replace(manifest.pictures, padding="centre", resize="pillow", fill=0.25)
    with (
        Policy.open(make_bundle(tmp_path / "fitted", pictures=pictures)) as policy,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(
            "otau.runtime.prefix.pixels_from_image",
            lambda *given, **options: calls.append(options) or np.zeros((1, 3, 8, 8), np.float32),
        )
        policy.prefix(observation(images=images))
    wanted = {"padding": "centre", "resize": "pillow", "fill": 0.25}
    assert calls == [{"name": "front"} | wanted, {"name": "wrist"} | wanted]


@pytest.mark.parametrize(("dims", "text"), [(2, "127 0"), (3, "127 0 255"), (4, "127 0 255 128")])
def test_the_prompt_lists_as_many_dimensions_as_the_manifest_says(
    make_bundle, tmp_path, manifest, dims, text
):
    """Fewer than the state has, all, or the padding too, which is 0 once normalised."""
    prompt = msgspec.structs.replace(manifest.prompt, state_dims=dims)
    seen = []
    with (
        Policy.open(make_bundle(tmp_path / "listed", prompt=prompt)) as policy,
        pytest.MonkeyPatch.context() as patch,
    ):
        encode = PromptEncoder.encode
        patch.setattr(PromptEncoder, "encode", lambda self, t, s: seen.append(list(s)) or encode(self, t, s))
        policy.prefix(observation(state=np.float32([0, -9, 9])))
    assert seen == [[text]]


def test_a_policy_may_read_no_state_at_all(make_bundle, tmp_path, manifest):
    noise = np.zeros((CHUNK, MAX_ACTION), np.float32)
    prompt = msgspec.structs.replace(manifest.prompt, template="{task}\n", state_dims=None)
    with Policy.open(make_bundle(tmp_path / "blind", state_route="none", prompt=prompt)) as policy:
        first, second = (
            policy.infer(observation(state=np.float32(state)), noise=noise)
            for state in ([0, 0, 0], [1, 1, 0])
        )
    np.testing.assert_array_equal(first.actions, second.actions)


def test_a_single_step_is_not_opened_for_whole_chunks(make_bundle, tmp_path):
    """Its weights would be in memory twice."""
    opened = Bundle.open(make_bundle(tmp_path / "both"))
    graphs = opened.manifest.graphs
    stepped = graphs | {"decoder_step": msgspec.structs.replace(graphs["decoder"], file="not there")}
    Policy.open(Bundle(opened.path, msgspec.structs.replace(opened.manifest, graphs=stepped))).close()
