"""Recorded files: what is read, what is refused, and that no bytes at all bring the parser down."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from otau.runtime.errors import OtauError, UsageError
from otau.runtime.recorded import check_writable, read_recorded, write_tensors

FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def tensors(**changes):
    base = {
        "inputs/state": np.float32([[1, 2, 3]]),
        "inputs/image0": np.zeros((1, 3, 8, 8), np.float32),
        "inputs/num_steps": np.array([10]),
        "inputs/lang_tokens": np.zeros((1, 6), np.int64),
        "inputs/lang_masks": np.ones((1, 6), bool),
        "outputs/actions": np.zeros((1, 5, 2), np.float32),
    }
    return {name: value for name, value in (base | changes).items() if value is not None}


@pytest.fixture
def record(tmp_path):
    def write(metadata=None, **changes):
        path = tmp_path / "io.safetensors"
        path.write_bytes(save(tensors(**changes), metadata))
        return path

    return write


def test_names_are_read_with_and_without_the_prefix(record, manifest):
    with_prefix = read_recorded(record(), manifest)
    bare = {name: None for name in tensors()} | {
        name.removeprefix("inputs/"): value for name, value in tensors().items() if "inputs/" in name
    }
    without = read_recorded(record(**bare), manifest)
    for recorded in (with_prefix, without):
        np.testing.assert_array_equal(recorded.batch.state, [[1, 2, 3]])
        assert list(recorded.batch.images) == ["front"]
        assert recorded.batch.token_masks.all()
        assert recorded.delay.tolist() == [0]
        assert recorded.noise is None


def test_an_unknown_name_offers_the_nearest(record, manifest):
    with pytest.raises(UsageError, match="inputs/stat(.|\n)*did you mean 'state'"):
        read_recorded(record(**{"inputs/stat": np.zeros(1)}), manifest)


def test_a_camera_beyond_the_bundles_is_refused(record, manifest):
    with pytest.raises(UsageError, match="image2"):
        read_recorded(record(**{"image2": np.zeros((1, 3, 8, 8), np.float32)}), manifest)


def test_a_name_in_both_forms_is_refused(record, manifest):
    with pytest.raises(UsageError, match="twice"):
        read_recorded(record(state=np.zeros((1, 3), np.float32)), manifest)


def test_a_file_without_a_state_is_refused(record, manifest):
    with pytest.raises(UsageError, match="no state"):
        read_recorded(record(**{"inputs/state": None}), manifest)


@pytest.mark.parametrize("steps", [np.array([5]), np.array([10, 10]), np.array([], np.int64)])
def test_another_number_of_steps_says_to_compile_again(record, manifest, steps):
    with pytest.raises(UsageError, match="--num-steps"):
        read_recorded(record(**{"inputs/num_steps": steps}), manifest)


def test_a_prompt_is_read_from_a_tensor_the_metadata_or_the_call(record, manifest):
    no_ids = {"inputs/lang_tokens": None, "inputs/lang_masks": None}
    text = np.frombuffer("höher".encode(), np.uint8)
    assert read_recorded(record(prompt=text, **no_ids), manifest).batch.prompts == ("höher",)
    assert read_recorded(record({"prompt": "lift"}, **no_ids), manifest).batch.prompts == ("lift",)
    overridden = read_recorded(record(), manifest, prompt="drop").batch
    assert overridden.prompts == ("drop",)
    assert overridden.tokens is None


@pytest.mark.parametrize("prompt", [np.array([255, 254], np.uint8), np.zeros(3, np.float32)])
def test_a_prompt_that_is_not_text_is_refused(record, manifest, prompt):
    with pytest.raises(UsageError, match="not text"):
        read_recorded(record(prompt=prompt), manifest)


def raw_file(dtype, shape, data):
    header = json.dumps({"state": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("F32", np.float32([1.5, -2, 0]).tobytes()),
        ("F16", np.float16([1.5, -2, 0]).tobytes()),
        ("F64", np.float64([1.5, -2, 0]).tobytes()),
        ("BF16", (np.float32([1.5, -2, 0]).view(np.uint32) >> 16).astype(np.uint16).tobytes()),
    ],
)
def test_floats_of_every_width_are_read(tmp_path, manifest, dtype, data):
    (tmp_path / "io").write_bytes(raw_file(dtype, [1, 3], data))
    state = read_recorded(tmp_path / "io", manifest).batch.state
    assert state.dtype == np.float32
    np.testing.assert_array_equal(state, [[1.5, -2, 0]])


def test_a_dtype_that_is_not_read_is_named(tmp_path, manifest):
    (tmp_path / "io").write_bytes(raw_file("F8_E4M3", [1, 3], b"abc"))
    with pytest.raises(UsageError, match="F8_E4M3"):
        read_recorded(tmp_path / "io", manifest)


def test_a_file_that_is_not_there_is_a_mistake_of_usage(tmp_path, manifest):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            read_recorded(path, manifest)


@given(st.data())
@FUZZ
def test_a_cut_file_is_refused(tmp_path, manifest, data):
    whole = save(tensors())
    (tmp_path / "io").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UsageError, match="cannot be read"):
        read_recorded(tmp_path / "io", manifest)


@given(st.data())
@FUZZ
def test_damaged_bytes_give_an_otau_error_or_inputs(tmp_path, manifest, data):
    raw = bytearray(save(tensors(), {"prompt": "lift"}))
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "io").write_bytes(raw)
    with contextlib.suppress(OtauError):
        read_recorded(tmp_path / "io", manifest)


@given(st.binary(max_size=100))
@FUZZ
def test_any_bytes_are_refused(tmp_path, manifest, raw):
    (tmp_path / "io").write_bytes(raw)
    with pytest.raises(UsageError):
        read_recorded(tmp_path / "io", manifest)


def test_results_replace_a_file_whole(tmp_path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")
    strided = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_tensors(path, {"actions": strided})
    np.testing.assert_array_equal(load_file(path)["actions"], strided)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match="no space left"):
        write_tensors(path, {"actions": np.zeros(1, np.float32)})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_paths_that_cannot_be_written_are_refused_beforehand(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nowhere/out.safetensors", tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UsageError, match="cannot be saved"):
            check_writable(path)


def test_a_pipe_or_device_is_not_replaced_by_results(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="cannot be saved"):
        write_tensors(tmp_path / "pipe", {"actions": np.zeros(1, np.float32)})
    assert (tmp_path / "pipe").is_fifo()


def test_a_pipe_or_device_is_not_read(tmp_path, manifest):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UsageError, match="not a file"):
            read_recorded(path, manifest)


def test_results_are_as_readable_as_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    write_tensors(tmp_path / "out", {"actions": np.zeros(1, np.float32)})
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("shape", [[1, 8] + [1] * 70, [2**63, 0], [0, 8], [10**8, 0]])
def test_a_shape_beyond_numpy_or_without_rows_is_refused(shape, tmp_path, manifest):
    path = tmp_path / "io.safetensors"
    data = bytes(4 * 8 * (0 not in shape))
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, len(data)]}
    header = json.dumps({"state": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(UsageError, match=r"a shape that is not read|has no state"):
        read_recorded(path, manifest)


def test_a_large_input_is_not_written_out(record, manifest):
    with pytest.raises(UsageError) as caught:
        read_recorded(record(num_steps=np.zeros(10**6, np.float32)), manifest)
    assert len(caught.value.got) < 200
