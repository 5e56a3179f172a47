"""The composition prefix -> ingest -> decode -> raw actions, on graphs whose answer is known."""

from __future__ import annotations

import logging

import msgspec
import numpy as np
import pytest

from otau.runtime import Observation, Policy
from otau.runtime.bundle import Bundle
from otau.runtime.errors import BundleError, EngineError, MismatchError, UsageError
from otau.runtime.observation import ObservationBatch, dummy_batch

CHUNK, MAX_ACTION = 5, 4
MEAN, STD = np.float32([1, 2]), np.float32([0.5, 2]) + np.float32(1e-6)


@pytest.fixture
def policy(bundle):
    with Policy.open(bundle, threads=1) as policy:
        yield policy


@pytest.fixture
def noise():
    return np.random.default_rng(3).standard_normal((CHUNK, MAX_ACTION), np.float32)


def observation(**changes):
    rng = np.random.default_rng(1)
    fields = {
        "images": {
            "wrist": rng.integers(0, 256, (8, 8, 3), np.uint8),
            "front": rng.integers(0, 256, (12, 10, 3), np.uint8),
        },
        "state": np.float32([0.5, -1, 1.5]),
        "prompt": "pick up",
        "dataset_index": 0,
    }
    return Observation(**(fields | changes))


def ids(tokens, masks=None):
    tokens = np.asarray(tokens)
    return {
        "prompt": "",
        "tokens": tokens,
        "token_masks": np.ones(len(tokens), bool) if masks is None else masks,
    }


def raw_actions(normalised, state):
    """What the manifest says: unnormalise the first two columns; action 1 is relative to state 2."""
    actions = normalised[..., :2] * STD + MEAN
    actions[..., 1] += state[2]
    return actions


def test_a_chunk_is_the_decoders_answer_in_raw_units(policy, noise):
    chunk = policy.infer(observation(), noise=noise)
    cache = policy.prefix(observation())
    # The tiny decoder adds the mean of the last layer's values over valid positions.
    shift = cache.values[-1][0][cache.mask[0]].mean()
    np.testing.assert_allclose(chunk.normalised, noise + shift, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(chunk.actions, raw_actions(chunk.normalised, [0.5, -1, 1.5]), rtol=1e-6)
    assert chunk.actions.shape == (CHUNK, 2)
    assert set(chunk.timings) == {"prepare", "prefix", "ingest", "decode", "finish"}
    assert all(value >= 0 for value in chunk.timings.values())


def test_cameras_go_in_by_the_manifests_order_not_the_mappings(policy):
    images = {
        "wrist": np.full((8, 8, 3), 255, np.uint8),
        "front": np.zeros((8, 8, 3), np.uint8),
    }
    keys = policy.prefix(observation(images=images)).keys
    np.testing.assert_allclose(keys[0, 0, :2, 0, 0], [-1, 1])


def test_the_prompt_holds_the_binned_state(policy):
    # State 0 is in the middle of [-1, 1]: a normalised value just below 0, so bin 127, in float32.
    cache = policy.prefix(observation(state=np.zeros(3, np.float32), prompt="pick"))
    tokens = np.rint(cache.keys[0, 0, 2:, 0, 0] * 100)
    assert tokens.tolist() == [2, 3, 7, 5, 8, 4]  # <bos> Task : pick , State, then cut


def test_frozen_rows_come_out_as_they_went_in(policy, noise):
    prefix = np.float32([[1.5, 7], [0.25, 3], [9, 9]])
    chunk = policy.infer(observation(), noise=noise, action_prefix=prefix, delay=2)
    free = policy.infer(observation(), noise=noise)
    np.testing.assert_allclose(chunk.actions[:2], prefix[:2], rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(chunk.actions[2:], free.actions[2:])
    np.testing.assert_array_equal(chunk.normalised[:2, 2:], 0)


def test_a_longer_delay_than_was_trained_works_with_a_warning(policy, noise, caplog):
    prefix = np.ones((4, 2), np.float32)
    with caplog.at_level(logging.WARNING):
        policy.infer(observation(), noise=noise, action_prefix=prefix, delay=3)
        assert "trained with" not in caplog.text
        chunk = policy.infer(observation(), noise=noise, action_prefix=prefix, delay=4)
    np.testing.assert_allclose(chunk.actions[:4], prefix, rtol=1e-6, atol=1e-5)
    assert "a delay of 4 control ticks is more than the 3" in caplog.text


def test_committed_actions_are_made_relative_then_normalised_then_padded(policy, noise):
    state = np.float32([0.5, -1, 1.5])
    prefix = np.float32([[1.5, 7], [0.25, 3]])
    # Frozen rows come out of the decoder as they went in; action 1 is relative to state 2.
    frozen = policy.infer(observation(state=state), noise=noise, action_prefix=prefix, delay=2).normalised[:2]
    expected = (prefix - np.float32([0, state[2]]) - MEAN) / STD
    np.testing.assert_allclose(frozen[:, :2], expected, rtol=1e-6, atol=1e-6)
    assert not frozen[:, 2:].any()


def test_the_same_seed_gives_the_same_chunk_and_no_seed_another(policy):
    first, second = (policy.infer(observation(), rng=np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first.actions, second.actions)
    assert not np.array_equal(policy.infer(observation()).actions, policy.infer(observation()).actions)


def test_one_cache_serves_many_denoises(policy, noise):
    ingested = policy.ingest(policy.prefix(observation()))
    chunks = [policy.decode_batch(ingested, noise=noise[None]) for _ in range(3)]
    expected = policy.infer(observation(), noise=noise)
    for chunk in chunks:
        np.testing.assert_array_equal(chunk.actions[0], expected.actions)


def test_a_batch_gives_what_its_elements_give_alone(policy):
    rng = np.random.default_rng(9)
    images = {name: rng.integers(0, 256, (2, 8, 8, 3), np.uint8) for name in ("front", "wrist")}
    states = rng.standard_normal((2, 3), np.float32)
    noise = rng.standard_normal((2, CHUNK, MAX_ACTION), np.float32)
    prefix = rng.standard_normal((2, 2, 2), np.float32)
    prompts, heads, delays = ("pick", "up up"), np.array([0, 1]), np.array([1, 2])
    together = policy.decode_batch(
        policy.ingest(policy.prefix_batch(ObservationBatch(images, states, prompts, dataset_index=heads))),
        noise=noise,
        action_prefix=prefix,
        delay=delays,
    )
    for row in range(2):
        one = Observation(
            {name: image[row] for name, image in images.items()},
            states[row],
            prompts[row],
            dataset_index=int(heads[row]),
        )
        alone = policy.infer(one, noise=noise[row], action_prefix=prefix[row], delay=int(delays[row]))
        np.testing.assert_allclose(together.actions[row], alone.actions, rtol=1e-6, atol=1e-6)


def test_a_fresh_state_reaches_the_decoder_of_pi0(make_bundle, tmp_path, noise):
    with Policy.open(make_bundle(tmp_path / "pi0", "decoder")) as policy:
        still, moved = (
            policy.infer(observation(state=np.float32(state)), noise=noise)
            for state in ([0, 0, 0], [1, 0, 0])
        )
        # State 0 has the range [-1, 1], so its raw value is its normalised one.
        np.testing.assert_allclose(moved.normalised - still.normalised, 1, atol=1e-5)
        for given in ({"delay": 1}, {"action_prefix": np.zeros((1, 2), np.float32)}):
            with pytest.raises(UsageError, match="does not take committed actions"):
                policy.infer(observation(), **given)


def test_a_state_in_the_prefix_goes_between_its_texts(make_bundle, tmp_path):
    with Policy.open(make_bundle(tmp_path / "continuous", "prefix")) as policy:
        row = policy.prefix(observation(state=np.float32([1, 0, 0]))).keys[0, 0, 8:, 0, 0]
        # "State", ":"; then the sum of the normalised state; then ":".
        np.testing.assert_allclose(row, [0.04, 0.07, 1, 0.07], atol=1e-5)


def test_a_state_in_the_prefix_goes_between_ids_without_a_tokenizer(make_bundle, tmp_path):
    texts = {"state_open_ids": [4], "state_close_ids": [7, 0]}
    given = ids([2, 5, 6, 0, 0, 0]) | {"state": np.float32([1, 0, 0])}
    with Policy.open(make_bundle(tmp_path / "ids", "prefix", tokenizer=False)) as policy:
        row = policy.prefix(observation(**given, **texts)).keys[0, 0, 8:, 0, 0]
        np.testing.assert_allclose(row, [0.04, 1, 0.07, 0], atol=1e-5)
        for wrong, message in (
            ({"state_open_ids": None}, "one side"),
            ({"state_close_ids": None}, "one side"),
            ({"state_open_ids": [13]}, r"state_open_ids(.|\n)*0\.\.12(.|\n)*13"),
            ({"state_close_ids": [[1]]}, "state_close_ids(.|\n)*integers"),
            ({"state_close_ids": [0.5]}, "state_close_ids(.|\n)*integers"),
        ):
            with pytest.raises(UsageError, match=message):
                policy.prefix(observation(**given, **(texts | wrong)))


def test_ids_of_a_tokenizer_that_is_too_large_are_refused(make_bundle, tmp_path):
    with (
        Policy.open(make_bundle(tmp_path / "small", vocab=6)) as policy,
        pytest.raises(UsageError, match=r"tokenizer made(.|\n)*0\.\.5(.|\n)*got: +8"),
    ):
        policy.infer(observation(prompt="up"))


def test_committed_actions_too_large_to_normalise_are_refused(policy):
    prefix = np.full((2, 2), 3e38, np.float32)
    with pytest.raises(UsageError, match="action has values that are not finite once normalised"):
        policy.infer(observation(), action_prefix=prefix, delay=1)


def test_an_unknown_engine_is_the_callers_or_the_bundles_mistake(make_bundle, tmp_path):
    path = make_bundle(tmp_path / "other", engine="onxruntime")
    with pytest.raises(MismatchError, match="did you mean 'onnxruntime'") as caught:
        Policy.open(path)
    assert caught.value.exit_code == 3
    for engine in ("tensorflow", ""):
        with pytest.raises(UsageError, match="no such engine"):
            Policy.open(path, engine=engine)
    Policy.open(path, engine="onnxruntime").close()


def test_a_recording_may_lack_a_camera_with_a_warning(policy, caplog):
    images = {"wrist": observation().images["wrist"]}
    with caplog.at_level(logging.WARNING):
        cache = policy.prefix_batch(observation(images=images).batch())
    assert cache.mask.shape == (1, 1 + 6)
    assert "no picture of front" in caplog.text


def test_placeholders_stand_in_at_the_end_and_are_masked(make_bundle, tmp_path):
    images = {"wrist": np.full((8, 8, 3), 255, np.uint8)}
    with Policy.open(make_bundle(tmp_path / "empty", empty_cameras=1)) as policy:
        cache = policy.prefix_batch(observation(images=images).batch())
    assert cache.mask[0, :2].tolist() == [True, False]
    np.testing.assert_allclose(cache.keys[0, 0, :2, 0, 0], [1, -1])


def test_a_robot_must_deliver_every_camera(policy):
    images = {"wrist": observation().images["wrist"]}
    with pytest.raises(UsageError, match="lacks a camera"):
        policy.infer(observation(images=images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {}}, "lacks a camera"),
        ({"images": observation().images | {"wrst": None}}, "no such camera(.|\n)*did you mean 'wrist'"),
        ({"images": observation().images | {"wrist": np.zeros((2, 3, 8, 8))}}, "another batch size"),
        ({"state": np.zeros(4)}, "state has the wrong shape"),
        ({"state": np.array(["a", "b", "c"])}, "state has the wrong shape or dtype"),
        ({"state": np.float32([0, np.nan, 0])}, "not finite"),
        ({"prompt": ""}, "no prompt"),
        ({"dataset_index": 2}, "dataset_index"),
        ({"prompt": "", "tokens": np.zeros(6, np.int64)}, "without their masks"),
        (ids(np.zeros(6, np.int64), masks=np.ones(5, bool)), "do not fit each other"),
        (ids(np.zeros(6, np.float32)), "do not fit each other"),
        (ids([1, -1, -7, 99, 0, 0]), r"0\.\.12(.|\n)*got: +-7"),
        (ids([1, 13, 99, 0, 0, 0]), r"0\.\.12(.|\n)*got: +99"),
        (ids(np.zeros(6, np.int64), masks=np.zeros(6, bool)), "no token"),
        (ids(np.zeros(0, np.int64)), "no token"),
        (ids(np.zeros(6, np.int64)) | {"prompt": "pick"}, "one would be ignored"),
        ({"state_open_ids": [1], "state_close_ids": [1]}, "no state token"),
        ({"state_close_ids": [1]}, "no state token"),
        ({"state": np.float32([3e38, 3e38, 3e38])}, "not finite once normalised"),
        ({"state": np.array([1e300, 0, 0])}, "not finite"),
    ],
)
def test_observations_that_do_not_fit_are_refused(policy, changes, message):
    with pytest.raises(UsageError, match=message):
        policy.infer(observation(**changes))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": np.zeros((CHUNK, 3), np.float32)}, "noise"),
        ({"noise": np.full((CHUNK, MAX_ACTION), np.nan, np.float32)}, "noise"),
        ({"delay": 1}, "shorter than the delay"),
        ({"delay": 4}, "shorter than the delay"),
        ({"delay": -1}, "does not fit the chunk"),
        ({"delay": 6, "action_prefix": np.zeros((5, 2), np.float32)}, "does not fit the chunk"),
        ({"delay": 0.5}, "not a number of control ticks"),
        ({"action_prefix": np.zeros((6, 2), np.float32)}, "longer than the chunk"),
        ({"action_prefix": np.zeros((2, 3), np.float32)}, "action_prefix has the wrong shape"),
        ({"action_prefix": np.full((2, 2), np.inf)}, "not finite"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(policy, given, message):
    with pytest.raises(UsageError, match=message):
        policy.infer(observation(), **given)


def test_an_observation_without_any_picture_is_refused(policy):
    with pytest.raises(UsageError, match="no picture"):
        policy.prefix_batch(observation(images={}).batch())


def test_actions_that_are_not_finite_never_leave(policy, noise):
    noise[:] = np.finfo(np.float32).max
    cache = policy.prefix(observation())
    cache.values[:] = np.finfo(np.float32).max
    with pytest.raises(EngineError, match="not finite"):
        policy.decode_batch(policy.ingest(cache), noise=noise[None])


def test_a_bundle_without_a_tokenizer_takes_ids_and_says_so(make_bundle, tmp_path):
    with Policy.open(make_bundle(tmp_path / "ids", tokenizer=False)) as policy:
        with pytest.raises(UsageError, match="no tokenizer(.|\n)*--tokenizer"):
            policy.infer(observation())
        keys = policy.prefix(observation(**ids(np.arange(6)))).keys
        np.testing.assert_allclose(keys[0, 0, 2:, 0, 0], np.arange(6) / 100, rtol=1e-6)


@pytest.mark.parametrize("route", ["prompt", "prefix", "decoder"])
@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_dummy_observation_fits_any_bundle(make_bundle, tmp_path, route, tokenizer):
    with Policy.open(make_bundle(tmp_path / "bundle", route, tokenizer=tokenizer)) as policy:
        made_up = dummy_batch(policy.manifest, np.random.default_rng(0))
        chunk = policy.decode_batch(policy.ingest(policy.prefix_batch(made_up)))
    assert chunk.actions.shape == (1, CHUNK, 2)


def test_graphs_that_are_not_the_manifests_are_refused(make_bundle, tmp_path):
    opened = Bundle.open(make_bundle(tmp_path / "bundle"))
    graphs = dict(opened.manifest.graphs)
    graphs["ingest"] = msgspec.structs.replace(graphs["ingest"], outputs=graphs["ingest"].outputs[1:])
    with pytest.raises(BundleError, match="not the one that the manifest describes"):
        Policy.open(Bundle(opened.path, msgspec.structs.replace(opened.manifest, graphs=graphs)))


def test_statistics_of_another_width_are_refused(make_bundle, tmp_path):
    opened = Bundle.open(make_bundle(tmp_path / "bundle"))
    state = msgspec.structs.replace(opened.manifest.state, dim=2)
    action = msgspec.structs.replace(opened.manifest.action, dim=3)
    with pytest.raises(BundleError, match="action have the wrong width"):
        Policy.open(Bundle(opened.path, msgspec.structs.replace(opened.manifest, state=state, action=action)))
