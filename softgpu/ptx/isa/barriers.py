# SPDX-License-Identifier: Apache-2.0
"""Block barriers (named, counted, reducing), warp and cluster barriers, fences."""

from __future__ import annotations

import numpy as np

from ..batch import AT_BARRIER, EXITED, RUNNING
from ..errors import Fault
from ..syntax import Immediate
from .registry import SPLIT, at, instruction
from .warp import members


class Barriers:
    """The 16 barriers of every block of a batch.

    A barrier without a number of threads waits for all threads that have not exited. Exited threads
    order nothing.
    """

    def __init__(self, batch):
        self.batch = batch
        self.arrived = np.zeros((batch.count, 16), np.int64)
        self.expected = np.zeros((batch.count, 16), np.int64)  # 0: the whole block
        self.warps = np.zeros((batch.count, 16, batch.warps), bool)
        self.waiting: dict[tuple[int, int], list[np.ndarray]] = {}
        self.votes: dict[tuple[int, int], list] = {}  # (threads, predicate, result) of bar.red
        batch.at_exit.append(self.exit)

    @classmethod
    def of(cls, batch) -> Barriers:
        if "barriers" not in batch.devices:
            batch.devices["barriers"] = cls(batch)
        return batch.devices["barriers"]

    def complete_for_all(self) -> None:
        """Every thread of the batch arrived together at a barrier of the whole block."""
        self.batch.clocks.join_blocks()
        self.batch.counters.barriers += self.batch.count
        self.batch.progress += 1

    def needed(self, key: tuple[int, int]) -> int:
        """How many threads the barrier waits for."""
        batch = self.batch
        first = key[0] * batch.threads
        living = batch.state[first : first + batch.real_threads] != EXITED
        return int(self.expected[key]) or int(np.count_nonzero(living))

    def arrive(self, block: int, barrier: int, count: int, threads, wait: bool) -> None:
        """Add the arrival of `threads`, and let all go on where it is the last one.

        count: how many threads take part; 0 for the whole block.
        """
        batch, key = self.batch, (block, barrier)
        if self.arrived[key] and self.expected[key] != count:
            before = self.needed(key)
            raise Fault(
                f"barrier {barrier} is used for {count or batch.real_threads} and {before} threads "
                "at once",
                int(threads[0]),
            )
        self.expected[key] = count
        self.arrived[key] += len(threads)
        self.warps[block, barrier, np.unique(threads >> 5) % batch.warps] = True
        if wait:
            self.waiting.setdefault(key, []).append(threads)
            batch.state[threads] = AT_BARRIER
        needed = self.needed(key)
        if self.arrived[key] > needed:
            raise Fault(
                f"{self.arrived[key]} threads came to barrier {barrier} for {needed}",
                int(threads[0]),
            )
        if self.arrived[key] == needed:
            self._complete(key)

    def exit(self, threads) -> None:
        """These threads exit: barriers that waited only for them are complete."""
        blocks = np.unique(self.batch.block_of[threads])
        for key in [key for key in self.waiting if key[0] in blocks]:
            if self.arrived[key] == self.needed(key):
                self._complete(key)

    def _complete(self, key: tuple[int, int]) -> None:
        batch, (block, barrier) = self.batch, key
        waiting = self.waiting.pop(key, [])
        for group in waiting:
            batch.state[group] = RUNNING
            batch.pc[group] += 1
        takers = np.unique(np.concatenate(waiting) >> 5) if waiting else np.array([], np.int64)
        givers = block * batch.warps + np.flatnonzero(self.warps[block, barrier])
        batch.clocks.join(givers, takers)
        votes = self.votes.pop(key, [])
        truth = [cast for _, cast, _ in votes]
        for threads, _, result in votes:
            result(threads, np.concatenate(truth))
        self.arrived[key] = 0
        self.warps[block, barrier] = False
        batch.counters.barriers += 1
        batch.progress += 1


def _whole(batch, threads, what: str) -> None:
    """All lanes of an arriving warp must be here, except those that have exited."""
    rows = np.unique(threads >> 5)[:, None] * 32 + np.arange(32)
    here = np.zeros(batch.size, bool)
    here[threads] = True
    missing = ~here[rows] & (batch.state[rows] != EXITED)
    if missing.any():
        raise Fault(
            f"{what} by a partial warp: some of its lanes are elsewhere",
            int(rows[missing.any(axis=1)][0][0]),
        )


def _parse(batch, ins, first: int):
    """(barrier ids, thread counts or None) as rows, of the operands from `first` on."""
    ids = batch.read(ins.operands[first], "u32", ins.line)
    counts = None
    if len(ins.operands) > first + 1:
        counts = batch.read(ins.operands[first + 1], "u32", ins.line)
    return ids, counts


def _arrivals(batch, m, ids, counts, what: str):
    """(block, barrier, count, threads) for every barrier that the threads came to."""
    threads = batch.indices(m)
    key = batch.block_of[threads] * 16 + at(ids, m)
    if (at(ids, m) > 15).any():
        raise Fault(f"{what}: there are 16 barriers", int(threads[0]))
    for one in np.unique(key):
        mine = threads[key == one]
        count = 0 if counts is None else int(counts[mine[0]])
        if counts is not None and count % 32:
            raise Fault(f"{what}: {count} threads is not a multiple of a warp", int(mine[0]))
        yield int(one) // 16, int(one) % 16, count, mine


@instruction(
    *("bar.sync", "bar.cta.sync", "barrier.sync.aligned", "barrier.cta.sync.aligned"),
    kind="barrier",
    writes=(),
    together="warp",
    control=True,
)
@instruction("barrier.sync", "barrier.cta.sync", kind="barrier", writes=(), control=True)
def sync(batch, ins):
    ids, counts = _parse(batch, ins, 0)
    barriers = Barriers.of(batch)
    index = batch.building
    aligned = ins.name == "bar" or "aligned" in ins.modifiers
    simple = counts is None and isinstance(ins.operands[0], Immediate) and ids[0] < 16

    def run(m):
        if simple and m is None and not barriers.arrived[:, ids[0]].any():
            barriers.complete_for_all()
            return None
        threads = batch.indices(m)
        if aligned:
            _whole(batch, threads, ins.opcode)
        batch.pc[threads] = index
        for arrival in _arrivals(batch, m, ids, counts, ins.opcode):
            barriers.arrive(*arrival, wait=True)
        return SPLIT

    return run


@instruction(
    *("bar.arrive", "bar.cta.arrive", "barrier.arrive.aligned", "barrier.cta.arrive.aligned"),
    kind="barrier",
    writes=(),
    together="warp",
)
@instruction("barrier.arrive", "barrier.cta.arrive", kind="barrier", writes=())
def arrive(batch, ins):
    ids, counts = _parse(batch, ins, 0)
    barriers = Barriers.of(batch)

    def run(m):
        _whole(batch, batch.indices(m), ins.opcode)
        for arrival in _arrivals(batch, m, ids, counts, ins.opcode):
            barriers.arrive(*arrival, wait=False)

    return run


@instruction(
    *("bar.red", "bar.cta.red", "barrier.red", "barrier.cta.red"),
    kind="barrier",
    control=True,
    together="warp",
)
def reduce(batch, ins):
    """A barrier that also counts, or combines, a predicate over the threads that arrive."""
    operation = next(x for x in ins.modifiers if x in ("popc", "and", "or"))
    ids = batch.read(ins.operands[1], "u32", ins.line)
    counts = batch.read(ins.operands[2], "u32", ins.line) if len(ins.operands) == 4 else None
    test = batch.predicate(ins.operands[-1], ins.line)
    out = batch.write(ins.operands[0], "u32" if operation == "popc" else "pred", ins.line)
    combine = {"popc": np.sum, "and": np.all, "or": np.any}[operation]
    barriers, index = Barriers.of(batch), batch.building

    def result(threads, votes) -> None:
        out[threads] = combine(votes)

    def run(m):
        truth = np.zeros(batch.size, bool)
        truth[batch.indices(m)] = test(m)
        _whole(batch, batch.indices(m), ins.opcode)
        batch.pc[batch.indices(m)] = index
        for block, barrier, count, threads in _arrivals(batch, m, ids, counts, ins.opcode):
            votes = barriers.votes.setdefault((block, barrier), [])
            votes.append((threads, truth[threads], result))
            barriers.arrive(block, barrier, count, threads, wait=True)
        return SPLIT

    return run


@instruction("bar.warp.sync", kind="barrier", writes=(), together="mask")
def warp_sync(batch, ins):
    """Lanes of a warp run together here: only the member mask is checked."""
    mask = batch.read(ins.operands[0], "b32", ins.line)

    def run(m):
        members(batch, m, mask, ins.opcode)

    return run


@instruction("fence", "membar", kind="fence", writes=())
def fence(batch, ins):
    """Only the proxy fence changes what may be seen: memory is otherwise in program order."""
    if "proxy" not in ins.modifiers or "async" not in [x.split("::")[0] for x in ins.modifiers]:
        return lambda m: None

    def run(m):
        batch.clocks.fence_async(np.unique(batch.indices(m) >> 5))

    return run


@instruction("barrier.cluster.arrive", kind="barrier", writes=())
def cluster_arrive(batch, ins):
    """A cluster of one block: a split barrier of the block."""
    cluster = _cluster(batch)

    def run(m):
        threads = batch.indices(m)
        for block in np.unique(batch.block_of[threads]):
            mine = threads[batch.block_of[threads] == block]
            cluster["target"][mine] = cluster["phase"][block] + 1
            cluster["arrived"][block] += len(mine)
            if cluster["arrived"][block] == batch.real_threads:
                cluster["arrived"][block] = 0
                cluster["phase"][block] += 1
                rows = block * batch.warps + np.arange(batch.warps)
                cluster["known"][block] = batch.clocks.known[rows].max(axis=0)
                batch.clocks.tick(rows)
                batch.counters.barriers += 1
                inside = batch.all[batch.block_of == block]
                batch.state[inside[cluster["waiting"][inside]]] = RUNNING
                cluster["waiting"][inside] = False
        batch.progress += 1

    return run


@instruction("barrier.cluster.wait", kind="barrier", writes=(), control=True)
def cluster_wait(batch, ins):
    cluster, index = _cluster(batch), batch.building

    def run(m):
        threads = batch.indices(m)
        early = cluster["phase"][batch.block_of[threads]] < cluster["target"][threads]
        if not early.any():
            for block in np.unique(batch.block_of[threads]):
                rows = np.unique(threads[batch.block_of[threads] == block] >> 5)
                batch.clocks.acquire(rows, cluster["known"][block])
            return None
        batch.pc[threads] = index  # all come again, and those that may then go on
        threads = threads[early]
        batch.state[threads] = AT_BARRIER
        cluster["waiting"][threads] = True
        return SPLIT

    return run


def _cluster(batch) -> dict:
    if "cluster" not in batch.devices:
        batch.devices["cluster"] = {
            "arrived": np.zeros(batch.count, np.int64),
            "phase": np.zeros(batch.count, np.int64),
            "target": np.zeros(batch.size, np.int64),
            "waiting": np.zeros(batch.size, bool),
            "known": {},
        }
    return batch.devices["cluster"]
