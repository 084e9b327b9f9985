# SPDX-License-Identifier: Apache-2.0
"""cp.async.bulk.tensor: boxes of a tensor map, tiled or im2col, and their reductions."""

from __future__ import annotations

import functools

import numpy as np

from ..clocks import ASYNC
from ..errors import Fault
from ..memory import PARAM_WINDOW
from ..syntax import Address, Vector
from ..tensor_map import decode
from ..values import bf16_to_f32, f32_to_bf16
from .bulk_copy import BulkGroups, Landing, PendingStore, without_policy
from .load_store import reader
from .mbarrier import Mbarriers
from .registry import instruction, only

_KNOWN = {
    *("async", "bulk", "tensor", "1d", "2d", "3d", "4d", "5d", "global", "tile", "im2col"),
    *("shared::cta", "shared::cluster", "im2col_no_offs", "bulk_group", "multicast::cluster"),
    *("mbarrier::complete_tx::bytes", "L2::cache_hint"),
}  # clusters have one block, so a multicast is a copy


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


def _place(batch, map_, thread: int) -> int:
    """Which of the launch's intervals holds the map's array."""
    for i, interval in enumerate(batch.globals.intervals):
        if interval.low <= map_.interval.low and map_.interval.high <= interval.high:
            return i
    raise Fault("the tensor map's array is not among what the launch may touch", thread)


def _in_view(batch, map_, thread: int):
    """(unsigned elements of the map's buffer, virtual base)."""
    rows, base = batch.globals.view(_place(batch, map_, thread), map_.size, 1)
    return rows[:, 0], base


def _count(batch, kind: str, addresses, size: int) -> None:
    sectors = np.unique(addresses >> 5)
    batch.counters.global_access(kind, len(addresses) * size, 1, len(sectors))
    batch.globals.mark(kind, sectors)


@instruction("cp.async.bulk.tensor", kind="bulk copy", writes=())
def tensor_copy(batch, ins):
    only(ins, _KNOWN)
    if ins.modifiers[4].startswith("shared"):
        return _tensor_load(batch, ins)
    return _tensor_store(batch, ins, None)


def _coordinates(batch, address: Address, line):
    return [batch.read(o, "s32", line) for o in address.coordinates]


def _tensor_load(batch, ins):
    """[shared], [map, {coordinates}], [mbarrier] {, im2col offsets} {, block mask}."""
    operands = without_policy(ins)
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
            object_ = barriers.find(int(object_), thread)
            Landing(batch, object_, thread, at, pieces, (addresses[inside], map_.size))

    return run


@instruction("cp.reduce.async.bulk.tensor", kind="bulk copy", writes=())
def tensor_reduce(batch, ins):
    operation = next(x for x in ins.modifiers if x in ("add", "min", "max"))
    return _tensor_store(batch, ins, operation)


def _tensor_store(batch, ins, operation: str | None):
    """[map, {coordinates}], [shared]."""
    im2col = "im2col_no_offs" in ins.modifiers
    operands = without_policy(ins)
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
                *(_scatter, batch, map_, thread, operation),
                *(addresses[inside], data.view(view.dtype)[inside]),
            )
            groups.pending.append(PendingStore(thread, int(groups.groups[thread]), pieces, write))

    return run


def _scatter(batch, map_, thread: int, operation, addresses, data) -> None:
    view, base = _in_view(batch, map_, thread)
    owner = np.full(len(addresses), thread)
    place = _place(batch, map_, thread)
    batch.globals.claim(place, addresses, map_.size, owner, "tensor copy")
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
