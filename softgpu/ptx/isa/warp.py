# SPDX-License-Identifier: Apache-2.0
"""Exchange within a warp: shfl, vote, match, redux, activemask, elect.

Every lane that the member mask names must execute the same instruction together, with the same
mask, unless it has exited; lanes of a warp with different masks are groups for themselves.
"""

from __future__ import annotations

import numpy as np

from ..batch import EXITED
from ..errors import Fault
from ..syntax import Pair, Sink, registers_of
from .registry import at, instruction, put


def members(batch, m, mask, what: str):
    """(thread indices, which of them take part), both [groups, 32].

    A group is the executing lanes of one warp that name the same member mask. A fault where a lane
    is not in its own mask, or a lane of the mask neither executes with that mask nor has exited.
    """
    threads, lanes = batch.indices(m), np.arange(32)
    named = at(mask, m).astype(np.int64)
    out = (named >> (threads & 31)) & 1 == 0
    if out.any():
        raise Fault(f"{what} by a lane that its own member mask leaves out", int(threads[out][0]))
    groups, number = np.unique((threads >> 5) << 32 | named, return_inverse=True)
    rows = (groups >> 32)[:, None] * 32 + lanes
    active = np.zeros(rows.shape, bool)
    active[number, threads & 31] = True
    missing = ((groups[:, None] >> lanes) & 1 != 0) & ~active & (batch.state[rows] != EXITED)
    if missing.any():
        group, lane = np.argwhere(missing)[0]
        raise Fault(
            f"{what} by a partial warp: lane {lane} of the member mask is elsewhere",
            int(rows[group][active[group]][0]),
        )
    return rows, active


@instruction("shfl.sync", kind="shuffle", together="mask", own=(1,))
def shuffle(batch, ins):
    """Only the lanes that are read need have a value, as where a leader alone has the result."""
    mode = ins.modifiers[1]
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, Sink())
    out, p = batch.write(first, "b32", ins.line), batch.write(second, "pred", ins.line)
    a = batch.read(ins.operands[1], "b32", ins.line)
    b, c, mask = (batch.read(o, "b32", ins.line) for o in ins.operands[2:5])
    source = [batch.register_index(r) for r in registers_of(ins.operands[1])]
    lane, index = np.arange(32), batch.building

    def run(m):
        rows, active = members(batch, m, mask, ins.opcode)
        bval = (b[rows] & 31).astype(np.int64)
        clamp = (c[rows] & 31).astype(np.int64)
        segment = ((c[rows] >> 8) & 31).astype(np.int64)
        highest = (lane & segment) | (clamp & ~segment & 31)
        lowest = lane & segment
        if mode == "up":
            j = lane - bval
            inside = j >= highest  # for .up the bound is the segment's lowest lane
        elif mode == "down":
            j = lane + bval
            inside = j <= highest
        elif mode == "bfly":
            j = lane ^ bval
            inside = j <= highest
        else:
            j = lowest | (bval & ~segment & 31)
            inside = j <= highest
        j = np.where(inside, j, lane)
        source_active = np.take_along_axis(active, j & 31, axis=1)
        if (active & inside & ~source_active).any():
            bad = rows[active & inside & ~source_active][0]
            raise Fault(f"{ins.opcode} reads a lane that takes no part", int(bad))
        values = np.take_along_axis(a[rows], j & 31, axis=1)
        threads = rows[active]
        sources = np.take_along_axis(rows, j & 31, axis=1)[active]
        for register in source:
            if not batch.full[register]:
                batch.executor.readable(register, index, sources)
        out[threads] = values[active]
        p[threads] = inside[active]

    return run


@instruction("vote.sync", kind="vote", together="mask")
def vote(batch, ins):
    mode = ins.modifiers[1]
    out = batch.write(ins.operands[0], "b32" if mode == "ballot" else "pred", ins.line)
    test = batch.predicate(ins.operands[1], ins.line)
    mask = batch.read(ins.operands[2], "b32", ins.line)

    def run(m):
        rows, active = members(batch, m, mask, ins.opcode)
        truth = test(None)[rows] & active
        if mode == "ballot":
            weights = np.uint64(1) << np.arange(32, dtype=np.uint64)
            result = (truth * weights).sum(axis=1).astype(np.uint32)
        elif mode == "all":
            result = (truth | ~active).all(axis=1)
        elif mode == "any":
            result = truth.any(axis=1)
        else:  # uni
            result = (truth | ~active).all(axis=1) | ~truth.any(axis=1)
        out[rows[active]] = np.broadcast_to(result[:, None], active.shape)[active]

    return run


@instruction("match", kind="vote", together="mask")
def match(batch, ins):
    kind, everyone = ins.modifiers[-1], ins.modifiers[0] == "all"
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, Sink())
    out, p = batch.write(first, "b32", ins.line), batch.write(second, "pred", ins.line)
    a = batch.read(ins.operands[1], kind, ins.line)
    mask = batch.read(ins.operands[2], "b32", ins.line)
    weights = np.uint64(1) << np.arange(32, dtype=np.uint64)

    def run(m):
        rows, active = members(batch, m, mask, ins.opcode)
        same = (a[rows][:, :, None] == a[rows][:, None, :]) & active[:, None, :]
        result = (same * weights).sum(axis=2).astype(np.uint32)
        if everyone:
            agree = (same | ~active[:, None, :]).all(axis=2)
            result = np.where(agree, result, 0)
            p[rows[active]] = agree[active]
        out[rows[active]] = result[active]

    return run


_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction("redux.sync", kind="shuffle", together="mask")
def reduce_warp(batch, ins):
    function, kind = _REDUCTIONS[ins.modifiers[1]], ins.modifiers[-1]
    out, a = (
        batch.write(ins.operands[0], kind, ins.line),
        batch.read(ins.operands[1], kind, ins.line),
    )
    mask = batch.read(ins.operands[2], "b32", ins.line)

    def run(m):
        rows, active = members(batch, m, mask, ins.opcode)
        for row, lanes in zip(rows, active, strict=True):
            out[row[lanes]] = function.reduce(a[row[lanes]])

    return run


@instruction("activemask", kind="vote")
def active_mask(batch, ins):
    out = batch.write(ins.operands[0], "b32")

    def run(m):
        threads = batch.indices(m)
        masks = np.zeros(batch.size // 32, np.uint64)
        np.bitwise_or.at(masks, threads >> 5, np.uint64(1) << (threads & 31).astype(np.uint64))
        put(out, m, masks[threads >> 5].astype(np.uint32))

    return run


@instruction("elect.sync", kind="vote", together="mask")
def elect(batch, ins):
    """The lowest lane that executes is the leader of those that name its member mask."""
    target = ins.operands[0]
    out, p = batch.write(target.first, "b32"), batch.write(target.second, "pred")
    mask = batch.read(ins.operands[1], "b32", ins.line)

    def run(m):
        rows, active = members(batch, m, mask, ins.opcode)
        leader = active.argmax(axis=1)
        threads = rows[active]
        out[threads] = np.broadcast_to(leader[:, None], active.shape)[active]
        p[threads] = (np.arange(32) == leader[:, None])[active]

    return run
