# SPDX-License-Identifier: Apache-2.0
"""wgmma: asynchronous matrix products of a warpgroup, operands in shared memory.

The product is computed at its issue; shared operands may not be written, accumulators not be
touched, until a wait_group that covers it, and the accumulators change only then.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np

from ..batch import BEING_READ, IN_FLIGHT, NEVER_WRITTEN, WRITTEN
from ..clocks import ASYNC, GENERIC
from ..errors import Fault, PtxError
from ..immediates import immediate_bits
from ..syntax import SIZES, Vector
from .matrix import ELEMENTS, element_values, finish, gather
from .registry import instruction, only

_SWIZZLE = {0: (1, 0), 1: (8, 0x70), 2: (4, 0x30), 3: (2, 0x10)}  # mode: chunks in a row, mask
WARPGROUP = 128


@functools.cache
def chunk_offsets(extent: int, chunk: int, mode: int, mn_major: bool, lead: int, stride: int):
    """Byte offsets before swizzling of the 16-byte chunks of an operand [extent, 32 bytes of k].

    K-major: [extent, 2]; MN-major: [k, extent / chunk], chunk = elements in 16 bytes.
    """
    width = _SWIZZLE[mode][0]
    if not mn_major:
        row, piece = np.arange(extent)[:, None], np.arange(2)[None, :]
        step = lead if mode == 0 else 16
        return row % 8 * (16 * width) + row // 8 * stride + piece * step
    k, piece = np.arange(2 * chunk)[:, None], np.arange(extent // chunk)[None, :]
    inner = piece % width * 16 + k % 8 * (16 * width)
    if mode == 0:
        return inner + piece * stride + k // 8 * lead
    return inner + piece // width * lead + k // 8 * stride


def swizzled(address: np.ndarray, mode: int) -> np.ndarray:
    """16-byte chunk bits of an address, exclusive-or the row bits three above them."""
    return address ^ ((address >> 3) & _SWIZZLE[mode][1])


@dataclass
class _Operation:
    key: tuple  # accumulator registers
    pieces: np.ndarray
    a_registers: list[int]


class Warpgroup:
    def __init__(self):
        self.open: list[_Operation] = []
        self.groups: list[list[_Operation]] = []
        self.totals: dict[tuple, np.ndarray] = {}  # accumulators under way, [64, n]

    def users(self, key: tuple) -> bool:
        return any(op.key == key for group in (*self.groups, self.open) for op in group)


class Warpgroups:
    def __init__(self, batch):
        self.batch, self.serial = batch, 1
        self.groups: dict[int, Warpgroup] = {}
        self.fenced = np.zeros(batch.size, np.int64)
        self.changed: dict[tuple, np.ndarray] = {}  # registers -> when a thread last wrote them
        self.writers: dict[tuple, tuple] = {}  # accumulator key -> (rows, type)
        batch.after_build.append(self._watch)

    @classmethod
    def of(cls, batch) -> Warpgroups:
        if "wgmma" not in batch.devices:
            batch.devices["wgmma"] = cls(batch)
        return batch.devices["wgmma"]

    def _watch(self, executor) -> None:
        """Note when other instructions write accumulators or A registers: they need a fence."""
        for key, stamp in self.changed.items():
            members = set(key)
            pcs = {p for r in key for p in executor.touching.get(r, ())}
            pcs = [p for p in pcs if members & set(executor.uses[p][2])]

            def note(m, stamp=stamp):
                self.serial += 1
                stamp[self.batch.indices(m)] = self.serial

            executor.watch(pcs, note)

    def split(self, m, what: str):
        """(warpgroup number, its 128 threads) of the executing threads."""
        lanes = self.batch.whole_warps(m, what)
        whole = lanes.reshape(-1) if len(lanes) % 4 == 0 else None
        if whole is None or (whole[::WARPGROUP] % self.batch.threads % WARPGROUP).any():
            raise Fault(f"{what} by a partial warpgroup", int(lanes[0, 0]))
        for threads in whole.reshape(-1, WARPGROUP):
            if threads[-1] - threads[0] != WARPGROUP - 1:
                raise Fault(f"{what} by a partial warpgroup", int(threads[0]))
            number = int(threads[0]) // WARPGROUP
            yield self.groups.setdefault(number, Warpgroup()), threads

    def finish(self, group: Warpgroup, operations, threads) -> None:
        """Operands are free, and accumulators that no later product uses are written."""
        batch, shared = self.batch, self.batch.shared
        first = threads[:1]
        for op in operations:
            shared.reading[op.pieces] -= 1
            shared.record_read(op.pieces[:, None], np.broadcast_to(first, op.pieces.shape))
            for register in op.a_registers:
                batch.valid[register, threads] = WRITTEN
        row = int(first[0]) >> 5
        slot = row % batch.warps
        # One wait speaks for the warpgroup: each of its warps knows that the reads are over.
        mates = np.arange(row, row + 4)
        known = batch.clocks.known
        known[mates, GENERIC, slot] = np.maximum(known[mates, GENERIC, slot], batch.clocks.now[row])
        batch.clocks.tick(np.array([row]))
        for key in {op.key for op in operations}:
            if not group.users(key):
                self._write(key, group.totals.pop(key), threads)

    def _write(self, key, total, threads) -> None:
        rows, kind = self.writers[key]
        batch = self.batch
        warp = total.reshape(4, 2, 8, -1, 4, 2)  # warp, half, g, column block, t, pair
        values = warp.transpose(0, 2, 4, 3, 1, 5).reshape(WARPGROUP, -1)
        lanes = slice(int(threads[0]), int(threads[-1]) + 1)
        if kind == "f16":
            values = values.reshape(WARPGROUP, -1, 2)
            for i, row in enumerate(rows):
                row[lanes] = values[:, i]
        else:
            for i, row in enumerate(rows):
                row[lanes] = values[:, i]
        batch.valid[list(key), lanes] = WRITTEN


@instruction("wgmma.fence", kind="wgmma order", writes=(), together="warpgroup")
def fence(batch, ins):
    state = Warpgroups.of(batch)

    def run(m):
        batch.whole_warps(m, ins.opcode)
        state.serial += 1
        state.fenced[batch.indices(m)] = state.serial

    return run


@instruction("wgmma.commit_group", kind="wgmma order", writes=(), together="warpgroup")
def commit(batch, ins):
    state = Warpgroups.of(batch)

    def run(m):
        for group, _ in state.split(m, ins.opcode):
            group.groups.append(group.open)
            group.open = []

    return run


@instruction("wgmma.wait_group", kind="wgmma order", writes=(), together="warpgroup")
def wait(batch, ins):
    state = Warpgroups.of(batch)
    keep = immediate_bits(ins.operands[0].text, "b32")

    def run(m):
        for group, threads in state.split(m, ins.opcode):
            while len(group.groups) > keep:
                state.finish(group, group.groups.pop(0), threads)

    return run


@instruction("wgmma.mma_async", kind="wgmma", writes=(), together="warpgroup", own=(0,))
def mma(batch, ins):
    state = Warpgroups.of(batch)
    m_size, n, k = (int(x) for x in re.search(r"\.m(\d+)n(\d+)k(\d+)\.", ins.opcode).groups())
    types = [x for x in ins.modifiers if x in SIZES]
    only(ins, {"mma_async", "sync", "aligned", f"m64n{n}k{k}", "satfinite", *types})
    d_type, a_type, b_type = types
    if m_size != 64 or a_type not in ELEMENTS or k * ELEMENTS[a_type] != 32:
        raise PtxError(f"unsupported form {ins.opcode}", ins.line)
    d, a, b = ins.operands[:3]
    key = tuple(batch.register_index(r) for r in d.items)
    kind = "f16x2" if d_type == "f16" else d_type
    rows = [batch.write(o, kind, ins.line) for o in d.items]
    state.writers[key] = (rows, d_type)
    state.changed.setdefault(key, np.zeros(batch.size, np.int64))
    scale_d, sign_a, sign_b, trans_a, trans_b = _options(batch, ins, d_type, isinstance(a, Vector))
    a_key: tuple = ()
    if isinstance(a, Vector):
        a_key = tuple(batch.register_index(r) for r in a.items)
        a_rows = [batch.read(o, "b32", ins.line) for o in a.items]
        state.changed.setdefault(a_key, np.zeros(batch.size, np.int64))
    else:
        a_descriptor = batch.read(a, "b64", ins.line)
    b_descriptor = batch.read(b, "b64", ins.line)
    saturate = "satfinite" in ins.modifiers

    def run(m):
        for group, threads in state.split(m, ins.opcode):
            _check_order(batch, state, key, a_key, threads)
            right, pieces = _operand(batch, b_descriptor, threads, n, b_type, trans_b)
            if a_key:
                lanes = threads.reshape(4, 32)
                left = gather(a_rows, lanes, (16, k), a_type, "A").reshape(64, k)
                batch.valid[list(a_key), threads[0] : threads[-1] + 1] = BEING_READ
                _invalidate(batch, a_key)
            else:
                left, more = _operand(batch, a_descriptor, threads, 64, a_type, trans_a)
                pieces = np.concatenate([pieces, more])
            total = np.matmul(left * sign_a, right.T * sign_b)
            old = _accumulator(batch, state, group, key, threads, total, scale_d)
            group.totals[key] = finish(total, old, d_type, saturate)
            pieces = np.unique(pieces)
            batch.shared.reading[pieces] += 1
            group.open.append(_Operation(key, pieces, list(a_key)))
            batch.valid[list(key), threads[0] : threads[-1] + 1] = IN_FLIGHT
            batch.counters.tensor_macs += 64 * n * k
        _invalidate(batch, key)

    return run


def _options(batch, ins, d_type: str, a_in_registers: bool):
    """(scale-d, sign of A, sign of B, A is MN-major, B is MN-major)."""
    rest = list(ins.operands[3:])
    scale_d = batch.predicate(rest.pop(0), ins.line)
    signs = [1, 1]
    if d_type != "s32":
        signs = [(-1 if immediate_bits(rest.pop(0).text, "s32") >> 31 else 1) for _ in range(2)]
    trans = [immediate_bits(o.text, "b32") for o in rest]
    if a_in_registers and len(trans) == 1:
        trans = [0, *trans]
    return (scale_d, *signs, *(trans or [0, 0]))


def _check_order(batch, state, key, a_key, threads) -> None:
    for registers in (key, a_key) if a_key else (key,):
        late = state.changed[registers][threads] > state.fenced[threads]
        if late.any():
            raise Fault(
                "wgmma registers were written after the last wgmma.fence",
                int(threads[np.flatnonzero(late)[0]]),
            )
    if (state.fenced[threads] == 0).any():
        raise Fault("no wgmma.fence before the first wgmma.mma_async", int(threads[0]))


def _accumulator(batch, state, group, key, threads, total, scale_d):
    """What the product is added to: a product under way, the registers, or nothing."""
    if not scale_d(threads[:1])[0]:
        return np.zeros_like(total)
    if key in group.totals:
        return group.totals[key]
    lanes = slice(int(threads[0]), int(threads[-1]) + 1)
    valid = batch.valid[list(key), lanes]
    if (valid == NEVER_WRITTEN).any():
        raise Fault("wgmma adds to an accumulator that nothing wrote", int(threads[0]))
    if (valid == IN_FLIGHT).any():
        raise Fault("wgmma accumulators overlap those of another one under way", int(threads[0]))
    rows, _ = state.writers[key]
    values = np.stack([r[lanes] for r in rows], axis=1).reshape(4, 8, 4, -1, 2, 2)
    return values.transpose(0, 4, 1, 3, 2, 5).reshape(total.shape)


def _invalidate(batch, key) -> None:
    """Instructions that touch these registers must check them again."""
    executor = batch.executor
    for register in key:
        batch.full[register] = 0
        for pc in executor.touching[register]:
            executor.ok[pc] = 0


def _operand(batch, descriptors, threads, extent: int, kind: str, mn_major: int):
    """([extent, k] numbers, granules) of the operand that the descriptor describes."""
    value = int(descriptors[threads[0]])
    if (descriptors[threads] != descriptors[threads[0]]).any():
        raise Fault("wgmma descriptors differ within the warpgroup", int(threads[0]))
    start = (value & 0x3FFF) << 4
    lead, stride = (value >> 16 & 0x3FFF) << 4, (value >> 32 & 0x3FFF) << 4
    mode = value >> 62
    if value >> 49 & 7:
        raise Fault("a wgmma descriptor with a base offset is not supported", int(threads[0]))
    size = ELEMENTS[kind]
    if mn_major and size != 2:
        raise Fault(f"wgmma: .{kind} operands must be K-major", int(threads[0]))
    offsets = chunk_offsets(extent, 16 // size, mode, bool(mn_major), lead, stride)
    address = swizzled(start + offsets, mode)
    shared = batch.shared
    flat = address.ravel()
    owner = np.broadcast_to(threads[:1], flat.shape)
    at = shared.locate(flat, owner, 16, "wgmma read")
    pieces = shared.check_read(at, owner, 16, "wgmma read", ASYNC, record=False)
    raw = shared.bytes.reshape(-1, 16)[at // 16].reshape(*address.shape, 16)
    if mn_major:  # [k, extent]
        return element_values(kind, raw.reshape(2 * 16 // size, -1)).T, pieces.ravel()
    return element_values(kind, raw.reshape(extent, 32)), pieces.ravel()
