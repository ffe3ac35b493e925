"""What a compiled program does, read off its text: collectives, kernels and bytes, loops multiplied out.

XLA's own analysis counts a loop's body once and a kernel that it did not make (Pallas, cuDNN) as nothing;
here every instruction counts as often as it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

SIZES = {
    "pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4,
    "u32": 4, "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "f8e4m3": 1, "f8e4m3fnuz": 1, "f8e5m2fnuz": 1,
    "f4e2m1fn": 0.5,
}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota", "partition-id",
    "replica-id", "while", "conditional", "call", "async-start", "async-done", "opt-barrier",
}  # fmt: skip
"""Instructions that move nothing themselves."""
_TYPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_PLACED = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_INSIDE = re.compile(r"S\([1-9]")  # a TPU's own memory, as a layout says it
_LINE = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_HEAD = re.compile(r"(ENTRY\s+)?%([\w.\-]+) .*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.  ``type``: of its result, as text.  ``rest``: what follows the operands."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind.

    Attributes:
      count: how often one runs.
      result: bytes of their results on each chip.
      wire: bytes that a ring makes each chip send.
    """

    count: int = 0
    result: float = 0.0
    wire: float = 0.0


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: name -> its instructions.  entry: the one that runs first.
      runs: name of a computation -> how often it runs.  Bodies of fusions are not in it.
      unknown: loops whose number of runs the text does not tell; they count as one.
    """

    computations: Mapping[str, list[Instruction]]
    entry: str
    runs: Mapping[str, int]
    unknown: tuple[str, ...]

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """(instruction, how often it runs) of everything that is not inside a fusion."""
        for name, times in self.runs.items():
            for instruction in self.computations[name]:
                yield instruction, times


def read(text: str) -> Program:
    """A program from ``compiled.as_text()``."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            inside, rest = _split_operands(line[found.end() :])
            names = tuple(re.findall(r"%([\w.\-]+)", inside)) or (inside,)
            current.append(Instruction(found[1], found[2], found[3], names, rest))
    runs: dict[str, int] = collections.defaultdict(int)
    unknown: list[str] = []
    _visit(entry, 1, computations, runs, unknown)
    return Program(computations, entry, dict(runs), tuple(unknown))


def _split_operands(text: str) -> tuple[str, str]:
    """What is inside the parenthesis that is open, and what follows it."""
    depth = 1
    for place, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return text[:place], text[place + 1 :]
    return text, ""


def _visit(
    name: str,
    times: int,
    computations: Mapping[str, list[Instruction]],
    runs: dict[str, int],
    unknown: list[str],
) -> None:
    runs[name] += times
    for instruction in computations.get(name, ()):
        rest, inner = instruction.rest, times
        called: list[str] = []
        if instruction.op == "while":
            called = re.findall(r"body=%([\w.\-]+)", rest)
            count = _trip_count(rest, computations)
            if count is None:
                unknown.append(called[0])
            inner = times * (count or 1)
        elif instruction.op == "conditional":
            called = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", rest)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", rest):
                called += re.findall(r"%([\w.\-]+)", group)
        elif instruction.op == "call":
            called = re.findall(r"to_apply=%([\w.\-]+)", rest)
        elif instruction.op == "async-start":
            called = re.findall(r"calls=%([\w.\-]+)", rest)
        for other in called:
            _visit(other, inner, computations, runs, unknown)


def _trip_count(rest: str, computations: Mapping[str, list[Instruction]]) -> int | None:
    """How often a loop runs: as XLA writes it, else (TPU) the one constant of its condition."""
    if known := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', rest):
        return int(known[1])
    todo, seen, bounds = re.findall(r"condition=%([\w.\-]+)", rest), set(), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for instruction in computations.get(name, ()):
            if instruction.op == "constant" and instruction.type.startswith("s32[]"):
                bounds.add(int(instruction.operands[0]))
            todo += re.findall(r"calls=%([\w.\-]+)", instruction.rest)
    bounds = {bound for bound in bounds if bound > 1} or bounds - {0}
    return bounds.pop() if len(bounds) == 1 else None


def type_bytes(text: str) -> float:
    """Bytes of a type, the parts of a tuple together."""
    return sum((_array_bytes(*found) for found in _TYPE.findall(text)), 0.0)


def _memory_bytes(text: str) -> float:
    """Bytes of a type without what lies inside the chip."""
    arrays = _PLACED.findall(text)
    return sum((_array_bytes(dtype, dims) for dtype, dims, at in arrays if not _INSIDE.search(at)), 0.0)


def _array_bytes(dtype: str, dims: str) -> float:
    sizes = [int(size.lstrip("<=")) for size in dims.split(",") if size]
    return float(SIZES.get(dtype, 0) * math.prod(sizes))


# ---------------------------------------------------------------------------------------------
# Collectives


def collectives(program: Program, chips: int) -> dict[str, Traffic]:
    """Kind -> what it moves in one run of the program on so many chips."""
    found: dict[str, Traffic] = {}
    for name, times in program.runs.items():
        for kind, result, groups in _collectives_of(name, program, set()):
            wire = _wire(kind, _group_size(groups, chips)) * result
            old = found.get(kind, Traffic())
            found[kind] = Traffic(old.count + times, old.result + times * result, old.wire + times * wire)
    return found


def _collectives_of(name: str, program: Program, fused: set[str]) -> Iterator[tuple[str, float, str]]:
    """(kind, bytes of the result, text with the groups) of each collective of a computation.

    A TPU's compiler fuses them.  One that runs beside other work stands in the fusion that starts it, in
    those that go on with it and in the one that ends it, always on the same channel.

    Args:
      fused: channels of fusions that were met; added to.
    """
    for instruction in program.computations.get(name, ()):
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            yield kind, _result_bytes(instruction, kind), instruction.rest
        elif kind == "fusion" and (called := re.search(r"calls=%([\w.\-]+)", instruction.rest)):
            for inner, result, rest in _collectives_of(called[1], program, fused):
                channel = re.search(r"channel_id=(\d+)", rest)
                if channel and channel[1] in fused:
                    continue
                fused |= {channel[1]} if channel else set()
                if called[1].startswith("all-reduce-scatter"):  # each chip keeps its part of the sum
                    inner, result = "reduce-scatter", type_bytes(instruction.type)
                yield inner, result, rest


def _result_bytes(instruction: Instruction, kind: str) -> float:
    parts = [_array_bytes(*part) for part in _TYPE.findall(instruction.type)]
    if instruction.op.endswith("-start") and kind != "all-reduce":
        # (operands, results, counters): the results are the second half of what is no counter.
        parts = [size for size in parts if size > 8]
        parts = parts[len(parts) // 2 :]
    return sum(parts, 0.0)


def _wire(kind: str, chips: int) -> float:
    """Bytes on the wire of each chip of a ring, per byte of the result."""
    if kind == "collective-permute":
        return 1.0
    return (
        {"all-reduce": 2, "all-gather": 1, "all-to-all": 1, "reduce-scatter": chips}[kind]
        * (chips - 1)
        / chips
    )


def _group_size(rest: str, chips: int) -> int:
    """Chips of a group, of any of the spellings of ``replica_groups``; all where none is named."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\)+)? \{([^}]*)\}", rest):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(axes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return chips


# ---------------------------------------------------------------------------------------------
# Kernels and bytes


def kernels(program: Program) -> tuple[int, dict[str, int]]:
    """(fusions that run, target of a custom call -> how often it runs)."""
    fusions, calls = 0, collections.Counter()
    for instruction, times in program.executed():
        if instruction.op == "fusion":
            fusions += times
        elif instruction.op == "custom-call" and (target := _target(instruction)):
            calls[target] += times
    return fusions, dict(calls)


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]+)"', instruction.rest)
    return found[1] if found else ""


PLACES = {
    "AllocateBuffer",
    "ConcatBitcast",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
    "PinToDevice",
    "PinToDeviceSram",
}
"""Targets of custom calls that are no kernels."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes that a program reads and writes; the compiler's count also has what stays inside a chip.

    Attributes:
      compiler: by XLA's own count.
      custom_calls: operands and results of every kernel that it does not look into.
      loops: what bodies of loops move in the runs after the first, without those kernels.
    """

    compiler: float
    custom_calls: float
    loops: float

    @property
    def total(self) -> float:
        return self.compiler + self.custom_calls + self.loops


def count_bytes(program: Program, compiler: float) -> Bytes:
    """Bytes of a program, of which XLA counts ``compiler`` (``cost_analysis()["bytes accessed"]``)."""
    custom = loops = 0.0
    for name, times in program.runs.items():
        types = {instruction.name: instruction.type for instruction in program.computations[name]}
        for instruction in program.computations[name]:
            if instruction.op in FREE:
                continue
            if instruction.op == "custom-call":
                if _target(instruction) not in PLACES:
                    custom += times * _moved(instruction, types, program)
            elif times > 1:
                loops += (times - 1) * _moved(instruction, types, program)
    return Bytes(compiler, custom, loops)


def loop_bytes(program: Program, body: str) -> float:
    """Bytes that one run of a loop's body reads and writes, kernels and inner loops among them."""
    inner: dict[str, int] = collections.defaultdict(int)
    _visit(body, 1, program.computations, inner, [])
    total = 0.0
    for name, times in inner.items():
        types = {instruction.name: instruction.type for instruction in program.computations[name]}
        for instruction in program.computations[name]:
            if instruction.op not in FREE and _target(instruction) not in PLACES:
                total += times * _moved(instruction, types, program)
    return total


def _moved(instruction: Instruction, types: Mapping[str, str], program: Program) -> float:
    """Bytes of operands and results; of an array that is only sliced, or written in part, that part."""
    sizes = [_memory_bytes(types.get(operand, "")) for operand in instruction.operands]
    result = _memory_bytes(instruction.type)
    if instruction.op in ("dynamic-slice", "slice", "gather"):
        return type_bytes(instruction.type) * (sizes[0] > 0) + result
    if instruction.op == "dynamic-update-slice":
        return 2 * sizes[1]
    if instruction.op.endswith("-done"):
        return 0.0
    if instruction.op.endswith("-start"):  # (result, operand, counter)
        return result
    if instruction.op == "fusion" and (called := re.search(r"calls=%([\w.\-]+)", instruction.rest)):
        return _fusion_bytes(program.computations.get(called[1], []), sizes, result)
    return sum(sizes) + result


def _fusion_bytes(body: list[Instruction], sizes: list[float], result: float) -> float:
    """Bytes that a fusion moves: of what it only slices the slices, of what it updates the part."""
    types = {instruction.name: instruction.type for instruction in body}
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for instruction in body:
        for operand in instruction.operands:
            users[operand].append(instruction)
    sizes = list(sizes)
    for parameter in (instruction for instruction in body if instruction.op == "parameter"):
        place, using = int(parameter.operands[0]), _users(parameter.name, users)
        if place >= len(sizes) or not using:
            continue
        if all(user.op == "dynamic-slice" for user in using):
            sizes[place] = min(sizes[place], sum(type_bytes(user.type) for user in using))
        elif all(user.op == "dynamic-update-slice" for user in using):
            part = sum(type_bytes(types.get(user.operands[1], "")) for user in using)
            result -= sizes[place] - part if result >= sizes[place] else 0.0
            sizes[place] = 0.0
    return sum(sizes) + result


def _users(name: str, users: Mapping[str, list[Instruction]]) -> list[Instruction]:
    """What uses a value, through bitcasts."""
    found: list[Instruction] = []
    for user in users.get(name, ()):
        found += _users(user.name, users) if user.op == "bitcast" else [user]
    return found
