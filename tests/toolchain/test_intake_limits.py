"""Checkpoints that grow when they are read, lead out of their folder, or hold more than one policy."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model

from otau.runtime.errors import CheckpointError
from otau.toolchain.intake import load_checkpoint, open_checkpoint
from otau.toolchain.intake.convert import convert_checkpoint
from otau.toolchain.intake.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, read_index, read_safetensors
from otau.toolchain.intake.torch_file import read_torch_file
from otau.toolchain.intake.zero_shards import agree, read_model_states, read_optimizer_states
from otau.toolchain.memory import peak_rss_mb, reset_peak_rss

from .test_intake_hostile import LEGACY_HEAD, as_zip, tensor_pickle
from .test_intake_lerobot import edit_json, lerobot  # noqa: F401
from .test_intake_openpi import openpi  # noqa: F401


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def pickled(**entries: bytes) -> bytes:
    return b"\x80\x02}" + b"".join(text(key) + value + b"s" for key, value in entries.items()) + b"."


def refused(read: Callable[[], Any], message: str, limit_mb: float = 100) -> None:
    """It is refused before memory is taken."""
    reset_peak_rss()
    before = peak_rss_mb()
    with pytest.raises(CheckpointError, match=message):
        read()
    assert peak_rss_mb() - before < limit_mb


# --- pickles


@pytest.mark.parametrize("parts", [("deepspeed.", "x" * 1_000_000), ("deepspeed." + "x" * 1_000_000, "y")])
def test_names_of_globals_are_short(parts: tuple[str, str], tmp_path: Path) -> None:
    """Each use puts a megabyte together anew."""
    module, name = parts
    data = b"\x80\x04" + text(module) + b"q\x00" + text(name) + b"q\x01(" + b"h\x00h\x01\x93" * 300 + b"t."
    (tmp_path / "weights.pt").write_bytes(as_zip(data))
    refused(lambda: read_torch_file(tmp_path / "weights.pt"), "a name of 1,000,01. characters", 50)


def test_a_list_of_storages_is_compared_without_sorting(tmp_path: Path) -> None:
    keys = b"\x80\x02](" + text("k" * 1_000_000) + b"q\x00" + b"h\x00" * 1000 + b"e."
    (tmp_path / "weights.pt").write_bytes(LEGACY_HEAD + b"\x80\x02}." + keys)
    refused(lambda: read_torch_file(tmp_path / "weights.pt"), "list of storages")


def test_keys_of_storages_are_short(tmp_path: Path) -> None:
    key = "k" * 300
    (tmp_path / "weights.pt").write_bytes(as_zip(tensor_pickle((6,), (1,), key=key), {key: bytes(24)}))
    refused(lambda: read_torch_file(tmp_path / "weights.pt"), "without a key")


def test_a_tensor_does_not_span_what_it_does_not_have(tmp_path: Path) -> None:
    path, count = tmp_path / "weights.pt", 20_000_000
    data = tensor_pickle((2,), (count - 1,), count=count, kind="ByteStorage")
    path.write_bytes(as_zip(data, {"0": bytes(count)}))
    refused(lambda: read_torch_file(path), "spans 20,000,000; at most 8 times", 10)


def test_entries_of_a_zip_file_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    data = as_zip(b"\x80\x02}.")
    end = data.rindex(b"PK\x05\x06")
    directory = struct.unpack_from("<I", data, end + 16)[0]
    wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 100_001, 100_001, 9_000_000, directory)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    last = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(data[:end] + wide + locator + last)
    refused(lambda: read_torch_file(path), "at most 100,000 are read")


# --- DeepSpeed


def test_parameters_of_shards_are_counted_before_they_are_copied(tmp_path: Path) -> None:
    many = 2000
    group = b"}q\x00(" + b"".join(text(f"{i:x}") + b")" for i in range(many)) + b"u"
    shapes = b"](" + group + b"h\x00" * many + b"e"
    path = tmp_path / "mp_rank_00_model_states.pt"
    path.write_bytes(as_zip(pickled(module=b"}", buffer_names=b"]", param_shapes=shapes, shared_params=b"}")))
    refused(lambda: read_model_states(path), "more parameters than are read")

    rows = b"](](" + b"K\x00" * many + b"eq\x00" + b"h\x00" * many + b"e"
    flat = b"]" + tensor_pickle((6,), (1,))[2:-1] + b"a"
    states = pickled(
        zero_stage=b"K\x02",
        partition_count=b"K\x01",
        single_partition_of_fp32_groups=flat,
        param_alignment_paddings=rows,
    )[2:-1]
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.write_bytes(as_zip(pickled(optimizer_state_dict=states), {"0": bytes(24)}))
    refused(lambda: read_optimizer_states(path), "more parameters than are read")


@pytest.mark.parametrize("tag", [b"\xff" * 250, b"a" * 254])
def test_a_tag_longer_than_names_can_be(tag: bytes, tmp_path: Path) -> None:
    (tmp_path / "latest").write_bytes(tag)
    with pytest.raises(CheckpointError, match="the folder that `latest` names is missing"):
        open_checkpoint(tmp_path)


def test_shards_that_differ_are_told_in_short(tmp_path: Path) -> None:
    long = [("k" * 1_000_000, (1,))] * 300
    refused(lambda: agree(tmp_path / "a", tmp_path / "b", "shapes", long, []), "their shapes differ", 10)


# --- safetensors


def write_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":["F32",[1],[0,4]]}',
        b'{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1' + b",1" * 64 + b'],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[9223372036854775808,0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[0,9223372036854775807,9223372036854775807],"data_offsets":[0,0]}}',
        b'{"a":' * 3000,
    ],
    ids=range(6),
)
def test_headers_that_the_library_lets_pass(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_header(path, header, bytes(4) if b"[0,4]" in header else b"")
    with pytest.raises(CheckpointError, match="not safetensors"):
        open_checkpoint(tmp_path)


def many_tensors(count: int) -> bytes:
    entry = b'"%x":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(entry % number for number in range(count)) + b"}"


def test_tensors_and_headers_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_header(path, many_tensors(MAX_TENSORS + 1))
    with pytest.raises(CheckpointError, match="at most 100,000"):
        read_safetensors(path)
    write_header(path, b" " * (MAX_HEADER_BYTES + 1))
    refused(lambda: read_safetensors(path), "too long", 5)


def test_the_headers_of_all_shards_are_bounded(tmp_path: Path) -> None:
    names = [f"{number}.safetensors" for number in range(3)]
    for name in names:
        (tmp_path / name).write_bytes(struct.pack("<Q", MAX_HEADER_BYTES // 2))
    index = {"weight_map": {name: name for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="bytes in all"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("name", ["a" * 300, "\ud800", "missing"])
def test_shards_that_cannot_be(index: str, name: str, tmp_path: Path) -> None:
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="missing"):
        open_checkpoint(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary()
    | JSON.map(json.dumps).map(str.encode)
    | JSON.map(lambda v: json.dumps({"weight_map": v}).encode())
)
@example(data=b"[" * 100_000)
@example(data=b'{"weight_map":{"a":' + b"9" * 5000 + b"}}")
@example(data=b'{"weight_map":{"a":"\\ud800"}}')
def test_any_index_is_a_map_of_names_or_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    try:
        index = read_index(tmp_path, "model.safetensors.index.json")
    except CheckpointError:
        pass
    else:
        assert index
        assert all(isinstance(part, str) for pair in index.items() for part in pair)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)  # there is no shard


# --- links, pipes, large files


def test_weights_outside_of_the_folder(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("pi05"), tmp_path / "copy"))
    for name in ("model.safetensors", "train_config.json", "model_dims.json"):
        shutil.move(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(CheckpointError, match="leaves its folder"):
            load_checkpoint(folder)
        (folder / name).unlink()
        (folder / "inner").mkdir(exist_ok=True)
        shutil.move(tmp_path / name, folder / "inner" / name)
        (folder / name).symlink_to(Path("inner") / name)
        assert load_checkpoint(folder).config.type == "pi05"


@pytest.mark.parametrize(
    "name", ["config.json", "policy_preprocessor.json", "otau.json", "train_config.json"]
)
def test_lerobots_files_outside_of_the_folder(lerobot, name, tmp_path):  # noqa: F811
    folder = lerobot("pi05")
    # So that nothing but train_config.json or otau.json tells the release.
    edit_json(folder / "config.json", use_relative_actions=...)
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="leaves its folder"):
        load_checkpoint(folder)


def test_a_policy_outside_of_the_run(lerobot, tmp_path):  # noqa: F811
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pretrained_model").symlink_to(lerobot("pi05"))
    with pytest.raises(CheckpointError, match="leaves its folder"):
        load_checkpoint(tmp_path / "run")


def test_openpis_assets_outside_of_the_folder(openpi, tmp_path):  # noqa: F811
    folder = openpi("pi05")
    shutil.move(folder / "assets", tmp_path / "elsewhere")
    (folder / "assets").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["otau.json", "model_dims.json"])
def test_pipes_are_refused_and_not_waited_for(openpi, name):  # noqa: F811
    folder = openpi("pi05")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="no plain file"):
        load_checkpoint(folder)


# --- LeRobot


@pytest.mark.parametrize("change", [{"max_action_dim": 10**18, "output_features": {}}, {"shape": 10**18}])
def test_sizes_are_bounded_before_they_are_used(lerobot, change):  # noqa: F811
    folder = lerobot("pi05")
    if "shape" in change:
        change = {"output_features": {"action": {"type": "ACTION", "shape": [change["shape"]]}}}
    edit_json(folder / "config.json", **change)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        data = (folder / name).read_text().replace('"enabled": false', '"enabled": true')
        (folder / name).write_text(data)
    refused(lambda: load_checkpoint(folder), "<= 65536")


def test_statistics_are_no_longer_than_a_robot_has_joints(lerobot):  # noqa: F811
    folder = lerobot("pi05")
    (path,) = folder.glob("policy_preprocessor_step*.safetensors")
    held = load_file(path) | {"observation.state.q01": torch.zeros(50_000_000, dtype=torch.uint8)}
    save_file(held, path)
    refused(lambda: load_checkpoint(folder), "more numbers than a robot has", 40)
    save_file(
        held
        | {
            "observation.state.q01": torch.zeros(8),
            "observation.state.count": held.pop("observation.state.q01"),
        },
        path,
    )
    with pytest.raises(CheckpointError, match="do not fit each other"):
        load_checkpoint(folder)


def test_steps_of_a_pipeline_are_counted(lerobot):  # noqa: F811
    folder = lerobot("pi05")
    edit_json(folder / "policy_preprocessor.json", steps=[{}] * 65)
    with pytest.raises(CheckpointError, match="length <= 64"):
        load_checkpoint(folder)


# --- convert


@pytest.mark.parametrize("name", ["__metadata__", "a\ud800", "format"])
def test_names_that_safetensors_cannot_hold_are_refused_before_writing(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    entries = b"\x80\x02}" + b"".join(text(k) + tensor_pickle((6,), (1,))[2:-1] + b"s" for k in ("b", name))
    (source / "model.bin").write_bytes(as_zip(entries + b".", {"0": bytes(24)}))
    with pytest.raises(CheckpointError, match="cannot hold"):
        convert_checkpoint(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_shared_tensors_come_back(tmp_path: Path) -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    save_model(module, str(tmp_path / "model.safetensors"))
    weights = open_checkpoint(tmp_path).weights
    assert weights.keys() == module.state_dict().keys()
    assert weights["a.weight"] is weights["b.weight"]
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "a", "note": "of no tensor"})
    assert open_checkpoint(tmp_path).weights.keys() == {"a"}


@pytest.mark.parametrize("family", ["pi0", "pi05"])
@pytest.mark.parametrize("project", ["lerobot", "openpi"])
def test_policies_of_other_projects_are_the_same_after_conversion(project, family, tmp_path, request):
    source = request.getfixturevalue(project)(family)
    before = load_checkpoint(source)
    convert_checkpoint(source, tmp_path / "out")
    after = load_checkpoint(tmp_path / "out")
    assert after.format == "safetensors"
    assert (after.config, after.dims) == (before.config, before.dims)
    assert after.weights.keys() == before.weights.keys()
    for name, tensor in before.weights.items():
        assert torch.equal(after.weights[name].read(), tensor.read()), name
    assert after.statistics.keys() == before.statistics.keys()
    assert all((after.statistics[name] == values).all() for name, values in before.statistics.items())


# --- several policies in one folder


@pytest.mark.parametrize(
    ("names", "aside"),
    [
        (["model.safetensors", "model.safetensors.index.json"], "model.safetensors.index.json"),
        (["model.safetensors", "latest"], "latest"),
        (["model.safetensors", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], "zero_pp_rank_0"),
        (["model.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),
        (["pytorch_model.bin", "model.pt"], "model.pt"),
        (["model.safetensors", "optimizer.pt", "scheduler.bin"], None),
    ],
)
def test_what_is_left_aside_is_named(
    names: list[str], aside: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for name in names:
        if name.endswith(".safetensors"):
            save_file({"a": torch.ones(1)}, tmp_path / name)
        else:
            torch.save({"a": torch.ones(1)}, tmp_path / name)
    assert set(open_checkpoint(tmp_path).weights) == {"a"}
    if aside is None:
        assert not caplog.text
    else:
        (record,) = caplog.records
        message = record.getMessage()
        assert f"from {names[0]}; left aside: {tmp_path / aside}" in message
