# SPDX-License-Identifier: Apache-2.0
"""cp.async.bulk: block copies and tensor copies between global and shared memory.

Into shared memory they complete bytes on an mbarrier, and land when a thread waits for its phase;
out of shared memory they form groups: the source stays in use until wait_group.read, and global
memory changes at wait_group, or at the end.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ..clocks import ASYNC
from ..errors import Fault, PtxError
from ..memory import PARAM_WINDOW
from ..parser import immediate_bits
from ..syntax import Address, Vector
from ..tensor_map import decode
from ..values import bf16_to_f32, f32_to_bf16
from .load_store import reader
from .mbarrier import Mbarriers
from .registry import instruction


@dataclass
class _Store:
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
        self.pending: list[_Store] = []
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

    def _release(self, store: _Store) -> None:
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

    def __init__(self, batch, barrier, thread: int, at: np.ndarray, data: np.ndarray):
        """at: byte positions of 16-byte pieces; data: [n, 16] bytes."""
        self.batch, self.barrier, self.at, self.data = batch, barrier, at, data
        owner = np.full(len(at), thread)
        shared = batch.shared
        self.pieces = shared.check_write(at, owner, 16, "bulk copy", ASYNC)
        shared.landing[self.pieces] += 1
        self.owner = owner
        barrier.copies.append(self.land)

    def land(self) -> None:
        shared = self.batch.shared
        shared.bytes.reshape(-1, 16)[self.at // 16] = self.data
        shared.mark_written(self.at, 16)
        shared.landing[self.pieces] -= 1
        shared.record_write(self.pieces, self.owner, *self.barrier.agent_wrote())
        self.barrier.bytes -= self.data.size


def _operands(ins) -> list:
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
    operands = _operands(ins)
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
            Landing(batch, barriers.find(int(object_), thread), thread, at, data.view(np.uint8))

    return run


@instruction("cp.async.bulk.global", kind="bulk copy", writes=())
def store(batch, ins):
    """[global], [shared], bytes."""
    operands = _operands(ins)
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

            groups.pending.append(_Store(thread, int(groups.groups[thread]), pieces, write))

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


# --- tensor copies ----------------------------------------------------------------------------


def _map_of(batch, address: int, thread: int):
    """The TensorMap whose 128 bytes lie at a generic address, parameters included."""
    one = np.array([thread])
    if address % 64:
        raise Fault(f"a tensor map at 0x{address:x}: 64-byte alignment is needed", thread)
    if address >> 32 == PARAM_WINDOW >> 32:
        offset = address - PARAM_WINDOW
        raw = batch.params[offset : offset + 16].tobytes()
    else:
        raw = reader(batch, None)(np.array([address]), one, 8, 2).tobytes()
    return decode(raw, thread)


def _shared_pieces(batch, map_, start: int, thread: int):
    """Byte positions of the box's 16-byte pieces, in box order, swizzled."""
    if start % 128:
        raise Fault(
            f"a tensor copy at shared address {start}: 128-byte alignment is needed", thread
        )
    steps = start + np.arange(0, map_.bytes, 16)
    mask = {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}[map_.swizzle]
    steps = steps ^ ((steps >> 3) & mask)
    owner = np.full(len(steps), thread)
    return batch.shared.locate(steps, owner, 16, "tensor copy"), owner


def _in_view(batch, map_, thread: int | None):
    """(unsigned elements of the map's buffer, virtual base)."""
    memory = batch.globals
    for i, interval in enumerate(memory.intervals):
        if interval.low <= map_.interval.low and map_.interval.high <= interval.high:
            rows, base = memory.view(i, map_.size, 1)
            return rows[:, 0], base
    raise Fault("the tensor map's array is not among what the launch may touch", thread)


def _count(batch, kind: str, addresses, size: int) -> None:
    sectors = np.unique(addresses >> 5)
    batch.counters.global_access(kind, len(addresses) * size, 1, len(sectors))
    batch.globals.mark(kind, sectors)


@instruction("cp.async.bulk.tensor", kind="bulk copy", writes=())
def tensor_copy(batch, ins):
    if ins.modifiers[4].startswith("shared"):
        return _tensor_load(batch, ins)
    return _tensor_store(batch, ins, None)


def _coordinates(batch, address: Address, line):
    return [batch.read(o, "s32", line) for o in address.coordinates]


def _tensor_load(batch, ins):
    """[shared], [map, {coordinates}], [mbarrier] {, im2col offsets} {, block mask}."""
    operands = _operands(ins)
    target = batch.shared_address(operands[0], ["shared"], ins.line)
    _, map_at = batch.address(operands[1], ins.line)
    coordinates = _coordinates(batch, operands[1], ins.line)
    barrier = batch.shared_address(operands[2], ["shared"], ins.line)
    im2col = "im2col" in ins.modifiers
    offsets = []
    if im2col:
        items = operands[3].items if isinstance(operands[3], Vector) else operands[3:4]
        offsets = [batch.read(o, "u16", ins.line) for o in items]
    barriers = Mbarriers.of(batch)

    def run(m):
        rows = zip(batch.indices(m), target(m), map_at(m), barrier(m), strict=True)
        for thread, to, where, object_ in rows:
            thread = int(thread)
            map_ = _map_of(batch, int(where), thread)
            if map_.im2col != im2col or len(map_.shape) != len(coordinates):
                raise Fault(f"{ins.opcode} with a tensor map of another kind", thread)
            addresses, inside = map_.elements(
                [c[thread] for c in coordinates], [o[thread] for o in offsets]
            )
            view, base = _in_view(batch, map_, thread)
            data = np.empty(len(addresses), view.dtype)
            data[:] = map_.fill_bytes().view(view.dtype)[0]
            data[inside] = view[(addresses[inside] - base) // map_.size]
            _count(batch, "load", addresses[inside], map_.size)
            at, _ = _shared_pieces(batch, map_, int(to), thread)
            pieces = data.view(np.uint8).reshape(-1, 16)
            Landing(batch, barriers.find(int(object_), thread), thread, at, pieces)

    return run


@instruction("cp.reduce.async.bulk.tensor", kind="bulk copy", writes=())
def tensor_reduce(batch, ins):
    operation = next(x for x in ins.modifiers if x in ("add", "min", "max"))
    return _tensor_store(batch, ins, operation)


def _tensor_store(batch, ins, operation: str | None):
    """[map, {coordinates}], [shared]."""
    im2col = "im2col_no_offs" in ins.modifiers
    operands = _operands(ins)
    _, map_at = batch.address(operands[0], ins.line)
    coordinates = _coordinates(batch, operands[0], ins.line)
    source = batch.shared_address(operands[1], ["shared"], ins.line)
    groups, shared = BulkGroups.of(batch), batch.shared

    def run(m):
        for thread, where, start in zip(batch.indices(m), map_at(m), source(m), strict=True):
            thread = int(thread)
            map_ = _map_of(batch, int(where), thread)
            at, owner = _shared_pieces(batch, map_, int(start), thread)
            pieces = shared.check_read(at, owner, 16, "tensor copy", ASYNC, record=False).ravel()
            shared.reading[pieces] += 1
            data = np.ascontiguousarray(shared.bytes.reshape(-1, 16)[at // 16]).reshape(-1)
            if map_.im2col != im2col or len(map_.shape) != len(coordinates):
                raise Fault(f"{ins.opcode} with a tensor map of another kind", thread)
            addresses, inside = map_.elements([c[thread] for c in coordinates], (0, 0))
            view, _ = _in_view(batch, map_, thread)
            if not map_.interval.writable:
                raise Fault("tensor copy into a read-only array", thread)

            write = functools.partial(
                _scatter, batch, map_, operation, addresses[inside], data.view(view.dtype)[inside]
            )
            groups.pending.append(_Store(thread, int(groups.groups[thread]), pieces, write))

    return run


def _scatter(batch, map_, operation, addresses, data) -> None:
    view, base = _in_view(batch, map_, None)
    index = (addresses - base) // map_.size
    view[index] = _combine(map_, operation, view[index], data)
    _count(batch, "store", addresses, map_.size)


def _combine(map_, operation, old, new):
    """The element type is that of the array: bfloat16 is the 2-byte type NumPy does not know."""
    if operation is None:
        return new
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}[operation]
    name = str(map_.array.dtype).removeprefix("torch.")
    if name in ("bfloat16", "uint16"):
        return f32_to_bf16(function(bf16_to_f32(old), bf16_to_f32(new)))
    dtype = np.dtype(name)
    return function(old.view(dtype), new.view(dtype)).view(old.dtype)
