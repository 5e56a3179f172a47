"""Entries of a zip file where they lie: only ones stored as they are, so that a part of one can be read.

torch.save writes such files. Python's zipfile would take compressed entries, which unpack to a thousand times
their size, and entries that share bytes; here both are refused, and every size is held against the file's.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from otau.runtime.errors import CheckpointError
from otau.toolchain.intake.files import damaged, read_exactly

__all__ = ["ZipEntry", "read_entries"]

_MAX_DIRECTORY_BYTES = 64 << 20
_MAX_ENTRIES = 100_000
"""One a tensor; a full-size policy has 800."""

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 0x2041
"""The flags for encryption, strong encryption and a masked directory."""


@dataclass(frozen=True)
class ZipEntry:
    """Where an entry's bytes lie in its file."""

    start: int
    size: int


def read_entries(handle: int, where: Path) -> dict[str, ZipEntry]:
    """The entries of a zip file by name.

    Args:
        handle: Of the open file.
        where: Its path, for messages.

    Raises:
        CheckpointError: The file is damaged, an entry is compressed or encrypted, or two share bytes.
    """
    size = os.fstat(handle).st_size
    directory, count = _read_directory(handle, size, where)
    entries: dict[str, ZipEntry] = {}
    spans = []
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(directory):
            damaged(where, "the list of entries is too short")
        fields = _ENTRY.unpack_from(directory, at)
        flags, method, packed, unpacked = fields[3], fields[4], *fields[8:10]
        name_size, extra_size, comment_size, header = fields[10], fields[11], fields[12], fields[16]
        if fields[0] != b"PK\x01\x02":
            damaged(where, "an entry has another signature")
        raw = directory[at + _ENTRY.size : at + _ENTRY.size + name_size]
        name = raw.decode("utf-8", "replace")
        extra_at = at + _ENTRY.size + name_size
        extra = directory[extra_at : extra_at + extra_size]
        at = extra_at + extra_size + comment_size
        unpacked, packed, header = _widen(extra, [unpacked, packed, header], where)
        if flags & _ENCRYPTED:
            _refuse(where, name, "an encrypted entry")
        if method or packed != unpacked:
            _refuse(where, name, f"a compressed entry: {packed:,} bytes for {unpacked:,}")
        if name in entries:
            _refuse(where, name, "two entries of that name")
        start = _data_start(handle, header, raw, where, name)
        if start + packed > size:
            damaged(where, f"{name[:200]!r} ends {start + packed - size:,} bytes after the file")
        entries[name] = ZipEntry(start, packed)
        spans.append((header, start + packed, name))
    spans.sort()
    for (_, end, _), (start, _, name) in zip(spans, spans[1:], strict=False):
        if start < end:
            _refuse(where, name, "two entries that share bytes")
    return entries


def _refuse(where: Path, name: str, got: str) -> NoReturn:
    raise CheckpointError(
        "the file is a zip archive, but not as torch.save writes it",
        where=f"{where}: {name[:200]!r}",
        expected="entries stored as they are, each with bytes of its own",
        got=got,
        fix="do not use a file you do not trust; save your own again with torch.save",
    )


def _read_directory(handle: int, size: int, where: Path) -> tuple[bytes, int]:
    """The list of entries, and how many it says they are."""
    tail_start = max(0, size - _END.size - _FULL16)
    tail = read_exactly(handle, tail_start, size - tail_start, where)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        damaged(where, "it has no list of entries at its end: it is truncated")
    fields = _END.unpack_from(tail, at)
    count, length, start = fields[4], fields[5], fields[6]
    if _FULL16 in (count,) or _FULL32 in (length, start):
        locator_at = tail_start + at - _END64_LOCATOR.size
        _, _, end_at, _ = _END64_LOCATOR.unpack(read_exactly(handle, locator_at, _END64_LOCATOR.size, where))
        if end_at > size:
            damaged(where, "its end record lies outside of it")
        wide = _END64.unpack(read_exactly(handle, end_at, _END64.size, where))
        if wide[0] != b"PK\x06\x06":
            damaged(where, "its end record has another signature")
        count, length, start = wide[7], wide[8], wide[9]
    if count > _MAX_ENTRIES or length > _MAX_DIRECTORY_BYTES:
        damaged(where, f"{count:,} entries, listed in {length:,} bytes; at most {_MAX_ENTRIES:,} are read")
    if start + length > size or count * _ENTRY.size > length:
        damaged(where, f"a list of {count:,} entries in {length:,} bytes")
    return read_exactly(handle, start, length, where), count


def _widen(extra: bytes, values: list[int], where: Path) -> list[int]:
    """Puts the 64-bit numbers of a zip64 field in the place of those that are all ones."""
    if _FULL32 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            numbers = extra[at + 4 : at + 4 + length]
            wide = iter(struct.unpack(f"<{len(numbers) // 8}Q", numbers[: len(numbers) // 8 * 8]))
            return [next(wide, -1) if value == _FULL32 else value for value in values]
        at += 4 + length
    return damaged(where, "an entry above 4 GB without its size")


def _data_start(handle: int, header: int, raw: bytes, where: Path, name: str) -> int:
    """Where an entry's bytes begin: after its own header, which must be that of the same entry."""
    fields = _LOCAL.unpack(read_exactly(handle, header, _LOCAL.size, where))
    name_at = header + _LOCAL.size
    if fields[0] != b"PK\x03\x04" or read_exactly(handle, name_at, len(raw), where) != raw:
        damaged(where, f"{name[:200]!r} is not where the list of entries says")
    if fields[3]:
        _refuse(where, name, "an entry that is compressed by its own header")
    return name_at + fields[9] + fields[10]
