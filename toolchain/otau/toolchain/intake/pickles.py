"""Pickles read without running anything: an interpreter of the opcodes that torch.save writes.

Python's own unpickler imports what a stream names and calls it. This one never imports and never calls a
thing that a stream names: a name is looked up in two tables, of builders, which are functions of ours, and of
inert names, whose instances become a `Record` of what the stream said about them. Any other name, and any
opcode that nobody writing tensors needs, is refused. Lengths, opcodes and memory are bounded, which the C
unpickler does not do: a memo index of four bytes makes it allocate 32 GB.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from otau.runtime.errors import CheckpointError

__all__ = ["MAX_PICKLE_BYTES", "Name", "Record", "read_pickle"]

MAX_PICKLE_BYTES = 64 << 20
"""The pickle of a 3.4-billion-parameter policy's model states takes 0.2 MB: tensors lie outside of it."""

_MAX_OPCODES = 1_000_000
"""About 50 a tensor. Each costs at most some 200 bytes of memory, so a stream fills 200 MB at worst."""

_MAX_STRING_BYTES = 16 << 20
_MAX_LINE_BYTES = 1024
_MAX_NAME_LENGTH = 256
"""Of a global, which is put together anew from memoised parts each time that it is named."""

_MAX_INTEGER_BYTES = 32


@dataclass(frozen=True)
class Name:
    """A global that a stream names, and that is allowed; it is never imported."""

    full: str

    def __str__(self) -> str:
        """`module.name`."""
        return self.full


@dataclass
class Record:
    """An instance of an allowed class, as data: its class was never imported."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


_Builder = Callable[[tuple[Any, ...]], Any]
"""Makes an object from a call's arguments; ValueError where they are not right."""


def read_pickle(
    stream: BinaryIO,
    where: Path,
    builders: Mapping[str, _Builder],
    is_inert: Callable[[str], bool],
    persistent: _Builder | None = None,
) -> Any:
    """Read one pickle from a stream, up to its end mark.

    Args:
        stream: At most `MAX_PICKLE_BYTES` are read from it.
        where: The file, for messages.
        builders: Allowed `module.name` -> what makes an object of a call.
        is_inert: Whether a `module.name` is allowed and becomes a `Record`.
        persistent: Makes an object of a persistent id; without it these are refused.

    Returns:
        The object: of dicts, lists, tuples, strings, numbers, `Record`s and what the builders make.

    Raises:
        CheckpointError: It names something that is not allowed, is damaged, or is too large.
    """
    return _Interpreter(stream, where, builders, is_inert, persistent).run()


class _Interpreter:
    """A stack machine; `run` is its loop, and every opcode has a method in `_OPCODES`."""

    def __init__(
        self,
        stream: BinaryIO,
        where: Path,
        builders: Mapping[str, _Builder],
        is_inert: Callable[[str], bool],
        persistent: _Builder | None,
    ) -> None:
        self.stream, self.where = stream, where
        self.builders, self.is_inert, self.persistent = builders, is_inert, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.position = 0

    def run(self) -> Any:
        for _ in range(_MAX_OPCODES):
            code = self.take(1)
            if code == b".":
                if len(self.stack) != 1 or self.marks:
                    self.damaged("it ends with an incomplete object")
                return self.stack[0]
            operation = _OPCODES.get(code)
            if operation is None:
                self.refuse(_REFUSED.get(code, f"the opcode {code!r}"))
            try:
                operation(self)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
                self.damaged(f"{type(error).__name__}: {str(error)[:200]}")
        return self.damaged(f"more than {_MAX_OPCODES:,} opcodes")

    # --- bytes

    def take(self, count: int) -> bytes:
        self.position += count
        if count > _MAX_STRING_BYTES or self.position > MAX_PICKLE_BYTES:
            self.damaged(f"a length of {count:,} bytes; {MAX_PICKLE_BYTES:,} in all are read")
        data = self.stream.read(count)
        if len(data) != count:
            self.damaged(f"it ends {count - len(data):,} bytes early")
        return data

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return value

    def line(self) -> str:
        data = self.stream.readline(_MAX_LINE_BYTES)
        self.position += len(data)
        if not data.endswith(b"\n"):
            self.damaged("a line does not end")
        return data[:-1].decode("utf-8")

    # --- errors

    def damaged(self, got: str) -> NoReturn:
        raise CheckpointError(
            "the file is damaged, or not what torch.save writes",
            where=f"{self.where}, byte {self.position} of a pickle",
            got=got,
            fix="copy the checkpoint again",
        )

    def refuse(self, got: str) -> NoReturn:
        raise CheckpointError(
            "the file asks to run code, which otau never does",
            where=f"{self.where}, byte {self.position} of a pickle",
            expected="tensors and plain values",
            got=got,
            fix="do not use a file you do not trust; from your own, save the weights alone: "
            "torch.save(model.state_dict(), FILE)",
        )

    # --- stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        values = self.stack
        self.stack = self.marks.pop()
        return values

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def integer(self, count: int) -> None:
        if count > _MAX_INTEGER_BYTES:
            self.damaged(f"an integer of {count:,} bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            self.damaged("the stack is empty")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(values)

    # --- names and calls

    def name(self, module: Any, name: Any) -> Name:
        if not (isinstance(module, str) and isinstance(name, str)):
            self.damaged("a name that is no text")
        if len(module) + len(name) > _MAX_NAME_LENGTH:
            self.refuse(f"a name of {len(module) + len(name):,} characters")
        full = f"{module}.{name}"
        if full not in self.builders and not self.is_inert(full):
            self.refuse(full[:200] if full.isprintable() else repr(full[:200]))
        return Name(full)

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push(self.name(module, name))

    def line_name(self) -> None:
        module = self.line()
        self.push(self.name(module, self.line()))

    def line_instance(self) -> None:
        module = self.line()
        self.refuse(f"the opcode INST for {self.name(module, self.line())}")

    def reduce(self) -> None:
        args, callee = self.stack.pop(), self.stack.pop()
        if not isinstance(callee, Name) or not isinstance(args, tuple):
            self.refuse(f"a call of a {type(callee).__name__}")
        builder = self.builders.get(callee.full)
        self.push(builder(args) if builder else Record(callee.full, args))

    def new_object(self) -> None:
        args, callee = self.stack.pop(), self.stack.pop()
        if not isinstance(callee, Name) or callee.full in self.builders or not isinstance(args, tuple):
            self.refuse(f"an instance of {callee if isinstance(callee, Name) else type(callee).__name__}")
        self.push(Record(callee.full, args))

    def new_object_with_names(self) -> None:
        names = self.stack.pop()
        self.new_object()
        self.stack[-1].state = names

    def build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, Record):
            instance.state = state
        elif isinstance(instance, Name):
            self.refuse(f"a state for {instance}")
        # Else the attributes of an OrderedDict or a tensor, such as `_metadata`: of no use to us.

    def persistent_id(self) -> None:
        value = self.stack.pop()
        if self.persistent is None:
            self.refuse("a persistent id, in a pickle that has none")
        self.push(self.persistent(value if isinstance(value, tuple) else (value,)))

    # --- containers

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target = target.items
        if not isinstance(target, dict):
            self.damaged(f"items for a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Tuples are out: one that holds itself twice, 60 times over, takes for ever to hash; and so are
            # integers that can be chosen to have one hash.
            if not isinstance(key, (str, bytes, type(None))) and not (
                type(key) is int and abs(key) < 1 << 60
            ):
                self.damaged(f"a dictionary key of type {type(key).__name__}")
            target[key] = value

    def extend(self, values: Iterable[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target = target.elements
        if not isinstance(target, list):
            self.damaged(f"elements for a {type(target).__name__}")
        target.extend(values)


_Operation = Callable[[_Interpreter], Any]


def _pair(machine: _Interpreter) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


_OPCODES: dict[bytes, _Operation] = {
    b"\x80": lambda m: m.number("<B") <= 5 or m.damaged("a pickle protocol above 5"),
    b"\x95": lambda m: m.number("<Q"),
    b"(": _Interpreter.mark,
    b"0": lambda m: m.stack.pop(),
    b"1": lambda m: m.pop_mark(),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"\x8a": lambda m: m.integer(m.number("<B")),
    b"\x8b": lambda m: m.integer(m.number("<I")),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"X": lambda m: m.push(m.take(m.number("<I")).decode("utf-8", "surrogatepass")),
    b"\x8c": lambda m: m.push(m.take(m.number("<B")).decode("utf-8", "surrogatepass")),
    b"\x8d": lambda m: m.push(m.take(m.number("<Q")).decode("utf-8", "surrogatepass")),
    b"B": lambda m: m.push(m.take(m.number("<I"))),
    b"C": lambda m: m.push(m.take(m.number("<B"))),
    b"\x8e": lambda m: m.push(m.take(m.number("<Q"))),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"\x8f": lambda m: m.push([]),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"a": lambda m: m.extend((m.stack.pop(),)),
    b"e": lambda m: m.extend(m.pop_mark()),
    b"\x90": lambda m: m.extend(m.pop_mark()),
    b"\x91": lambda m: m.push(m.pop_mark()),
    b"s": _pair,
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    b"c": _Interpreter.line_name,
    b"\x93": _Interpreter.stack_name,
    b"i": _Interpreter.line_instance,
    b"R": _Interpreter.reduce,
    b"\x81": _Interpreter.new_object,
    b"\x92": _Interpreter.new_object_with_names,
    b"b": _Interpreter.build,
    b"Q": _Interpreter.persistent_id,
}
"""What torch.save writes in pickle protocols 2 to 5. Sets become lists: their elements need no hash."""

_REFUSED = {
    b"o": "the opcode OBJ, which makes an instance of any class",
    b"P": "the opcode PERSID, a persistent id as text",
    b"\x82": "the opcode EXT1, an extension code",
    b"\x83": "the opcode EXT2, an extension code",
    b"\x84": "the opcode EXT4, an extension code",
    b"\x96": "the opcode BYTEARRAY8",
    b"\x97": "the opcode NEXT_BUFFER, a buffer outside the pickle",
    b"\x98": "the opcode READONLY_BUFFER, a buffer outside the pickle",
}
"""Opcodes to refuse by their names; the rest, of protocols 0 and 1, by their byte."""
