# SPDX-License-Identifier: Apache-2.0
"""The state of a batch of blocks: registers over all threads, memories, asynchronous work.

A thread is an index into the batch, block * threads per block + thread, blocks padded to whole
warps. `m`, the argument of every compiled instruction, is None for all threads or a sorted array
of thread indices. Operands become arrays over all threads once, when a kernel is bound to a batch.
"""

from __future__ import annotations

import numpy as np

from . import memory
from .errors import Fault, PtxError
from .immediates import immediate_bits
from .shared import SharedMemory
from .syntax import (
    SIZES,
    Address,
    Function,
    Immediate,
    Not,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from .values import DTYPES, PACKED

RUNNING, AT_BARRIER, AT_MBARRIER, AT_COLLECTIVE, EXITED = range(5)
NEVER_WRITTEN, WRITTEN, IN_FLIGHT, BEING_READ = range(4)  # the last two by a wgmma


class Batch:
    """blocks: [n, 3] block indices; block, grid: three extents; params: the parameter bytes."""

    def __init__(
        self,
        function: Function,
        blocks,
        block,
        grid,
        params,
        shared,
        globals_,
        counters,
        layout,
        symbols,
    ):
        self.function, self.counters = function, counters
        self.block_index, self.block, self.grid = blocks, block, grid
        self.real_threads = int(np.prod(block))
        self.threads = -(-self.real_threads // 32) * 32
        self.warps = self.threads // 32
        self.count = len(blocks)
        self.size = self.count * self.threads
        self.all = np.arange(self.size)
        self.lane = self.all & 31
        self.block_of = self.all // self.threads
        self.params, self.globals, self.layout = params, globals_, layout
        self.symbols = symbols  # name -> (space, address)
        size, granule = shared
        self.shared = SharedMemory(self.count, size, self.warps, self.threads, granule, counters)
        self.clocks = self.shared.clocks
        self.local = np.zeros((self.size, max(layout.local, 1)), np.uint8)
        self.local_written = np.zeros_like(self.local, dtype=bool)
        self._registers()
        self.state = np.full(self.size, RUNNING, np.uint8)
        self.state[self.all % self.threads >= self.real_threads] = EXITED
        self.pc = np.zeros(self.size, np.int64)
        self.carry = np.zeros(self.size, np.uint8)
        self.progress = 0  # grows with everything that may let a waiting thread go on
        self.expired = np.zeros(self.size, bool)  # threads whose mbarrier wait ran out of time
        self.devices: dict = {}  # state of the instruction families, by name
        self.after_build: list = []  # called with the executor once every instruction is bound
        self.at_exit: list = []  # called with the threads that exit
        self.last_resort: list = []  # called when no thread can run; True if that changed something

    def _registers(self) -> None:
        rows = self.function.registers
        self.files, self.first = {}, {}
        total = 0
        for file, count in rows.items():
            dtype = bool if file == "pred" else (f"u{file}" if file <= 8 else f"V{file}")
            self.files[file] = np.zeros((count, self.size), dtype)
            self.first[file] = total
            total += count
        self.valid = np.zeros((total, self.size), np.uint8)
        self.valid[:, self.all % self.threads >= self.real_threads] = WRITTEN
        self.full = bytearray(total)

    def register_index(self, register: Register) -> int:
        file, slot = register.key
        return self.first[file] + slot

    # --- operands -----------------------------------------------------------------------------

    def row(self, register: Register) -> np.ndarray:
        file, slot = register.key
        return self.files[file][slot]

    def read(self, operand, kind: str, line: int | None = None) -> np.ndarray:
        """The operand as type `kind` over all threads: [size], or [size, 2] for packed types."""
        lanes = 2 if kind in PACKED else 1
        element = PACKED.get(kind, kind)
        if isinstance(operand, Register):
            return _typed(self.row(operand), element, lanes, operand, line)
        if isinstance(operand, Not):
            raise PtxError("a negated predicate is not readable here", line)
        if isinstance(operand, Immediate):
            if kind == "pred":
                return np.full(self.size, immediate_bits(operand.text, "b32") != 0)
            whole = {"f32x2": "b64"}.get(kind, kind)
            bits = immediate_bits(operand.text, whole) & ((1 << 8 * SIZES.get(kind, 8)) - 1)
            raw = np.full(self.size, bits, f"u{SIZES.get(kind, 8)}")
        elif isinstance(operand, Special):
            raw = self.special(operand.name, line)
            return _typed(raw, element, lanes, None, line)
        elif isinstance(operand, Symbol | Address):
            symbol = operand.base if isinstance(operand, Address) else operand
            offset = operand.offset if isinstance(operand, Address) else 0
            _, address = self.symbol(symbol, line)
            raw = np.full(self.size, address + offset, np.uint64)
        else:
            raise PtxError(f"unreadable operand {operand}", line)
        return _typed(raw, element, lanes, None, line)

    def predicate(self, operand, line=None):
        """A function of m giving the truth of a (negated) predicate operand."""
        if isinstance(operand, Not):
            row = self.read(operand.operand, "pred", line)
            return lambda m: ~row if m is None else ~row[m]
        row = self.read(operand, "pred", line)
        return lambda m: row if m is None else row[m]

    def write(self, operand, kind: str, line: int | None = None) -> np.ndarray:
        """Where a result of type `kind` goes; a sink gets scratch."""
        lanes = 2 if kind in PACKED else 1
        element = PACKED.get(kind, kind)
        if isinstance(operand, Sink):
            shape = (self.size, lanes) if lanes > 1 else self.size
            return np.zeros(shape, DTYPES[element])
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} is not a destination", line)
        return _typed(self.row(operand), element, lanes, operand, line)

    def extending_write(self, operand, kind: str, line=None):
        """put(m, values): ld and cvt may write a register wider than their type."""
        if isinstance(operand, Sink):
            return lambda m, values: None
        row = self.row(operand)
        if operand.size <= SIZES[kind]:
            row = row.view(DTYPES[kind])
        elif kind[0] == "s":
            row = row.view(f"i{operand.size}")

        def put(m, values):
            if m is None:
                row[...] = values
            else:
                row[m] = values

        return put

    def address(self, operand: Address, line: int | None = None):
        """(space of a named base or None, function of m giving int64 addresses)."""
        offset = operand.offset
        if isinstance(operand.base, Register):
            row = self.row(operand.base)
            if operand.base.size == 8:
                row = row.view(np.int64)
            if offset == 0:
                return None, lambda m: (row if m is None else row[m]).astype(np.int64)
            return None, lambda m: (row if m is None else row[m]).astype(np.int64) + offset
        if isinstance(operand.base, Immediate):
            space, base = None, immediate_bits(operand.base.text, "b64")
        else:
            space, base = self.symbol(operand.base, line)
        constant = np.full(self.size, base + offset, np.int64)
        return space, lambda m: constant if m is None else constant[m]

    def symbol(self, symbol: Symbol, line=None) -> tuple[str, int]:
        """(space, address within its space) of a variable."""
        if symbol.name not in self.symbols:
            raise PtxError(f"unknown symbol {symbol.name}", line)
        return self.symbols[symbol.name]

    def special(self, name: str, line=None) -> np.ndarray:
        """A special register over all threads, uint32 (uint64 for the 64-bit ones)."""
        base, _, axis = name[1:].partition(".")
        i = "xyzw".index(axis) if axis else 0
        within = self.all % self.threads
        x, y, _ = self.block
        constants = {
            "nsmid": 1,
            "smid": 0,
            "gridid": 0,
            "nwarpid": self.warps,
            "cluster_ctarank": 0,
            "cluster_nctarank": 1,
            "is_explicit_cluster": 0,
            "dynamic_smem_size": self.layout.dynamic,
            "total_smem_size": self.shared.size,
            "aggr_smem_size": self.shared.size,
        }
        if base == "tid":
            value = (within % x, within // x % y, within // (x * y), within * 0)[i]
        elif base == "ctaid" or base == "clusterid":
            value = self.block_index[self.block_of, i] if i < 3 else within * 0
        elif base in ("ntid", "nctaid", "nclusterid"):
            extents = self.block if base == "ntid" else self.grid
            value = np.full(self.size, extents[i] if i < 3 else 1)
        elif base == "cluster_ctaid" or base == "cluster_nctaid":
            value = np.full(self.size, base == "cluster_nctaid", np.int64)
        elif base == "laneid":
            value = self.lane
        elif base == "warpid":
            value = within // 32
        elif base.startswith("lanemask"):
            one = np.uint64(1) << self.lane.astype(np.uint64)
            below = one - np.uint64(1)
            value = {
                "eq": one,
                "lt": below,
                "le": one | below,
                "gt": ~(one | below),
                "ge": ~below,
            }[base[-2:]] & np.uint64(0xFFFFFFFF)
        elif base in ("clock", "clock64", "globaltimer", "globaltimer_lo", "globaltimer_hi"):
            value = np.zeros(self.size, np.uint64)  # time does not pass here
        elif base in constants:
            value = np.full(self.size, constants[base])
        else:
            raise PtxError(f"unknown special register {name}", line)
        return value.astype(np.uint64 if "64" in base or base == "globaltimer" else np.uint32)

    # --- threads ------------------------------------------------------------------------------

    def indices(self, m) -> np.ndarray:
        return self.all if m is None else m

    def wake_collectives(self, threads) -> None:
        """These threads exit: collectives in their blocks that wait for lanes must look again."""
        waiting = np.flatnonzero(self.state == AT_COLLECTIVE)
        if len(waiting):
            inside = np.isin(self.block_of[waiting], self.block_of[threads])
            self.state[waiting[inside]] = RUNNING

    def whole_warps(self, m, what: str) -> np.ndarray:
        """[warps, 32] thread indices; a fault where a warp is not complete."""
        if m is None:
            return self.all.reshape(-1, 32)
        if len(m) % 32 == 0:
            rows = m.reshape(-1, 32)
            if (rows[:, 0] % 32 == 0).all() and (rows[:, 31] - rows[:, 0] == 31).all():
                return rows
        counts = np.bincount(m >> 5)
        warp = int(np.flatnonzero((counts > 0) & (counts < 32))[0])
        missing = 32 - int(counts[warp])
        raise Fault(f"{what} by a partial warp: {missing} of its lanes are elsewhere", warp * 32)

    def shared_address(self, operand: Address, modifiers, line=None):
        """A function of m giving shared addresses, from a shared or a generic address."""
        space, get = self.address(operand, line)
        if space == "shared" or any(x.startswith("shared") for x in modifiers):
            return get
        return lambda m: get(m) - memory.SHARED_WINDOW


def _typed(row, element: str, lanes: int, register, line):
    """A view of a register row as another type of the same size, or of its low bytes."""
    dtype = DTYPES.get(element)
    if dtype is None:
        raise PtxError(f"unknown type .{element}", line)
    if (row.dtype == bool) != (element == "pred"):
        raise PtxError(f"a predicate and .{element} do not mix ({register})", line)
    need = dtype.itemsize * lanes
    if row.dtype.itemsize < need:
        raise PtxError(f"{register} is narrower than .{element}", line)
    if lanes > 1:
        view = row.view(dtype).reshape(len(row), -1)
        return view[:, :lanes]
    view = row.view(dtype)
    return view if row.dtype.itemsize == need else view[:: row.dtype.itemsize // need]


def operand_items(operand) -> tuple:
    """A vector's items, or the operand alone."""
    if isinstance(operand, Vector):
        return operand.items
    return (operand.first, operand.second) if isinstance(operand, Pair) else (operand,)
