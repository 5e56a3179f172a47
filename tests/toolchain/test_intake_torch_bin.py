"""PyTorch's .bin and .pt: one file or shards, plain or wrapped, zip or older format."""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from otau.runtime.errors import CheckpointError, OtauError
from otau.toolchain.intake.torch_bin import is_torch_bin, open_torch_bin
from otau.toolchain.intake.torch_file import read_torch_file
from otau.toolchain.memory import peak_rss_mb, reset_peak_rss

INDEX = "pytorch_model.bin.index.json"
TABLE = torch.randn(11, 5, generator=torch.Generator().manual_seed(1))
STATE = OrderedDict(
    {
        "embed.weight": TABLE,
        "head.weight": TABLE,
        "rows": TABLE[3:7],
        "columns": TABLE[:, 1:4],
        "transposed": TABLE.T,
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "frozen": torch.nn.Parameter(torch.ones(3), requires_grad=False),
    }
    | {
        str(dtype): torch.tensor([0, 1, 1]).to(dtype)
        for dtype in (
            *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
            *(torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
        )
    }
)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(weights: Any, state: Any) -> None:
    assert list(weights) == list(state)
    for name, wanted in state.items():
        tensor = weights[name].read()
        assert tensor.is_contiguous()
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape)
        assert (weights[name].dtype, weights[name].shape) == (wanted.dtype, tuple(wanted.shape))
        assert bits(tensor) == bits(wanted)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.pt"])
def test_every_type_and_layout(name: str, protocol: int, zipped: bool, tmp_path: Path) -> None:
    assert not is_torch_bin(tmp_path)
    torch.save(
        STATE,
        tmp_path / name,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    assert is_torch_bin(tmp_path)
    opened = open_torch_bin(tmp_path)
    assert_same(opened.weights, STATE)
    assert opened.files == (tmp_path / name,)
    assert opened.weights["embed.weight"] is opened.weights["head.weight"]
    assert opened.weights["embed.weight"] is not opened.weights["rows"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "scale": torch.ones(1)},
        lambda state: {"model": dict(state), "optimizer": {"exp_avg": torch.ones(2)}},
        lambda state: {"module": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: state | {"head._extra_state": None},
    ],
)
def test_wrapped_weights(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    torch.save(wrap(STATE), tmp_path / "model.pt")
    assert_same(open_torch_bin(tmp_path).weights, STATE)


@pytest.mark.parametrize(
    "value", [[torch.ones(1)], torch.ones(1), {}, {"a": 1}, {1: torch.ones(1)}, None, {"model": {}}]
)
def test_what_holds_no_weights_is_refused(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="no weights by name"):
        open_torch_bin(tmp_path)


def test_a_module_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear") as refused:
        open_torch_bin(tmp_path)
    assert "state_dict" in (refused.value.fix or "")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02N.")
        archive.writestr("model/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_torch_bin(tmp_path)


def write_shards(folder: Path) -> Path:
    folder.mkdir()
    names = list(STATE)
    index = {}
    for number, part in enumerate((names[:6], names[6:]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: STATE[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model")
    assert is_torch_bin(folder)
    opened = open_torch_bin(folder)
    assert_same(opened.weights, STATE)
    assert [path.name for path in opened.files] == [
        INDEX,
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    ]


@pytest.mark.parametrize(
    "file",
    ["../outside.bin", "/outside.bin", "sub/outside.bin", "..", ".", "", "a\0b", "absent.bin", "link.bin"],
)
def test_an_index_names_files_beside_it(file: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model")
    (folder / "sub").mkdir()
    for path in (tmp_path / "outside.bin", folder / "sub" / "outside.bin"):
        shutil.copy(folder / "pytorch_model-00001-of-00002.bin", path)
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["scalar"] = file
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        open_torch_bin(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda index: index.pop("scalar"),
        lambda index: index.update(other=index["scalar"]),
        lambda index: index.update(scalar=index["torch.bool"]),
    ],
)
def test_an_index_and_its_shards_agree(edit: Callable[[dict[str, str]], object], tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="different tensors"):
        open_torch_bin(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000, "\xff"]
)
def test_a_bad_index(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="index"):
        open_torch_bin(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(STATE, tmp_path / "outside.bin")
    (folder / "pytorch_model.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(CheckpointError, match="link"):
        open_torch_bin(folder)


def test_reading_one_tensor_reads_no_other(tmp_path: Path) -> None:
    torch.save({"large": torch.zeros(50_000_000), "small": torch.ones(3)}, tmp_path / "model.bin")
    reset_peak_rss()
    before = peak_rss_mb()
    assert open_torch_bin(tmp_path).weights["small"].read().tolist() == [1, 1, 1]
    assert peak_rss_mb() - before < 20


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    path = tmp_path_factory.mktemp("originals") / "model.pt"
    files = {}
    for zipped in (True, False):
        torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
        files[zipped] = path.read_bytes()
    return files


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_gives_tensors_or_an_error(
    data: st.DataObject, originals: dict[bool, bytes], tmp_path: Path
) -> None:
    content = bytearray(originals[data.draw(st.booleans(), label="zip")])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(
            st.integers(0, min(len(content) - 1, 3500)) | st.integers(len(content) - 2500, len(content) - 1)
        )
        piece = data.draw(
            st.binary(max_size=5)
            | st.sampled_from([b"\xff" * 4, b"\x7f\xff\xff\xff", b"R", b"cos\nsystem\n"])
        )
        content[at : at + data.draw(st.integers(0, 5))] = piece
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    reset_peak_rss()
    before = peak_rss_mb()
    with suppress(OtauError):
        read_torch_file(path)
        for stored in open_torch_bin(tmp_path).weights.values():
            tensor = stored.read()
            assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, stored.dtype)
    assert peak_rss_mb() - before < 100


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400), head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"]))
def test_any_bytes_give_an_error(data: bytes, head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(head + data)
    with pytest.raises(OtauError):
        read_torch_file(path)
    assert os.path.getsize(path) == len(head + data)
