# SPDX-License-Identifier: Apache-2.0
"""name -> how to bind an instruction to a batch.

A builder takes (batch, instruction) and returns run(m), which executes the instruction for the
threads m and returns None to go on with the next one, an index to jump to, or SPLIT when it has
itself set the state and counter of every thread in m.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..batch import AT_COLLECTIVE, EXITED, RUNNING
from ..errors import PtxError
from ..syntax import Address, Immediate, Instruction, registers_of

SPLIT = -1


@dataclass(frozen=True)
class Spec:
    build: Callable
    kind: str  # class in the counters
    writes: tuple[int, ...]  # operands that are destinations
    control: bool  # may jump, wait or exit
    together: (
        str  # lanes that must meet at it: "", "warp", "warpgroup", or "mask", the last operand
    )
    own: tuple[int, ...]  # operands whose registers the builder's run(m) checks itself


_specs: dict[str, Spec] = {}


def instruction(*names, kind, writes: tuple[int, ...] = (0,), control=False, together="", own=()):
    """Register a builder for every opcode that begins with one of these dotted names."""

    def register(build):
        for name in names:
            _specs[name] = Spec(build, kind, writes, control, together, own)
        return build

    return register


@functools.cache
def find(opcode: str) -> Spec | None:
    """The spec of the longest registered name that the opcode begins with."""
    parts = opcode.split(".")
    for n in range(len(parts), 0, -1):
        spec = _specs.get(".".join(parts[:n]))
        if spec:
            return spec
    return None


def spec_of(ins: Instruction) -> Spec:
    """Raises PtxError where there is none."""
    if spec := find(ins.opcode):
        return spec
    raise PtxError(f"unknown instruction {ins.opcode}", ins.line)


def reads_and_writes(ins: Instruction):
    """(registers read, registers written); an address is read even where it stands first.

    Without those that the instruction checks itself.
    """
    spec = spec_of(ins)
    reads, writes = [], []
    for i, operand in enumerate(ins.operands):
        if i in spec.own:
            continue
        target = writes if i in spec.writes and not isinstance(operand, Address) else reads
        target.extend(registers_of(operand))
    return reads, writes


def compile_instruction(batch, ins: Instruction, index: int):
    """run(m) with the guard applied."""
    spec = spec_of(ins)
    try:
        run = spec.build(batch, ins)
    except PtxError as error:
        if error.line is None:
            raise PtxError(f"{ins.opcode}: {error.reason}", ins.line) from None
        raise
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise PtxError(f"unsupported form of {ins.opcode} ({error!r})", ins.line) from error
    if spec.together:
        run = gathered(batch, ins, index, spec.together, run)
    if ins.guard is None:
        return run
    guard = batch.predicate(ins.guard, ins.line)

    def guarded(m):
        take = guard(m)
        if take.all():
            return run(m)
        if not take.any():
            return None
        chosen = np.flatnonzero(take) if m is None else m[take]
        if not (spec.control or spec.together):
            return run(chosen)
        batch.pc[batch.indices(m)[~take]] = index + 1
        target = run(chosen)
        if target != SPLIT:
            batch.pc[chosen] = index + 1 if target is None else target
        return SPLIT

    return guarded


def only(ins: Instruction, known: set[str]) -> None:
    """Refuse modifiers that the builder does not know: nothing is ignored silently."""
    for modifier in ins.modifiers:
        if modifier not in known:
            raise PtxError(f"unknown modifier .{modifier} of {ins.opcode}", ins.line)


def put(row, m, values) -> None:
    if m is None:
        row[...] = values
    else:
        row[m] = values


def at(row, m):
    return row if m is None else row[m]


def gathered(batch, ins, index: int, together: str, run):
    """run(m) once the lanes that must execute together are all there; the early ones wait.

    Lanes of a warp may come apart, as where one alone waits for an mbarrier; the hardware lets
    the others wait for it at the next collective, until it comes or exits. Who does neither makes
    a deadlock.
    """
    unit = 128 if together == "warpgroup" else 32
    number, members = _units(batch, unit)
    mask = batch.read(ins.operands[-1], "b32", ins.line) if together == "mask" else None
    one_mask = mask is None or isinstance(ins.operands[-1], Immediate)
    waiting = np.zeros(batch.size, bool)

    def whole(m) -> bool:
        if m is not None and (batch.threads % unit or len(m) % unit or not _whole(m, unit)):
            return False
        if one_mask:
            return True
        masks = at(mask, m).reshape(-1, 32)
        return bool((masks == masks[:, :1]).all())

    def gather(m):
        if whole(m):
            return run(m)
        m = batch.indices(m)
        here = waiting.copy()
        here[m] = True
        rows = members[np.unique(number[m])]
        complete = _complete(batch, here, rows, mask)
        ready = np.unique(rows[complete])
        ready = ready[here[ready]]
        late = np.setdiff1d(m, ready)
        resumed = ready[waiting[ready]]
        if not len(late) and not len(resumed):
            return run(m)
        waiting[late], waiting[ready] = True, False
        # A warp counts when it executes, not when some of its lanes arrive.
        batch.executor.issued[index] -= len(np.unique(late >> 5))
        batch.pc[late], batch.state[late] = index, AT_COLLECTIVE
        batch.state[resumed] = RUNNING
        if len(ready):
            target = run(ready)
            if target != SPLIT:
                batch.pc[ready] = index + 1 if target is None else target
        return SPLIT

    return gather


def _complete(batch, here, rows, mask):
    """Which lanes of these units need not wait: [units] without a mask, otherwise [units, 32].

    A lane waits for those of its mask that have not exited, and that come with the same mask. One
    that its own mask leaves out does not wait: the instruction objects.
    """
    gone = batch.state[rows] == EXITED
    if mask is None:
        return (here[rows] | gone).all(axis=1)
    named = mask[rows][:, :, None]
    same = here[rows][:, None, :] & (named == mask[rows][:, None, :])
    member = (named >> np.arange(32, dtype=np.uint32)) & 1 != 0
    return (same | gone[:, None, :] | ~member).all(axis=2) | ~member.diagonal(axis1=1, axis2=2)


def _units(batch, unit: int):
    """(number of each thread's unit, threads of each unit); units do not cross blocks.

    A last unit that the block does not fill repeats its first thread: the instruction objects.
    """
    first = np.arange(0, batch.threads, unit)
    starts = (np.arange(batch.count)[:, None] * batch.threads + first).ravel()
    inside = (first[:, None] + np.arange(unit)) < batch.threads
    members = starts[:, None] + np.where(np.tile(inside, (batch.count, 1)), np.arange(unit), 0)
    number = batch.block_of * len(first) + batch.all % batch.threads // unit
    return number, members


def _whole(m, unit: int) -> bool:
    rows = m.reshape(-1, unit)
    return bool(((rows[:, 0] % unit == 0) & (rows[:, -1] - rows[:, 0] == unit - 1)).all())
