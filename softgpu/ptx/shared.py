# SPDX-License-Identifier: Apache-2.0
"""Shared memory of a batch of blocks: bytes, bounds, races, bank wavefronts.

A granule is the smallest piece that the kernel accesses (at most 4 bytes). Per granule the shadow
keeps the last writer and its time, the last read of every warp, and how many asynchronous copies
are writing to it or asynchronous operations are reading from it. Bytes start as never written.
"""

from __future__ import annotations

import numpy as np

from .clocks import ASYNC, GENERIC, Clocks
from .errors import Fault

BASE = 1024  # shared addresses start here: a null pointer is out of bounds


class SharedMemory:
    def __init__(self, blocks: int, size: int, warps: int, threads: int, granule: int, counters):
        self.blocks, self.size, self.threads = blocks, size, threads
        self.stride = -(-size // 1024) * 1024 + 1024
        self.granule, self.warps, self.counters = granule, warps, counters
        total = blocks * self.stride
        self.bytes = np.full(total, 0xFF, np.uint8)
        self.written = np.zeros(total, np.uint8)
        self.clocks = Clocks(blocks, warps)
        count = total // granule
        self.writer = np.zeros(count, np.int16)  # slot
        self.write_time = np.zeros(count, np.int32)
        self.reads = np.zeros((count, warps), np.int32)  # time of each warp's last read
        self.landing = np.zeros(count, np.int16)  # asynchronous writes under way
        self.reading = np.zeros(count, np.int16)  # asynchronous reads under way
        self.atomics: np.ndarray | None = None  # time of each warp's last atomic, once there is one
        self._views = {}

    # --- addresses ----------------------------------------------------------------------------

    def locate(self, address: np.ndarray, threads: np.ndarray, size: int, what: str) -> np.ndarray:
        """Byte positions in `bytes` of `size` bytes at each thread's address, checked."""
        address = address.astype(np.int64, copy=False)
        bad = (address < BASE) | (address + size > BASE + self.size)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise Fault(
                f"out-of-bounds {what} of {size} bytes at shared offset {int(address[i]) - BASE} "
                f"of {self.size} bytes",
                int(threads[i]),
            )
        if np.bitwise_or.reduce(address) & (size - 1):
            i = int(np.flatnonzero(address & (size - 1))[0])
            raise Fault(
                f"misaligned {what} of {size} bytes at shared offset {int(address[i]) - BASE}",
                int(threads[i]),
            )
        return (threads // self.threads) * self.stride + (address - BASE)

    def view(self, unit: int, lanes: int = 1) -> np.ndarray:
        """[count, lanes] unsigned elements of `unit` bytes."""
        key = (unit, lanes)
        if key not in self._views:
            whole = len(self.bytes) // (unit * lanes) * unit * lanes
            self._views[key] = self.bytes[:whole].view(f"u{unit}").reshape(-1, lanes)
        return self._views[key]

    def granules(self, at: np.ndarray, size: int) -> np.ndarray:
        """[n, pieces] granule indices of `size` bytes at each byte position."""
        first = at // self.granule
        if size <= self.granule:
            return first[:, None]
        return first[:, None] + np.arange(size // self.granule)

    # --- plain accesses -----------------------------------------------------------------------

    def load(self, address, threads, unit: int, lanes: int = 1, what="shared load") -> np.ndarray:
        size = unit * lanes
        at = self.locate(address, threads, size, what)
        self.check_read(at, threads, size, what)
        self.wavefronts("load", at, threads, size)
        return self.view(unit, lanes)[at // size]

    def store(self, address, threads, data: np.ndarray, what="shared store") -> None:
        size = data.dtype.itemsize * data.shape[1]
        at = self.locate(address, threads, size, what)
        view, index = self.view(data.dtype.itemsize, data.shape[1]), at // size
        pieces = self.check_write(at, threads, size, what, same=(view[index] == data).all(axis=1))
        view[index] = data
        lost = (view[index] != data).any(axis=1)
        if lost.any():
            self._raise_lost(at, threads, int(np.flatnonzero(lost)[0]))
        self.record_write(pieces, threads, agreed=True)
        self.wavefronts("store", at, threads, size)
        self.mark_written(at, size)

    def _raise_lost(self, at, threads, i: int):
        """Thread i's value is lost: another thread stored to its address at the same time."""
        rivals = threads[at == at[i]] >> 5
        raise Fault(
            "race: two warps write different values to the same shared bytes at once"
            if (rivals != rivals[0]).any()
            else "lanes of a warp write different values to the same shared bytes at once "
            f"(shared offset {int(at[i]) % self.stride})",
            int(threads[i]),
        )

    def mark_written(self, at: np.ndarray, size: int) -> None:
        unit = min(size, 8)
        ones = {1: 1, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}[unit]
        view = self.written.view(f"u{unit}")
        first = at // unit
        for i in range(size // unit):
            view[first + i] = ones

    # --- rules --------------------------------------------------------------------------------

    def check_read(self, at, threads, size: int, what: str, view: int = GENERIC, record=True):
        """A read must see finished writes that happened before it; returns its granules."""
        pieces = self.granules(at, size)
        if self.landing[pieces].any():
            self._raise(
                self.landing[pieces] > 0,
                threads,
                at,
                f"{what} of bytes that an asynchronous copy is still writing: its wait is missing",
            )
        self._check_written(at, threads, size, what)
        warp = (threads >> 5)[:, None]
        writer, time = self.writer[pieces], self.write_time[pieces]
        unseen = time > self.clocks.known[warp, GENERIC, writer]
        if unseen.any():
            self._raise(unseen, threads, at, f"race: {what} of bytes that {{}} wrote", writer)
        self._check_atomics(pieces, threads, at, what)
        if view == ASYNC:
            unseen = time > self.clocks.known[warp, ASYNC, writer]
            if unseen.any():
                self._raise(
                    unseen,
                    threads,
                    at,
                    f"{what} through the async proxy of bytes that {{}} wrote "
                    "without a fence.proxy.async",
                    writer,
                )
        if record:
            self.record_read(pieces, threads)
        return pieces

    def record_read(self, pieces, threads) -> None:
        warp = (threads >> 5)[:, None]
        self.reads[pieces, warp % self.warps] = self.clocks.now[warp]

    def check_write(
        self, at, threads, size: int, what: str, view: int = GENERIC, same=None
    ) -> np.ndarray:
        """A write must happen after every read and write of its bytes; returns its granules.

        same: threads whose bytes already hold what they write. Such a write need not happen after
        another warp's write; the other warp then counts as a reader, and a different value must
        still be ordered after it.
        """
        pieces = self.granules(at, size)
        if self.landing[pieces].any():
            self._raise(
                self.landing[pieces] > 0,
                threads,
                at,
                f"race: {what} over bytes that an asynchronous copy is still writing",
            )
        if self.reading[pieces].any():
            self._raise(
                self.reading[pieces] > 0,
                threads,
                at,
                f"{what} over bytes that an asynchronous "
                "operation (wgmma or a bulk copy) still reads: its wait is missing",
            )
        warp = (threads >> 5)[:, None]
        known = self.clocks.known
        writer, time = self.writer[pieces], self.write_time[pieces]
        unseen = time > known[warp, GENERIC, writer]
        harmless = unseen & (writer < self.warps) & (False if same is None else same[:, None])
        unseen &= ~harmless
        if unseen.any():
            self._raise(unseen, threads, at, f"race: {what} over bytes that {{}} wrote", writer)
        if view == ASYNC and (unseen := time > known[warp, ASYNC, writer]).any():
            self._raise(
                unseen,
                threads,
                at,
                f"{what} through the async proxy over bytes that {{}} wrote "
                "without a fence.proxy.async",
                writer,
            )
        self._check_atomics(pieces, threads, at, what)
        own = known[threads >> 5, GENERIC, : self.warps][:, None]
        late = self.reads[pieces] > own
        if late.any():
            reader = late.argmax(axis=2)
            self._raise(
                late.any(axis=2),
                threads,
                at,
                f"race: {what} over bytes that {{}} may still read",
                reader,
            )
        if harmless.any():
            rivals = pieces[harmless], writer[harmless]
            self.reads[rivals] = np.maximum(self.reads[rivals], time[harmless])
        return pieces

    def record_write(self, pieces, threads, slot=None, time=None, agreed=False) -> None:
        """Remember the writer; two warps that write one granule at once are a race, unless they
        agree on the value: then all but one count as readers of it."""
        warp = (threads >> 5)[:, None]
        self.writer[pieces] = warp % self.warps if slot is None else slot
        self.write_time[pieces] = self.clocks.now[warp] if time is None else time
        if slot is None:
            other = self.writer[pieces] != warp % self.warps
            if agreed and other.any():
                rivals = np.broadcast_to(warp, pieces.shape)[other]
                self.reads[pieces[other], rivals % self.warps] = self.clocks.now[rivals]
            elif other.any():
                i = int(np.flatnonzero(other.any(axis=1))[0])
                raise Fault("race: two warps write the same shared bytes at once", int(threads[i]))

    def _check_atomics(self, pieces, threads, at, what: str) -> None:
        if self.atomics is None:
            return
        own = self.clocks.known[threads >> 5, GENERIC, : self.warps][:, None]
        late = self.atomics[pieces] > own
        if late.any():
            who = late.argmax(axis=2)
            self._raise(
                late.any(axis=2),
                threads,
                at,
                f"race: {what} of bytes that {{}} changes atomically",
                who,
            )

    def _check_written(self, at, threads, size: int, what: str) -> None:
        unit = min(size, 8)
        ones = {1: 1, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}[unit]
        view, first = self.written.view(f"u{unit}"), at // unit
        for i in range(size // unit):
            bad = view[first + i] != ones
            if bad.any():
                self._raise(bad[:, None], threads, at, f"{what} of shared bytes that nothing wrote")

    def _raise(self, bad, threads, at, message: str, other=None):
        row, column = (int(x) for x in np.argwhere(bad)[0])
        if other is not None:
            slot = int(other[row, column])
            message = message.format(
                f"warp {slot}" if slot < self.warps else "an asynchronous copy"
            )
            message += ", with no barrier or wait between"
        offset = int(at[row]) % self.stride
        raise Fault(f"{message} (shared offset {offset})", int(threads[row]))

    # --- atomics ------------------------------------------------------------------------------

    def atomic(self, address, threads, unit: int, lanes: int, returns: bool):
        """(get(pick), put(pick, data), turns): atomics race with plain accesses, not each other."""
        size = unit * lanes
        at = self.locate(address, threads, size, "shared atomic")
        pieces = self.granules(at, size)
        if self.atomics is None:
            self.atomics = np.zeros_like(self.reads)
        mine, self.atomics = self.atomics, None  # other atomics are not a race
        self.check_read(at, threads, size, "shared atomic", record=False)
        self.check_write(at, threads, size, "shared atomic")
        self.atomics = mine
        warp = (threads >> 5)[:, None]
        self.atomics[pieces, warp % self.warps] = self.clocks.now[warp]
        if returns:
            self.wavefronts("load", at, threads, size)
        self.wavefronts("store", at, threads, size)
        view, index = self.view(unit, lanes), at // size

        def put(pick, data):
            view[index[pick]] = data

        return (lambda pick: view[index[pick]]), put, turns(at)

    # --- banks --------------------------------------------------------------------------------

    def wavefronts(self, kind: str, at: np.ndarray, threads: np.ndarray, size: int) -> None:
        """32 banks of 4 bytes; accesses of 8 (16) bytes go by half (quarter) warps.

        A wavefront serves one word of each bank to any number of lanes, so a group of lanes takes
        as many as the most distinct words that any bank must give, and at best one.
        """
        if len(at) == 0:
            return
        words = max(size // 4, 1)
        group = threads // (32 // words)
        word = (at >> 2)[:, None] + np.arange(words)
        keys = np.unique(((group[:, None] << 32) | word).ravel())
        lines = ((keys >> 32) << 5) | (keys & 31)  # (group, bank)
        order = np.sort(lines)
        starts = np.flatnonzero(np.diff(order, prepend=-1))
        depth = np.diff(starts, append=len(order))
        owner = order[starts] >> 5
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        self.counters.shared_access(kind, int(np.maximum.reduceat(depth, first).sum()), len(first))


def turns(where: np.ndarray) -> list[np.ndarray]:
    """Indices grouped so that no group has one address twice, first comers first."""
    order = np.argsort(where, kind="stable")
    starts = np.diff(where[order], prepend=where[order][0] - 1) != 0
    first = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - first
    return [np.flatnonzero(rank == r) for r in range(int(rank.max()) + 1)]
