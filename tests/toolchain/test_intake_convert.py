"""`otau convert`: a complete folder in safetensors, or nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from otau.runtime.errors import CheckpointError, UsageError
from otau.toolchain.intake import open_checkpoint
from otau.toolchain.intake.cli import convert
from otau.toolchain.intake.convert import convert_checkpoint, parse_size
from otau.toolchain.memory import peak_rss_mb, reset_peak_rss
from otau.training.policies.keys import EMBED_TOKENS, LM_HEAD

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "zero"
CASES = sorted(path.name for path in GOLDEN.iterdir()) if GOLDEN.is_dir() else []
SHAPED = GOLDEN / "opentau_shaped_zero2"
INDEX = "model.safetensors.index.json"

needs_golden = pytest.mark.skipif(not CASES, reason="../shared/golden/zero is not here")

TABLE = torch.arange(12.0).view(3, 4)
STATE = {
    "first": TABLE,
    "second": TABLE,
    "slice": TABLE[:, 1:3],
    "half": torch.tensor([1.0, 2.5], dtype=torch.float16),
    "one": torch.tensor(1.25, dtype=torch.bfloat16),
    "count": torch.tensor([1, 2, 3]),
    "mask": torch.tensor([True, False, True]),
    "third": torch.tensor([1 / 3]),
    "none": torch.zeros(0, 3),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of every kind of tensor, with a tied one."""
    folder = tmp_path / "source"
    folder.mkdir()
    torch.save(STATE, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"type": "pi05"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.bin").write_text("of no use")
    return folder


@needs_golden
@pytest.mark.parametrize("name", CASES)
def test_golden_folders_are_converted_bit_for_bit(name: str, tmp_path: Path) -> None:
    written = convert_checkpoint(GOLDEN / name, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(GOLDEN / name / "expected_fp32.safetensors")
    frozen = GOLDEN / name / "frozen_from_module.safetensors"
    expected |= load_file(frozen) if frozen.exists() else {}
    for alias, stored in written["shared"].items():
        weights[alias] = weights[stored]
    assert set(weights) == set(expected)
    for key, tensor in expected.items():
        # 0.18's merge turns integers into floats.
        wanted = tensor.long() if key == "count" else tensor
        assert weights[key].dtype == wanted.dtype
        assert torch.equal(weights[key], wanted)


@needs_golden
def test_an_opentau_checkpoint_is_stored_as_opentau_does(tmp_path: Path) -> None:
    written = convert_checkpoint(SHAPED, tmp_path / "out")
    assert written["files"] == ["model.safetensors", "model_dims.json", "train_config.json"]
    assert written["shared"] == {EMBED_TOKENS: LM_HEAD}
    for name in ("model_dims.json", "train_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (SHAPED / name).read_bytes()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert LM_HEAD in names
        assert EMBED_TOKENS not in names
        assert file.metadata() == {"format": "pt", EMBED_TOKENS: LM_HEAD}


def test_tensors_keep_their_bits_and_shared_ones_are_stored_once(source: Path, tmp_path: Path) -> None:
    written = convert_checkpoint(source, tmp_path / "out")
    assert written["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert written["shared"] == {"second": "first"}
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert set(weights) == set(STATE) - {"second"}
    for name, tensor in weights.items():
        assert tensor.dtype == STATE[name].dtype
        assert torch.equal(tensor, STATE[name])


def test_every_tensor_is_aligned(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 8 == 0
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % STATE[name].dtype.itemsize == 0


@pytest.mark.parametrize(("dtype", "wanted"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_only_floats_are_cast(dtype: str, wanted: torch.dtype, source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "out", dtype)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = STATE[name].to(wanted) if STATE[name].is_floating_point() else STATE[name]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def test_shards_and_their_index(source: Path, tmp_path: Path) -> None:
    written = convert_checkpoint(source, tmp_path / "out", max_shard_size="60B")
    shards = [name for name in written["files"] if name.startswith("model-")]
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 1
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": written["bytes"]}
    assert set(index["weight_map"].values()) == set(shards)
    weights = open_checkpoint(tmp_path / "out").weights
    assert set(weights) == set(STATE)
    assert weights["second"] is weights["first"]
    for name, stored in weights.items():
        assert torch.equal(stored.read(), STATE[name])


def test_what_was_converted_converts_to_the_same(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_golden
@pytest.mark.parametrize("size", ["5GB", "1KB"])
def test_shared_tensors_survive_every_conversion(size: str, tmp_path: Path) -> None:
    source = GOLDEN / "zero2_bf16"
    convert_checkpoint(source, tmp_path / "a", max_shard_size=size)
    convert_checkpoint(tmp_path / "a", tmp_path / "b")
    first, *others = (open_checkpoint(folder).weights for folder in (source, tmp_path / "a", tmp_path / "b"))
    assert len(first) > len({id(tensor) for tensor in first.values()})
    for weights in others:
        assert weights.keys() == first.keys()
        assert all(torch.equal(weights[key].read(), first[key].read()) for key in first)


def test_a_missing_configuration_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"a": torch.ones(1)}, source / "model.safetensors")
    convert_checkpoint(source, tmp_path / "a")
    assert "has no configuration" in caplog.text
    caplog.clear()
    (source / "config.json").write_text("{}")
    convert_checkpoint(source, tmp_path / "b")
    assert not caplog.text


def test_a_full_destination_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    for destination in (out, source, out / "mine"):
        with pytest.raises(UsageError, match="destination exists"):
            convert_checkpoint(source, destination)
    (out / "mine").unlink()
    convert_checkpoint(source, out)
    assert (out / "model.safetensors").is_file()


def test_a_failure_leaves_nothing(source: Path, tmp_path: Path) -> None:
    weights = source / "pytorch_model.bin"
    opened = open_checkpoint(source)
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(CheckpointError):
        convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(CheckpointError):
        [tensor.read() for tensor in opened.weights.values()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_failure_half_way_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert done <= total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", on_tensor=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_link_as_companion_is_not_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_too_small_is_said_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UsageError, match="disk is too small"):
        convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1 MiB", 1 << 20), ("7", 7), ("20kb", 20_000), ("3B", 3)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-5GB", "5XB", "1.5GB", "9" * 40, "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="no size"):
        parse_size(text)


@pytest.mark.slow
def test_memory_does_not_grow_with_tensors(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    torch.save({"large": torch.zeros(50_000_000), "other": torch.ones(50_000_000)}, source / "model.bin")
    for dtype in ("keep", "bf16"):
        reset_peak_rss()
        before = peak_rss_mb()
        convert_checkpoint(source, tmp_path / dtype, dtype)
        assert peak_rss_mb() - before < 40
    assert torch.equal(
        load_file(tmp_path / "bf16" / "model.safetensors")["other"], torch.ones(50_000_000).bfloat16()
    )


COMMAND = [str(Path(sys.executable).with_name("otau")), "convert"]


def test_impossible_flags_are_usage_errors(source: Path, tmp_path: Path) -> None:
    for flags in ({"to": "onnx"}, {"dtype": "fp16"}, {"max_shard_size": "much"}):
        with pytest.raises(UsageError, match=f"--{next(iter(flags)).replace('_', '-')}"):
            convert(source, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command(source: Path, tmp_path: Path) -> None:
    def run(out: Path) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, str(source), "--to", "safetensors", "--out", str(out), "--json"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["tensors"] == len(STATE) - 1
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n.")
    hostile = run(tmp_path / "new")
    assert (hostile.returncode, hostile.stdout) == (1, "")
    assert "posix.system" in hostile.stderr
    assert "Traceback" not in hostile.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_command_is_interrupted(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    torch.save({f"{i}": torch.zeros(25_000_000) for i in range(10)}, source / "model.bin")
    process = subprocess.Popen([*COMMAND, str(source), "--out", str(out)], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(path.name.startswith(".out") for path in tmp_path.iterdir()):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode in (130, 0), errors
    assert out.exists() == (process.returncode == 0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
