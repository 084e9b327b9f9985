# SPDX-License-Identifier: Apache-2.0
"""cp.async: copies of 4, 8 or 16 bytes a thread, which land at the wait that covers them.

Data lands as late as the ISA allows, so a missing wait is seen: until then its bytes may neither be
read nor written. After the wait they are a write of the waiting warp: other warps need a barrier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..errors import Fault, PtxError
from ..immediates import immediate_bits
from ..syntax import Immediate, Register
from .registry import at, instruction, only

_HINTS = {"L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"}


@dataclass
class Copy:
    """One executed cp.async of some threads; arrays have one row a thread."""

    threads: np.ndarray
    group: np.ndarray  # which commit group of its thread
    at: np.ndarray  # byte positions in the batch's shared memory
    pieces: np.ndarray  # granules
    data: np.ndarray  # [n, words]
    source: np.ndarray  # global addresses
    length: np.ndarray  # bytes read from there
    size: int
    serial: int

    def rest(self, keep: np.ndarray) -> Copy:
        """Of some of the threads."""
        rows = ("threads", "group", "at", "pieces", "data", "source", "length")
        return replace(self, **{name: getattr(self, name)[keep] for name in rows})


class AsyncCopies:
    def __init__(self, batch):
        self.batch = batch
        self.groups = np.zeros(batch.size, np.int64)  # committed by each thread
        self.pending: list[Copy] = []
        self.serial = 0
        batch.globals.aliases.readers.append(self)

    @classmethod
    def of(cls, batch) -> AsyncCopies:
        if "cp.async" not in batch.devices:
            batch.devices["cp.async"] = cls(batch)
        return batch.devices["cp.async"]

    def land(self, limit: np.ndarray, slot=None, time=None, before=1 << 62) -> None:
        """Finish every copy, issued before a time, whose group lies below its thread's limit."""
        kept = []
        for copy in self.pending:
            done = (copy.group < limit[copy.threads]) & (copy.serial < before)
            if done.all():
                self._write(copy, slice(None), slot, time)
                continue
            if done.any():
                self._write(copy, done, slot, time)
                copy = copy.rest(~done)
            kept.append(copy)
        self.pending = kept

    def sources(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(addresses, lengths) of what is being read."""
        reading = [(copy, copy.length > 0) for copy in self.pending]
        return [(copy.source[read], copy.length[read]) for copy, read in reading]

    def _write(self, copy: Copy, pick, slot, time) -> None:
        shared, where = self.batch.shared, copy.at[pick]
        unit = copy.data.dtype.itemsize
        shared.view(unit, copy.data.shape[1])[where // copy.size] = copy.data[pick]
        shared.mark_written(where, copy.size)
        shared.landing[copy.pieces[pick]] -= 1
        shared.record_write(copy.pieces[pick], copy.threads[pick], slot, time)

    def limits(self, threads, keep: int | None) -> np.ndarray:
        """For `threads` all groups but the `keep` latest (None: everything), for others nothing."""
        limit = np.zeros(self.batch.size, np.int64)
        limit[threads] = 1 << 62 if keep is None else self.groups[threads] - keep
        return limit


@instruction("cp.async.ca", "cp.async.cg", kind="cp.async", writes=())
def copy(batch, ins):
    """[shared], [global], size {, bytes read from the source, the rest zero | ignore predicate}."""
    only(ins, {"async", "ca", "cg", "shared", "shared::cta", "global", *_HINTS})
    hint = "L2::cache_hint" in ins.modifiers
    operands = ins.operands[: len(ins.operands) - hint]
    size = immediate_bits(operands[2].text, "b32")
    if size not in ((16,) if "cg" in ins.modifiers else (4, 8, 16)):
        raise PtxError(f"{ins.opcode} of {size} bytes", ins.line)
    target = batch.shared_address(operands[0], ["shared"], ins.line)
    _, source = batch.address(operands[1], ins.line)
    length = _source_size(batch, operands[3] if len(operands) > 3 else None, size, ins.line)
    copies, shared = AsyncCopies.of(batch), batch.shared
    what = "cp.async write"

    def run(m):
        threads = batch.indices(m)
        where = shared.locate(target(m), threads, size, what)
        pieces = shared.check_write(where, threads, size, what)
        if len(np.unique(where)) < len(where):
            raise Fault("race: two threads of one cp.async write the same bytes", int(threads[0]))
        shared.landing[pieces] += 1
        shared.wavefronts("store", where, threads, size)
        start = source(m)
        read = np.full(len(threads), size) if length is None else length(m).astype(np.int64)
        data = _fetch(batch, start, threads, read, size)
        group, copies.serial = copies.groups[threads], copies.serial + 1
        copies.pending.append(
            Copy(threads, group, where, pieces, data, start, read, size, copies.serial)
        )

    return run


def _source_size(batch, operand, size: int, line):
    """A function of m giving the bytes to read, or None for always all."""
    if operand is None:
        return None
    if isinstance(operand, Register) and operand.type == "pred":
        ignore = batch.predicate(operand, line)
        return lambda m: np.where(ignore(m), 0, size)
    if isinstance(operand, Immediate) and immediate_bits(operand.text, "b32") == size:
        return None
    row = batch.read(operand, "u32", line)
    return lambda m: at(row, m)


def _fetch(batch, address, threads, length, size: int) -> np.ndarray:
    unit = 8 if size >= 8 else 4
    what = "cp.async read"
    if (length == size).all():
        return batch.globals.load(address, threads, unit, size // unit, what)
    if (length > size).any():
        raise Fault("cp.async with a source longer than the copy", int(threads[0]))
    data = np.zeros((len(address), size // unit), f"u{unit}")
    whole = length == size
    if whole.any():
        data[whole] = batch.globals.load(address[whole], threads[whole], unit, size // unit, what)
    raw = data.view(np.uint8).reshape(len(address), size)
    for n in np.unique(length[~whole]):
        if n:
            pick = length == n
            steps = address[pick][:, None] + np.arange(int(n))
            owners = np.repeat(threads[pick], int(n))
            loaded = batch.globals.load(steps.ravel(), owners, 1, 1, what)
            raw[pick, : int(n)] = loaded.reshape(-1, int(n))
    return data


@instruction("cp.async.commit_group", kind="cp.async", writes=())
def commit(batch, ins):
    copies = AsyncCopies.of(batch)

    def run(m):
        copies.groups[batch.indices(m)] += 1

    return run


@instruction("cp.async.wait_group", "cp.async.wait_all", kind="cp.async", writes=())
def wait(batch, ins):
    copies = AsyncCopies.of(batch)
    everything = "wait_all" in ins.modifiers
    keep = None if everything else immediate_bits(ins.operands[0].text, "b32")

    def run(m):
        if copies.pending:
            copies.land(copies.limits(batch.indices(m), keep))

    return run
