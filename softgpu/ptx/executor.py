# SPDX-License-Identifier: Apache-2.0
"""Runs a bound kernel: every thread has a counter, the lowest runs first.

Threads that share a counter run as one group until it reaches the counter of another runnable
thread (so structured code reconverges by itself), splits, or waits. A group that runs long while
others could run yields to them, so that a spinning thread cannot starve the one it waits for.
"""

from __future__ import annotations

import numpy as np

from .batch import (
    AT_BARRIER,
    AT_COLLECTIVE,
    AT_MBARRIER,
    BEING_READ,
    EXITED,
    IN_FLIGHT,
    NEVER_WRITTEN,
    RUNNING,
    WRITTEN,
    Batch,
)
from .errors import Fault, PtxError
from .isa import compile_instruction
from .isa.registry import SPLIT, reads_and_writes
from .parser import resolve_labels
from .syntax import registers_of

PATIENCE = 20_000  # instructions of one group before others get their turn
END = 1 << 40


class Executor:
    def __init__(self, batch: Batch, max_steps: int):
        self.batch, self.max_steps = batch, max_steps
        self.body = batch.function.body
        batch.labels = resolve_labels(batch.function)
        batch.executor = self
        self.ok = bytearray(len(self.body))  # every register of the instruction is written
        self.issued = [0] * len(self.body)  # warps
        self.touching: dict[int, list[int]] = {}  # register -> instructions
        self.uses = [self._use(i, ins) for i, ins in enumerate(self.body)]
        self.code = []
        for i, ins in enumerate(self.body):
            batch.building = i
            self.code.append(compile_instruction(batch, ins, i))
        for step in batch.after_build:
            step(self)
        self.steps = 0
        self.at = 0
        self._seen = -1

    def _use(self, index: int, ins):
        reads, writes = reads_and_writes(ins)
        number = self.batch.register_index
        guard = [number(r) for r in registers_of(ins.guard)]
        reads = [number(r) for r in reads]
        writes = [number(r) for r in writes]
        for register in {number(r) for o in (*ins.operands, ins.guard) for r in registers_of(o)}:
            self.touching.setdefault(register, []).append(index)
        return guard, reads, writes

    def watch(self, indices: list[int], callback) -> None:
        """Call callback(m) after each of these instructions."""
        for i in indices:
            inner = self.code[i]

            def outer(m, inner=inner):
                result = inner(m)
                callback(m)
                return result

            self.code[i] = outer

    # --- run ----------------------------------------------------------------------------------

    def run(self, instructions: int) -> bool:
        """Run to the end and return True, or for about this many instructions and return False."""
        try:
            with np.errstate(all="ignore"):
                return self._schedule(self.steps + instructions)
        except Fault as fault:
            raise self._located(fault) from None

    def _located(self, fault: Fault) -> PtxError:
        batch, block, thread = self.batch, None, None
        if fault.thread is not None:
            b, t = divmod(fault.thread, batch.threads)
            x, y, _ = batch.block
            block = tuple(int(i) for i in batch.block_index[b])
            thread = (t % x, t // x % y, t // (x * y))
        ins = self.body[min(self.at, len(self.body) - 1)]
        message = f"{ins.opcode}: {fault.message}"
        return PtxError(message, ins.line, batch.function.name, block, thread)

    def _schedule(self, until: int) -> bool:
        batch = self.batch
        turn = 0
        while self.steps < until:
            runnable = np.flatnonzero(batch.state == RUNNING)
            if not len(runnable):
                if (batch.state == EXITED).all():
                    return True
                self._unblock()
                continue
            counters = batch.pc[runnable]
            low = int(counters.min())
            chosen = counters == low
            if not chosen.all():
                if turn % 2:  # the last group ran out of patience: the others' lowest goes next
                    low = int(counters[~chosen].min())
                    chosen = counters == low
                higher = counters[counters > low]
                limit = int(higher.min()) if len(higher) else END
            else:
                limit = END
            m = None if len(runnable) == batch.size and chosen.all() else runnable[chosen]
            turn = turn + 1 if self._group(low, m, limit) else 0
        return False

    def _group(self, pc: int, m, limit: int) -> bool:
        """Run one group; True when it was stopped for running long."""
        batch, code, ok, issued = self.batch, self.code, self.ok, self.issued
        warps = batch.size // 32 if m is None else len(np.unique(m >> 5))
        steps = 0
        while pc < limit:
            self.at = pc
            if not ok[pc]:
                self._check(pc, m)
            issued[pc] += warps
            target = code[pc](m)
            steps += 1
            if target is None:
                pc += 1
            elif target == SPLIT:
                self._charge(steps)
                return False
            else:
                pc = target
                if steps > PATIENCE:
                    self._charge(steps)
                    batch.pc[batch.indices(m)] = pc
                    return True
        self._charge(steps)
        batch.pc[batch.indices(m)] = pc
        return False

    def _charge(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.max_steps:
            raise Fault(f"no end after {self.steps} instructions (max_steps)")

    def _check(self, pc: int, m) -> None:
        """Every register read must have been written; mark those that this instruction writes."""
        batch = self.batch
        valid, full = batch.valid, batch.full
        guard, reads, writes = self.uses[pc]
        threads = batch.indices(m)
        complete = True
        if guard:
            complete &= self.readable(guard[0], pc, threads)
            take = batch.predicate(self.body[pc].guard)(m)
            threads = threads[take]
        for register in reads:
            if not full[register]:
                complete &= self.readable(register, pc, threads)
        for register in writes:
            if not full[register]:
                row = valid[register]
                if (row[threads] >= IN_FLIGHT).any():
                    self._in_flight(register, pc, threads)
                row[threads] = WRITTEN
                if (row == WRITTEN).all():
                    full[register] = 1
                else:
                    complete = False
        self.ok[pc] = complete

    def readable(self, register: int, pc: int, threads) -> bool:
        """Whether every thread of the batch has the value; a fault unless `threads` have it."""
        row = self.batch.valid[register]
        state = row[threads]
        if ((state == WRITTEN) | (state == BEING_READ)).all():
            if (row == WRITTEN).all():
                self.batch.full[register] = 1
                return True
            return False
        if (state == IN_FLIGHT).any():
            self._in_flight(register, pc, threads)
        thread = int(threads[np.flatnonzero(state == NEVER_WRITTEN)[0]])
        raise Fault(f"register {self._name(register, pc)} is read but nothing wrote it", thread)

    def _in_flight(self, register: int, pc: int, threads):
        state = self.batch.valid[register][threads]
        thread = int(threads[np.flatnonzero(state >= IN_FLIGHT)[0]])
        name = self._name(register, pc)
        raise Fault(f"register {name} belongs to a wgmma that was not waited for", thread)

    def _name(self, register: int, pc: int) -> str:
        ins = self.body[pc]
        operands = [*ins.operands, *([ins.guard] if ins.guard else [])]
        names = [r for o in operands for r in registers_of(o)]
        return next(r.name for r in names if self.batch.register_index(r) == register)

    # --- waiting ------------------------------------------------------------------------------

    def _unblock(self) -> None:
        """Nothing can run: asynchronous work lands now, or waits time out, or it is a deadlock."""
        batch = self.batch
        if sum(step() for step in batch.last_resort):
            return
        waiting = batch.state == AT_MBARRIER
        if waiting.any() and batch.progress != self._seen:
            self._seen = batch.progress
            batch.expired[waiting] = True
            batch.state[waiting] = RUNNING
            return
        self._deadlock()

    def _deadlock(self) -> None:
        batch = self.batch
        partial = np.flatnonzero(batch.state == AT_COLLECTIVE)
        if len(partial):
            thread = int(partial[0])
            self.at = int(batch.pc[thread])
            mates = partial[(partial // 32 == thread // 32) & (batch.pc[partial] == self.at)]
            raise Fault(
                f"by a partial warp: {len(mates)} lanes wait for others that do not come",
                thread,
            )
        stuck = np.flatnonzero((batch.state == AT_BARRIER) | (batch.state == AT_MBARRIER))
        thread = int(stuck[0])
        self.at = int(batch.pc[thread])
        mates = batch.state[batch.block_of == batch.block_of[thread]][: batch.real_threads]
        counts = [int((mates == s).sum()) for s in (AT_BARRIER, AT_MBARRIER, EXITED)]
        raise Fault(
            "deadlock: of the block's threads {} wait at a barrier that the others do not reach, "
            "{} wait for an mbarrier phase that does not complete, {} have exited".format(*counts),
            thread,
        )
