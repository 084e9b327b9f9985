# SPDX-License-Identifier: Apache-2.0
"""What the parser produces: operands, instructions, variables, functions."""

from __future__ import annotations

from dataclasses import dataclass, field

SIZES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64, 128)},
    "f16": 2,
    "f32": 4,
    "f64": 8,
    "bf16": 2,
    "tf32": 4,
    "pred": 1,
    "f16x2": 4,
    "bf16x2": 4,
    "u16x2": 4,
    "s16x2": 4,
}  # bytes of every scalar type


@dataclass(frozen=True)
class Register:
    name: str
    type: str  # as declared
    slot: int  # row in the file of its size

    @property
    def size(self) -> int:
        """Bytes; predicates have their own file."""
        return SIZES[self.type]

    @property
    def key(self) -> tuple[int | str, int]:
        return ("pred" if self.type == "pred" else self.size, self.slot)


@dataclass(frozen=True)
class Immediate:
    text: str  # read by the type of the instruction


@dataclass(frozen=True)
class Special:
    name: str  # %tid.x


@dataclass(frozen=True)
class Symbol:
    name: str  # variable, label or function


@dataclass(frozen=True)
class Sink:
    """The operand `_`."""


@dataclass(frozen=True)
class Not:
    operand: Register  # !%p


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Pair:
    first: object  # %r1|%p1
    second: object


@dataclass(frozen=True)
class Address:
    base: object  # Register, Symbol, Immediate
    offset: int = 0
    coordinates: tuple = ()  # of a tensor copy: [map, {c0, c1}]


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple
    line: int
    guard: Register | Not | None = None

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]


@dataclass
class Variable:
    name: str
    space: str  # global, const, shared, local, param
    align: int
    size: int  # bytes; 0 for an extern array
    type: str = "b8"
    initial: bytes | None = None
    extern: bool = False


@dataclass
class Function:
    name: str
    entry: bool
    line: int
    params: list[Variable] = field(default_factory=list)
    results: list[Variable] = field(default_factory=list)
    directives: dict[str, str] = field(default_factory=dict)
    body: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # resolved name -> index into body
    variables: dict[str, Variable] = field(default_factory=dict)
    registers: dict[int | str, int] = field(default_factory=dict)  # file -> rows
    defined: bool = True


def registers_of(operand) -> list[Register]:
    """Every register that an operand names."""
    if isinstance(operand, Register):
        return [operand]
    if isinstance(operand, Not):
        return [operand.operand]
    if isinstance(operand, Vector):
        return [r for item in operand.items for r in registers_of(item)]
    if isinstance(operand, Pair):
        return registers_of(operand.first) + registers_of(operand.second)
    if isinstance(operand, Address):
        rest = [r for item in operand.coordinates for r in registers_of(item)]
        return registers_of(operand.base) + rest
    return []
