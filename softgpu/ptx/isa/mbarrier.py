# SPDX-License-Identifier: Apache-2.0
"""mbarrier objects: phases completed by arrivals and by the bytes of asynchronous copies.

A wait that fails may return false at once, and does so the first time; the same wait again sleeps
until the phase completes. Copies that complete bytes on an
mbarrier land only when nothing else in the batch can run.
"""

from __future__ import annotations

import numpy as np

from ..batch import AT_MBARRIER, RUNNING
from ..errors import Fault, PtxError
from ..syntax import Address, Sink
from .async_copy import AsyncCopies
from .registry import SPLIT, at, instruction, put


class Mbarrier:
    """One object in shared memory, known by (block, address)."""

    def __init__(self, batch, key, count: int, thread: int, agent: int):
        self.batch, self.key, self.expected = batch, key, count
        self.pending, self.bytes, self.phase = count, 0, 0
        self.creator = (thread >> 5, int(batch.clocks.now[thread >> 5]))
        self.slot, self.time = batch.clocks.agent(agent), 0
        self.gathered = np.zeros((2, batch.clocks.slots), np.int32)  # knowledge of this phase
        self.done = self.gathered  # knowledge of the last complete phase
        self.copies: list = []  # land() of copies that will complete bytes or arrive here
        self.async_arrivals = 0  # of them, how many arrive

    @property
    def ticket(self) -> int:
        """Tells the phases of all objects of a block apart."""
        return (self.phase + 1) << 16 | self.slot

    def visible_to(self, threads) -> None:
        """A use of an mbarrier must be ordered after its initialization."""
        warp, time = self.creator
        known = self.batch.clocks.known[threads >> 5, 0, warp % self.batch.warps]
        if (known < time).any():
            raise Fault(
                "race: an mbarrier used before a barrier that follows its initialization",
                int(threads[np.flatnonzero(known < time)[0]]),
            )

    def gather(self, knowledge) -> None:
        n = min(knowledge.shape[1], self.gathered.shape[1])
        if knowledge.shape[1] > self.gathered.shape[1]:
            knowledge = knowledge.copy()
            knowledge[:, :n] = np.maximum(knowledge[:, :n], self.gathered)
            self.gathered = knowledge
        else:
            self.gathered[:, :n] = np.maximum(self.gathered[:, :n], knowledge)

    def arrive(self, thread: int, count: int) -> int:
        """Release what the thread's warp knows; returns the phase's token."""
        token = self.phase << 20 | self.pending
        if count > self.pending:
            raise Fault(f"{count} arrivals at an mbarrier that awaits {self.pending}", thread)
        self.gather(self.batch.clocks.release(thread >> 5, self.gathered))
        self.pending -= count
        self.advance()
        return token

    def agent_wrote(self) -> tuple[int, int]:
        """(slot, time) for bytes that a copy lands: a wait for this phase makes them visible."""
        self.time += 1
        known = np.zeros((2, self.slot + 1), np.int32)
        known[:, self.slot] = self.time
        self.gather(known)
        return self.slot, self.time

    def advance(self) -> None:
        if self.pending or self.bytes:
            return
        self.phase += 1
        self.pending = self.expected
        self.done, self.gathered = self.gathered, np.zeros_like(self.gathered)
        batch = self.batch
        batch.progress += 1
        for threads in batch.devices["mbarriers"].sleeping.pop(self.key, []):
            batch.state[threads] = np.where(
                batch.state[threads] == AT_MBARRIER, RUNNING, batch.state[threads]
            )

    def land(self) -> bool:
        """Land what was issued for this phase, if only that is missing."""
        if not self.copies or self.pending > self.async_arrivals:
            return False
        copies, self.copies, self.async_arrivals = self.copies, [], 0
        for land in copies:
            land()
        self.batch.progress += 1
        self.advance()
        return True


class Mbarriers:
    def __init__(self, batch):
        self.batch, self.objects, self.agents = batch, {}, {}
        self.sleeping: dict[tuple[int, int], list] = {}
        self.failed = np.zeros(batch.size, np.int64)  # ticket of each thread's last failed wait
        batch.last_resort.append(self.land)

    @classmethod
    def of(cls, batch) -> Mbarriers:
        if "mbarriers" not in batch.devices:
            batch.devices["mbarriers"] = cls(batch)
        return batch.devices["mbarriers"]

    def land(self) -> bool:
        """Nothing can run: land the copies that sleeping threads wait for."""
        waited = [self.objects[k] for k in self.sleeping if k in self.objects]
        return sum(barrier.land() for barrier in waited) > 0

    def groups(self, addresses, threads):
        """(mbarrier, threads) for every distinct object that the threads name."""
        where = self.batch.shared.locate(addresses, threads, 8, "mbarrier access")
        for one in np.unique(where):
            mine = threads[where == one]
            key = (int(self.batch.block_of[mine[0]]), int(one))
            if key not in self.objects:
                raise Fault("this mbarrier was not initialized", int(mine[0]))
            barrier = self.objects[key]
            barrier.visible_to(mine)
            yield barrier, mine

    def find(self, address: int, thread: int) -> Mbarrier:
        threads = np.array([thread])
        return next(self.groups(np.array([address]), threads))[0]


@instruction("mbarrier.init", kind="mbarrier", writes=())
def init(batch, ins):
    address = batch.shared_address(ins.operands[0], ins.modifiers, ins.line)
    count = batch.read(ins.operands[1], "u32", ins.line)
    barriers = Mbarriers.of(batch)

    def run(m):
        threads = batch.indices(m)
        where = batch.shared.locate(address(m), threads, 8, "mbarrier.init")
        for position, thread in zip(where, threads, strict=True):
            block = int(batch.block_of[thread])
            key = (block, int(position))
            if key in barriers.objects:
                raise Fault("mbarrier.init of an object in use: inval it first", int(thread))
            agent = barriers.agents.setdefault(block, {}).setdefault(
                int(position), len(barriers.agents[block])
            )
            spot, owner = np.array([position]), np.array([thread])
            pieces = batch.shared.check_write(spot, owner, 8, "mbarrier.init")
            batch.shared.record_write(pieces, owner)
            barriers.objects[key] = Mbarrier(batch, key, int(count[thread]), int(thread), agent)

    return run


@instruction("mbarrier.inval", kind="mbarrier", writes=())
def invalidate(batch, ins):
    address = batch.shared_address(ins.operands[0], ins.modifiers, ins.line)
    barriers = Mbarriers.of(batch)

    def run(m):
        for barrier, threads in barriers.groups(address(m), batch.indices(m)):
            if barrier.copies:
                raise Fault("mbarrier.inval while copies are under way", int(threads[0]))
            del barriers.objects[barrier.key]

    return run


@instruction("mbarrier.arrive", "mbarrier.arrive_drop", kind="mbarrier")
def arrive(batch, ins):
    first = 0 if isinstance(ins.operands[0], Address) else 1
    out = None
    if first and not isinstance(ins.operands[0], Sink):
        out = batch.write(ins.operands[0], "b64", ins.line)
    address = batch.shared_address(ins.operands[first], ins.modifiers, ins.line)
    extra = ins.operands[first + 1 :]
    argument = batch.read(extra[0], "u32", ins.line) if extra else np.ones(batch.size, np.uint32)
    barriers, drop = Mbarriers.of(batch), "arrive_drop" in ins.modifiers
    expect = "expect_tx" in ins.modifiers
    if "noComplete" in ins.modifiers:
        raise PtxError(f"{ins.opcode} is not supported", ins.line)

    def run(m):
        for barrier, threads in barriers.groups(address(m), batch.indices(m)):
            for thread in threads:
                count = 1
                if expect:
                    barrier.bytes += int(argument[thread])
                else:
                    count = int(argument[thread])
                if drop:
                    barrier.expected -= count
                token = barrier.arrive(int(thread), count)
                if out is not None:
                    out[thread] = token
        batch.progress += 1

    return run


@instruction("mbarrier.expect_tx", "mbarrier.complete_tx", kind="mbarrier", writes=())
def transaction(batch, ins):
    address = batch.shared_address(ins.operands[0], ins.modifiers, ins.line)
    size = batch.read(ins.operands[1], "u32", ins.line)
    barriers = Mbarriers.of(batch)
    sign = 1 if "expect_tx" in ins.modifiers else -1

    def run(m):
        for barrier, threads in barriers.groups(address(m), batch.indices(m)):
            barrier.bytes += sign * int(size[threads].sum())
            if sign < 0:
                barrier.advance()

    return run


@instruction("mbarrier.test_wait", "mbarrier.try_wait", kind="mbarrier", control=True)
def wait(batch, ins):
    out = batch.write(ins.operands[0], "pred", ins.line)
    address = batch.shared_address(ins.operands[1], ins.modifiers, ins.line)
    parity = "parity" in ins.modifiers
    token = batch.read(ins.operands[2], "u32" if parity else "b64", ins.line)
    barriers, index = Mbarriers.of(batch), batch.building
    sleeps = "try_wait" in ins.modifiers

    def passed(barrier, threads):
        if parity:
            return (barrier.phase & 1) != (token[threads] & 1)
        return barrier.phase > (token[threads].astype(np.int64) >> 20)

    def run(m):
        threads = batch.indices(m)
        asleep = []
        for barrier, mine in barriers.groups(address(m), threads):
            done = passed(barrier, mine)
            if not done.all() and not sleeps and barrier.land():
                done = passed(barrier, mine)
            out[mine] = done
            if done.any():
                rows = np.unique(mine[done] >> 5)
                batch.clocks.acquire(rows, barrier.done)
            late = mine[~done & ~batch.expired[mine]]
            again = barriers.failed[late] == barrier.ticket
            barriers.failed[late] = barrier.ticket
            late = late[again]
            if sleeps and len(late):
                barriers.sleeping.setdefault(barrier.key, []).append(late)
                asleep.append(late)
        batch.expired[threads] = False
        if not asleep:
            return None
        slept = np.concatenate(asleep)
        awake = np.setdiff1d(threads, slept) >> 5
        # A warp that only sleeps here counts when it wakes.
        batch.executor.issued[index] -= len(np.setdiff1d(slept >> 5, awake))
        batch.pc[threads] = index + 1
        for late in asleep:
            batch.pc[late] = index
            batch.state[late] = AT_MBARRIER
        return SPLIT

    return run


@instruction("mbarrier.pending_count", kind="mbarrier")
def pending_count(batch, ins):
    out = batch.write(ins.operands[0], "b32", ins.line)
    token = batch.read(ins.operands[1], "b64", ins.line)
    return lambda m: put(out, m, at(token, m) & np.uint64(0xFFFFF))


@instruction("cp.async.mbarrier.arrive", kind="mbarrier", writes=())
def arrive_when_copied(batch, ins):
    """Arrive when this thread's earlier cp.async are complete; without .noinc also expect it."""
    address = batch.shared_address(ins.operands[0], ins.modifiers, ins.line)
    barriers, copies = Mbarriers.of(batch), AsyncCopies.of(batch)
    increase = "noinc" not in ins.modifiers

    def run(m):
        for barrier, threads in barriers.groups(address(m), batch.indices(m)):
            limit, before = copies.limits(threads, None), copies.serial + 1
            barrier.pending += len(threads) * increase
            barrier.async_arrivals += len(threads)

            def land(barrier=barrier, threads=threads, limit=limit, before=before):
                slot, time = barrier.agent_wrote()
                # These are ordinary writes: the async proxy sees them only behind a fence.
                barrier.gathered[1, slot] = 0
                copies.land(limit, slot, time, before)
                barrier.pending -= len(threads)

            barrier.copies.append(land)

    return run
