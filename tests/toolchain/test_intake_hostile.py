"""Files that are out to run code, to fill memory or to read what is not theirs: refused, by name."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from otau.runtime.errors import CheckpointError
from otau.toolchain.intake.torch_file import TorchTensor, read_torch_file
from otau.toolchain.memory import peak_rss_mb, reset_peak_rss

LEGACY_HEAD = b"".join(
    pickle.dumps(value, protocol=2)
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
)


def as_zip(data: bytes, storages: dict[str, bytes] | None = None, compression: int = 0) -> bytes:
    """What torch.save writes, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for name, content in (storages or {}).items():
            archive.writestr(f"archive/data/{name}", content)
    return buffer.getvalue()


def as_legacy(data: bytes) -> bytes:
    """The older format around any pickle."""
    return LEGACY_HEAD + data + pickle.dumps([], protocol=2)


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Stateful:
    """Pickles as an instance with a state, whose class would run code to take it."""

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("__setstate__ ran")

    def __getstate__(self) -> str:
        return "state"


def line(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def payloads(canary: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that leave a canary file where they run, with what the refusal must name."""
    shell = f"touch {canary}"
    text = b"X" + struct.pack("<I", len(shell)) + shell.encode()
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    system, evaluate = Call(os.system, shell), Call(eval, code)
    stack_global = b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + text + b"\x85R."
    moments = {"optimizer_state_dict": {"base_optimizer_state": {"state": {0: {"exp_avg": system}}}}}
    nested = OrderedDict(weight=[({"a": (evaluate,)},)])
    deepspeed = b"\x80\x02" + line("deepspeed.runtime.config", "Anything") + b")R"
    return {
        "reduce, os.system": (pickle.dumps(system, 2), "posix.system"),
        "reduce, eval": (pickle.dumps(evaluate, 2), "__builtin__.eval"),
        "protocol 4": (pickle.dumps(evaluate, 4), "builtins.eval"),
        "in optimizer states": (pickle.dumps(moments, 2), "posix.system"),
        "nested": (pickle.dumps(nested, 2), "__builtin__.eval"),
        "GLOBAL": (b"\x80\x02" + line("os", "system") + text + b"\x85R.", "os.system"),
        "STACK_GLOBAL": (stack_global, "posix.system"),
        "INST": (b"\x80\x02(" + text + b"ios\nsystem\n.", "os.system"),
        "INST of an allowed class": (b"\x80\x02(" + text + b"itorch\nSize\n.", "opcode INST"),
        "OBJ": (b"\x80\x02(" + line("os", "system") + text + b"o.", "os.system"),
        "OBJ of an allowed class": (b"\x80\x02(" + line("torch", "Size") + text + b"o.", "opcode OBJ"),
        "NEWOBJ": (b"\x80\x02" + line("subprocess", "Popen") + text + b"\x85\x81.", "subprocess.Popen"),
        "NEWOBJ_EX": (
            b"\x80\x04" + line("subprocess", "Popen") + text + b"\x85}\x92.",
            "subprocess.Popen",
        ),
        "BUILD with __setstate__": (pickle.dumps(Stateful(), 2), "Stateful"),
        "BUILD of a function": (b"\x80\x02" + line("torch._utils", "_rebuild_tensor_v2") + b"}b.", "a state"),
        "call of what a call gave": (deepspeed + text + b"\x85R.", "a call of a Record"),
        "attribute of an allowed module": (
            b"\x80\x02" + line("torch", "load") + text + b"\x85R.",
            "torch.load",
        ),
        "dotted name": (b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93" + text + b"\x85R.", "torch.os.system"),
        "getattr": (b"\x80\x02" + line("builtins", "getattr") + text + b"\x85R.", "builtins.getattr"),
        "EXT1": (b"\x80\x02\x82\x01)R.", "EXT1"),
        "EXT2": (b"\x80\x02\x83\x01\x00)R.", "EXT2"),
        "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00)R.", "EXT4"),
        "persistent id as text": (b"\x80\x02Pos.system\n.", "PERSID"),
        "persistent id of another kind": (b"\x80\x02" + text + b"Q.", "no storage"),
        "persistent id with a class": (
            b"\x80\x02(X\x07\x00\x00\x00storage" + line("os", "system") + b"tQ.",
            "os.system",
        ),
        "buffer outside": (b"\x80\x05\x97.", "NEXT_BUFFER"),
        "protocol 0": (b"S'a'\n.", "opcode b'S'"),
    }


NAMES = sorted(payloads(Path("x")))


@pytest.mark.parametrize("form", [as_zip, as_legacy])
@pytest.mark.parametrize("name", NAMES)
def test_payload_is_refused_by_name_and_does_not_run(
    name: str, form: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    data, named = payloads(canary)[name]
    path = tmp_path / "weights.pt"
    path.write_bytes(form(data))
    with pytest.raises(CheckpointError) as refused:
        read_torch_file(path)
    assert named in str(refused.value)
    assert str(path) in str(refused.value)
    assert refused.value.fix
    assert not canary.exists()


def test_payloads_would_run_in_an_ordinary_unpickler(tmp_path: Path) -> None:
    """The control: these pickles are what they are said to be."""
    canary = tmp_path / "canary"
    ran = []
    for name in (
        "reduce, os.system",
        "reduce, eval",
        "in optimizer states",
        "GLOBAL",
        "STACK_GLOBAL",
        "INST",
    ):
        pickle.loads(payloads(canary)[name][0])
        ran.append(canary.exists())
        canary.unlink(missing_ok=True)
    assert ran == [True] * 6


def test_payload_in_every_part_of_the_older_format(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    attack = pickle.dumps(Call(os.system, f"touch {canary}"), protocol=2)
    parts = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001)]
    parts += [pickle.dumps({"little_endian": True}, protocol=2), pickle.dumps({}, protocol=2), b"\x80\x02]."]
    for index in range(5):
        path = tmp_path / f"{index}.pt"
        path.write_bytes(b"".join([*parts[:index], attack, *parts[index + 1 :]]))
        with pytest.raises(CheckpointError, match=r"posix\.system"):
            read_torch_file(path)
    assert not canary.exists()


def test_inert_classes_are_records_and_never_imported(tmp_path: Path) -> None:
    data = b"\x80\x02" + line("deepspeed.no.such.module", "Scaler") + b")\x81}X\x01\x00\x00\x00aK\x07sb."
    path = tmp_path / "weights.pt"
    path.write_bytes(as_zip(data))
    record = read_torch_file(path)
    assert (record.name, record.args, record.state) == ("deepspeed.no.such.module.Scaler", (), {"a": 7})


DOUBLING = b"\x80\x02)" + b"".join(b"q%c0(h%ch%ct" % (i, i, i) for i in range(100)) + b"."
"""A tuple of the one before twice, a hundred times over."""


def refused_within(data: bytes, limit_mb: float, path: Path, message: str = ".") -> None:
    path.write_bytes(data)
    reset_peak_rss()
    before = peak_rss_mb()
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(path)
    assert peak_rss_mb() - before < limit_mb


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02X\xff\xff\xff\xff.",  # a string of 4 GB
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # one of 9 EB
        b"\x80\x04\x8e\x00\x00\x00\x00\x04\x00\x00\x00.",  # 16 GiB of bytes
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # an integer of 2 GB
        b"\x80\x02\x8b\x40\x00\x00\x00" + b"\x01" * 64 + b".",
        b"\x80\x02" + b"c" + b"a" * 5_000_000 + b"\nb\n.",  # a name of 5 MB
        b"\x80\x02}" + DOUBLING[2:-1] + b"Ns.",  # a key that takes for ever to hash
        b"\x80\x02}\x8a\x09" + b"\xff" * 8 + b"\x01Ns.",  # a key that could be chosen for its hash
        b"\x80\x02h\x07.",
        b"\x80\x02R.",
        b"\x80\x02u.",
        b"\x80\x02.",
        b"",
    ],
    ids=range(13),
)
def test_lengths_are_bounded(data: bytes, tmp_path: Path) -> None:
    for form in (as_zip, as_legacy):
        refused_within(form(data), 100, tmp_path / "weights.pt")


@pytest.mark.slow
@pytest.mark.parametrize("opcode", [b"]", b"(", b"}0"])
def test_objects_are_bounded(opcode: bytes, tmp_path: Path) -> None:
    """More than any checkpoint has."""
    refused_within(as_zip(b"\x80\x02N" + opcode * 2_000_000), 400, tmp_path / "weights.pt", "opcodes")


def test_a_memo_index_allocates_nothing(tmp_path: Path) -> None:
    """The C unpickler makes a table as long as the largest index."""
    path = tmp_path / "weights.pt"
    path.write_bytes(as_zip(b"\x80\x02}r\xff\xff\xff\xffj\xff\xff\xff\xff\x86."))
    reset_peak_rss()
    before = peak_rss_mb()
    assert read_torch_file(path) == ({}, {})
    assert peak_rss_mb() - before < 50


def test_depth_is_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(as_zip(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."))
    assert isinstance(read_torch_file(path), list)
    path.write_bytes(as_zip(DOUBLING))
    assert len(read_torch_file(path)) == 2


def test_a_pickle_above_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(
        as_zip(b"\x80\x02" + (b"B" + struct.pack("<I", 1 << 23) + bytes(1 << 23) + b"0") * 9 + b"N.")
    )
    with pytest.raises(CheckpointError, match="at most 67,108,864"):
        read_torch_file(path)


def tensor_pickle(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
    count: int = 6,
    key: str = "0",
    kind: str = "FloatStorage",
) -> bytes:
    """A tensor as torch.save writes it, with any numbers."""

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    pid = b"(" + plain("storage") + line("torch", kind) + plain(key) + plain("cpu") + plain(count) + b"tQ"
    args = b"(" + pid + plain(offset) + plain(shape) + plain(stride) + b"\x89)t"
    return b"\x80\x02" + line("torch._utils", "_rebuild_tensor_v2") + args + b"R."


GOOD = torch.arange(6, dtype=torch.float32)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (((2, 3), (3, 1)), GOOD.view(2, 3)),
        (((3, 2), (1, 3)), GOOD.view(2, 3).T),
        (((2,), (3,), 2), GOOD[[2, 5]]),
        (((), (), 5), GOOD[5]),
        (((0, 3), (3, 1), 6), GOOD[:0].view(0, 3)),
    ],
)
def test_a_tensor_is_read_where_it_lies(numbers: Any, expected: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(as_zip(tensor_pickle(*numbers), {"0": GOOD.numpy().tobytes()}))
    tensor = read_torch_file(path)
    assert isinstance(tensor, TorchTensor)
    assert torch.equal(tensor.stored().read(), expected)


@pytest.mark.parametrize(
    "numbers",
    [
        {"shape": (7,), "stride": (1,)},
        {"shape": (2, 3), "stride": (4, 1)},
        {"shape": (6,), "stride": (1,), "offset": 1},
        {"shape": (1,), "stride": (1,), "offset": 6},
        {"shape": (1,), "stride": (1,), "offset": -1},
        {"shape": (2,), "stride": (-1,), "offset": 5},
        {"shape": (-1,), "stride": (1,)},
        {"shape": (1 << 40,), "stride": (0,)},
        {"shape": (1 << 31, 1 << 31, 4), "stride": (0, 0, 0)},
        {"shape": (0, 1 << 62), "stride": (1, 1)},
        {"shape": (0, 1 << 40, 1 << 40), "stride": (1, 1, 1)},
        {"shape": (1,) * 65, "stride": (1,) * 65},
        {"shape": (2, 3), "stride": (1,)},
        {"shape": (6.0,), "stride": (1,)},
        {"shape": ("6",), "stride": (1,)},
        {"shape": (6,), "stride": (1,), "count": 7},
        {"shape": (6,), "stride": (1,), "count": -1},
        {"shape": (6,), "stride": (1,), "count": 1 << 60},
        {"shape": (6,), "stride": (1,), "key": "1"},
        {"shape": (6,), "stride": (1,), "key": "../data.pkl"},
        {"shape": (6,), "stride": (1,), "kind": "DoubleStorage"},
        {"shape": (3,), "stride": (1,), "count": 3, "kind": "ComplexFloatStorage"},
    ],
)
def test_tensors_outside_of_their_storage_are_refused(numbers: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(as_zip(tensor_pickle(**numbers), {"0": GOOD.numpy().tobytes()}))
    with pytest.raises(CheckpointError):
        read_torch_file(path)


def saved(**options: Any) -> bytes:
    """A small model's file."""
    buffer = io.BytesIO()
    torch.save({"a": GOOD, "b": torch.ones(3, 2, dtype=torch.bfloat16)}, buffer, **options)
    return buffer.getvalue()


def with_directory(data: bytes, field: int, form: str, value: int, entry: int = 0) -> bytes:
    """The file with a number of the list of entries changed; `field` is its place in the entry."""
    at = [i for i in range(len(data)) if data.startswith(b"PK\x01\x02", i)][entry] + field
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: as_zip(b"\x80\x02N.", compression=zipfile.ZIP_DEFLATED),
        lambda data: with_directory(data, 8, "<H", 1),  # encrypted
        lambda data: with_directory(data, 10, "<H", 8),  # compressed
        lambda data: with_directory(data, 24, "<I", 1 << 30),  # unpacks to more
        lambda data: with_directory(data, 42, "<I", 5),  # starts elsewhere
        lambda data: with_directory(data, 42, "<I", 0xFFFFFFF0),
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: b"PK\x03\x04",
        lambda data: data.replace(b"little", b"bigger"),
    ],
    ids=range(12),
)
def test_zip_files_that_torch_does_not_write(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(damage(saved()))
    with pytest.raises(CheckpointError):
        read_torch_file(path)


def test_entries_that_share_bytes(tmp_path: Path) -> None:
    """A storage within another: how a small file stands for a large one."""
    name = b"archive/data/1"
    inner = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 24, 24, len(name), 0) + name
    data = as_zip(tensor_pickle((6,), (1,)), {"0": inner + GOOD.numpy().tobytes(), "1": bytes(24)})
    path = tmp_path / "weights.pt"
    path.write_bytes(with_directory(data, 42, "<I", data.index(inner), entry=3))
    with pytest.raises(CheckpointError, match="share bytes"):
        read_torch_file(path)


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(
        as_zip(tensor_pickle((6,), (1,)), {"0": bytes(24), "1": bytes(24)}).replace(b"data/1", b"data/0")
    )
    with pytest.raises(CheckpointError, match="two entries of that name"):
        read_torch_file(path)


def test_an_entry_larger_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for size in (1 << 20, 1 << 31):
        path.write_bytes(with_directory(with_directory(saved(), 20, "<I", size), 24, "<I", size))
        with pytest.raises(CheckpointError, match="bytes after the file"):
            read_torch_file(path)


def test_pipes_and_devices_are_not_opened_for_long(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/zero"), tmp_path):
        with pytest.raises(CheckpointError, match=r"no plain file|cannot be read"):
            read_torch_file(path)


def test_a_truncated_tensor_is_no_tensor(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(saved())
    tensor = read_torch_file(path)["a"]
    os.truncate(path, tensor.start + 4)
    with pytest.raises(CheckpointError, match="ends 20 bytes early"):
        tensor.stored().read()
