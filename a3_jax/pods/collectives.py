"""What chips send to each other in a step, read from a compiled program's text.

    ENTRY -> while (8 trips) -> body -> while (15 trips) -> body -> all-gather: 120 times a step

An instruction counts as often as the loops around it turn. A collective that the TPU compiler runs behind
other work appears in several fusions, its start, its pieces and its end, under one channel and chain: it
counts once. What goes from slice to slice is handed to the hosts: a `send` that says which collective it
is part of; all other groups lie within a slice. Bytes are those that one chip sends, as rings need them
(Thakur et al., Optimization of Collective Communication Operations in MPICH, 2005): of an array of R bytes
over n chips

    all-gather, reduce-scatter, all-to-all   R (n - 1) / n
    all-reduce                               2 R (n - 1) / n
    collective-permute                       R
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|\w+_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_PART_OF_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_BITS = {"pred": 8, "token": 0}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction.

    Attributes:
      name: in the program. kind: one of `KINDS`.
      shapes: (dtype, dimensions) of what it gives; of a start also of what it takes.
      bytes: of the whole arrays, as they are before being scattered or after being gathered.
      groups: chips that speak to each other, as positions in a slice's mesh; of a permute the pairs; of
        what goes beyond the slice, the slices.
      times: how often a step runs it.
      dcn: whether it goes from slice to slice, over the data-centre network.
    """

    name: str
    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: int
    dcn: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a chip sends in all its turns."""
        size = max(map(len, self.groups), default=1)
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        share = self.bytes * (size - 1) / size * self.times
        return 2 * share if self.kind == "all-reduce" else share


def read_collectives(program: str, chips: int, slices: int = 1) -> list[Collective]:
    """Returns the collectives of an optimised program, with how often a step runs each.

    Args:
      program: `jax.stages.Compiled.as_text()`.
      chips: of a slice.
      slices: how many there are.
    """
    computations, entry = _computations(program)
    times = _times(computations, entry)
    found, chains = [], set()
    for computation, lines in computations.items():
        for name, shape, operation, line in lines if times[computation] else ():
            kind = _kind(operation, line, computation)
            if kind not in KINDS:
                continue
            if chain := re.search(r'channel_id=(\d+),.*chain_id="(\d+)"', line):
                if chain.groups() in chains:
                    continue
                chains.add(chain.groups())
            dcn = operation == "send"
            groups = (tuple(range(slices)),) if dcn else _groups(line, chips)
            size = _bytes(shape, operation, max(map(len, groups), default=1))
            shapes = tuple(_shapes(shape))
            found.append(Collective(name, kind, shapes, size, groups, times[computation], dcn))
    return found


def traffic(collectives: Sequence[Collective]) -> dict[str, dict[str, float]]:
    """Sums by kind: `count` per step, bytes that a chip sends within its slice (`ici`) and beyond (`dcn`)."""
    table: dict[str, dict[str, float]] = {kind: {"count": 0, "ici": 0.0, "dcn": 0.0} for kind in KINDS}
    for collective in collectives:
        row = table[collective.kind]
        row["count"] += collective.times
        row["dcn" if collective.dcn else "ici"] += collective.sent
    return table


def _kind(operation: str, line: str, computation: str) -> str:
    """One of `KINDS`, if it is one."""
    if operation == "send":
        sent = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
        return sent[1].lower().replace("_", "-") if sent else ""
    kind = operation.removesuffix("-start")
    # The compiler's fusion of a sum over chips with each chip's part of it.
    return "reduce-scatter" if kind == "all-reduce" and "all-reduce-scatter" in computation else kind


def _computations(program: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """Computation -> (name, type, operation, line) of its instructions; and the entry's name."""
    computations, entry, current = {}, "", []
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append((*instruction.groups(), line))
    return computations, entry


def _times(computations, entry: str) -> Mapping[str, int]:
    """Counts how often each computation runs: over all its callers, times the turns of loops."""
    calls = collections.defaultdict(list)  # computation -> (caller, turns)
    for caller, lines in computations.items():
        for _, _, kind, line in lines:
            turns = _trip_count(line, computations) if kind == "while" else 1
            for called in _called(line):
                calls[called].append((caller, turns))
    times: dict[str, int] = {entry: 1}

    def count(computation):
        if computation not in times:
            times[computation] = 0  # no computation calls itself
            times[computation] = sum(count(caller) * turns for caller, turns in calls[computation])
        return times[computation]

    return {computation: count(computation) for computation in computations}


def _called(line: str) -> Iterator[str]:
    yield from (match[1] for match in _CALLED.finditer(line))
    for names in _CALLED_LISTS.finditer(line):
        yield from re.findall(r"[\w.\-]+", names[1])


def _trip_count(line: str, computations) -> int:
    """Turns of a `while`: what the compiler says, or those of an index from 0 to a constant; else 1.

    condition   ROOT compare(index = element k of the state, bound), direction=LT
    body        ROOT tuple(...), whose element k is add(index, step)
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition, body = (
        {name: (operation, text) for name, _, operation, text in computations.get(called[1], ())}
        if (called := re.search(rf"{part}=%?([\w.\-]+)", line))
        else {}
        for part in ("condition", "body")
    )
    compared = next((text for kind, text in condition.values() if kind == "compare"), "")
    bound = max((_constant(name, condition) for name in _operands(compared)), default=0)
    element = next((re.search(r"index=(\d+)", condition[name][1]) for name in _operands(compared)
                    if condition.get(name, ("",))[0] == "get-tuple-element"), None)  # fmt: skip
    state = next((text for kind, text in body.values() if kind == "tuple" and "ROOT" in text), "")
    next_index = _operands(state)[int(element[1])] if element and state else ""
    kind, text = body.get(next_index, ("", ""))
    step = max((_constant(name, body) for name in _operands(text)), default=0) if kind == "add" else 1
    return max(1, -(-bound // max(1, step)))


def _operands(line: str) -> list[str]:
    """Returns the names that an instruction is given."""
    inside = re.search(r" [a-z][a-z0-9\-]*\(([^()]*(?:\([^()]*\)[^()]*)*)\)", line)
    return re.findall(r"%([\w.\-]+)", inside[1]) if inside else []


def _constant(name: str, lines) -> int:
    """Returns a whole number that is a constant of a computation; 0 for anything else."""
    value = re.search(r" = [su]\d+\[\]\S* constant\((\d+)\)", lines.get(name, ("", ""))[1])
    return int(value[1]) if value else 0


def _shapes(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _SHAPE.findall(shape)
    ]


def _bytes(shape: str, kind: str, group: int) -> int:
    """Bytes of the whole arrays; a start's result holds what it takes as well, and places for progress."""
    shapes = _shapes(shape)
    if kind.endswith("-start") or kind == "send":
        shapes = [(dtype, sizes) for dtype, sizes in shapes if sizes or dtype != "u32"]
    total = sum(math.prod(sizes) * _bits(dtype) for dtype, sizes in shapes) / 8
    if kind == "all-gather-start":
        total *= group / (group + 1)
    elif kind == "collective-permute-start":
        total /= 2
    elif kind == "reduce-scatter":
        total *= group
    elif kind == "reduce-scatter-start":
        total *= group / (group + 1)
    return round(total)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return _BITS[dtype] if dtype in _BITS else int(digits[0]) if digits else 8


def _groups(line: str, chips: int) -> tuple[tuple[int, ...], ...]:
    """Returns the groups of chips, in whichever of its notations the compiler wrote them."""
    everyone = (tuple(range(chips)),)
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return _lists(pairs[1])
    if lists := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return _lists(lists[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        to, source, order = (tuple(map(int, text.split(","))) if text else None for text in iota.groups())
        ids = np.arange(math.prod(source or ())).reshape(source)
        return _rows((ids if order is None else ids.transpose(order)).reshape(to))
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", line):
        return _mesh_groups(mesh[1], mesh[2])
    return everyone


def _lists(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, row.split(","))) for row in re.findall(r"\{([\d,]+)", text))


def _rows(array) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, row)) for row in array)


def _mesh_groups(mesh: str, axes: str) -> tuple[tuple[int, ...], ...]:
    """Groups along axes of a mesh, or along a part of one: 'a':(2)4 is the middle of a = 2 x 4 x rest."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(mesh)}
    shape, taken = [], []
    wanted = {name: (before, size) for name, before, size in _PART_OF_AXIS.findall(axes)}
    for name, size in sizes.items():
        before, part = wanted.get(name, ("", ""))
        parts = [int(before), int(part), size // (int(before) * int(part))] if part else [size]
        if name in wanted:
            taken.append(len(shape) + (1 if part else 0))
        shape += parts
    order = [axis for axis in range(len(shape)) if axis not in taken] + taken
    group = math.prod(shape[axis] for axis in taken)
    ids = np.arange(math.prod(sizes.values())).reshape(shape).transpose(order)
    return _rows(ids.reshape(-1, group))
