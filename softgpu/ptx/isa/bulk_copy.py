# SPDX-License-Identifier: Apache-2.0
"""cp.async.bulk: copies of whole blocks of bytes between global and shared memory.

Into shared memory they complete bytes on an mbarrier, and land when a thread waits for its phase;
out of shared memory they form groups: the source stays in use until wait_group.read, and global
memory changes at wait_group, or at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..clocks import ASYNC
from ..errors import Fault, PtxError
from ..immediates import immediate_bits
from .mbarrier import Mbarriers
from .registry import instruction


@dataclass
class PendingStore:
    """One copy out of shared memory, of one thread."""

    thread: int
    group: int
    pieces: np.ndarray
    write: object  # performs the global write
    reading: bool = True


class BulkGroups:
    def __init__(self, batch):
        self.batch = batch
        self.groups = np.zeros(batch.size, np.int64)
        self.pending: list[PendingStore] = []
        batch.at_exit.append(self.exit)

    @classmethod
    def of(cls, batch) -> BulkGroups:
        if "bulk" not in batch.devices:
            batch.devices["bulk"] = cls(batch)
        return batch.devices["bulk"]

    def wait(self, thread: int, keep: int, only_read: bool) -> None:
        for store in self.pending:
            if store.thread == thread and store.group < self.groups[thread] - keep:
                self._release(store)
                if not only_read:
                    store.write()
                    store.write = None
        self.pending = [s for s in self.pending if s.write]

    def _release(self, store: PendingStore) -> None:
        if store.reading:
            shared = self.batch.shared
            shared.reading[store.pieces] -= 1
            shared.record_read(store.pieces[:, None], np.full(len(store.pieces), store.thread))
            store.reading = False

    def exit(self, threads) -> None:
        """Shared memory goes away with the block: what still reads it is a fault."""
        mine = set(threads.tolist())
        for store in self.pending:
            if store.thread in mine:
                if store.reading:
                    raise Fault(
                        "exit while a bulk copy still reads shared memory: "
                        "cp.async.bulk.wait_group.read is missing",
                        store.thread,
                    )
                store.write()
                store.write = None
        self.pending = [s for s in self.pending if s.write]


class Landing:
    """A copy into shared memory, from its issue on."""

    def __init__(self, batch, barrier, thread: int, at: np.ndarray, data: np.ndarray, source):
        """at: byte positions of 16-byte pieces; data: [n, 16] bytes; source: what is read, as
        (addresses, bytes at each)."""
        self.batch, self.barrier, self.at, self.data = batch, barrier, at, data
        owner = np.full(len(at), thread)
        shared = batch.shared
        self.pieces = shared.check_write(at, owner, 16, "bulk copy", ASYNC)
        shared.landing[self.pieces] += 1
        self.owner, self.source = owner, source
        barrier.copies.append(self.land)
        batch.globals.aliases.readers.append(self)

    def sources(self) -> list[tuple]:
        return [self.source]

    def land(self) -> None:
        shared = self.batch.shared
        shared.bytes.reshape(-1, 16)[self.at // 16] = self.data
        shared.mark_written(self.at, 16)
        shared.landing[self.pieces] -= 1
        shared.record_write(self.pieces, self.owner, *self.barrier.agent_wrote())
        self.barrier.bytes -= self.data.size
        self.batch.globals.aliases.readers.remove(self)


def without_policy(ins) -> list:
    """Without a cache policy at the end."""
    return list(ins.operands[:-1] if "L2::cache_hint" in ins.modifiers else ins.operands)


@instruction(
    "cp.async.bulk.shared",
    "cp.async.bulk.shared::cluster",
    "cp.async.bulk.shared::cta",
    kind="bulk copy",
    writes=(),
)
def load(batch, ins):
    """[shared], [global], bytes, [mbarrier]."""
    if "global" not in ins.modifiers:
        raise PtxError(f"unsupported form {ins.opcode}", ins.line)
    operands = without_policy(ins)
    target = batch.shared_address(operands[0], ["shared"], ins.line)
    _, source = batch.address(operands[1], ins.line)
    size = batch.read(operands[2], "u32", ins.line)
    barrier = batch.shared_address(operands[3], ["shared"], ins.line)
    barriers = Mbarriers.of(batch)

    def run(m):
        rows = zip(batch.indices(m), target(m), source(m), barrier(m), strict=True)
        for thread, to, start, object_ in rows:
            thread, count = int(thread), int(size[thread])
            if count % 16:
                raise Fault(f"a bulk copy of {count} bytes: a multiple of 16 is needed", thread)
            steps = np.arange(0, count, 16)
            owner = np.full(len(steps), thread)
            data = batch.globals.load(start + steps, owner, 8, 2, "bulk copy")
            at = batch.shared.locate(to + steps, owner, 16, "bulk copy")
            data, object_ = data.view(np.uint8), barriers.find(int(object_), thread)
            Landing(batch, object_, thread, at, data, (start + steps, 16))

    return run


@instruction("cp.async.bulk.global", kind="bulk copy", writes=())
def store(batch, ins):
    """[global], [shared], bytes."""
    operands = without_policy(ins)
    _, target = batch.address(operands[0], ins.line)
    source = batch.shared_address(operands[1], ["shared"], ins.line)
    size = batch.read(operands[2], "u32", ins.line)
    groups, shared = BulkGroups.of(batch), batch.shared

    def run(m):
        for thread, to, start in zip(batch.indices(m), target(m), source(m), strict=True):
            thread, count = int(thread), int(size[thread])
            if count % 16:
                raise Fault(f"a bulk copy of {count} bytes: a multiple of 16 is needed", thread)
            steps = np.arange(0, count, 16)
            owner = np.full(len(steps), thread)
            at = shared.locate(start + steps, owner, 16, "bulk copy")
            pieces = shared.check_read(at, owner, 16, "bulk copy", ASYNC, record=False).ravel()
            shared.reading[pieces] += 1
            data = shared.view(8, 2)[at // 16].copy()

            def write(where=to + steps, owner=owner, data=data):
                batch.globals.store(where, owner, data, "bulk copy")

            groups.pending.append(PendingStore(thread, int(groups.groups[thread]), pieces, write))

    return run


@instruction("cp.async.bulk.commit_group", kind="bulk copy", writes=())
def commit(batch, ins):
    groups = BulkGroups.of(batch)

    def run(m):
        groups.groups[batch.indices(m)] += 1

    return run


@instruction("cp.async.bulk.wait_group", kind="bulk copy", writes=())
def wait(batch, ins):
    keep = immediate_bits(ins.operands[0].text, "b32")
    groups, only_read = BulkGroups.of(batch), "read" in ins.modifiers

    def run(m):
        mine = set(batch.indices(m).tolist())
        for thread in sorted({s.thread for s in groups.pending} & mine):
            groups.wait(thread, keep, only_read)

    return run


@instruction("cp.async.bulk.prefetch", kind="bulk copy", writes=())
def prefetch(batch, ins):
    return lambda m: None
