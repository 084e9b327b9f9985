# SPDX-License-Identifier: Apache-2.0
"""Global memory: virtual addresses of host arrays, with bounds.

Every host buffer gets a virtual base aligned to 512 bytes, as an allocator on a GPU would give it,
so that sector counts do not depend on where the host put the array. A slice keeps its offset in
its buffer; only the bytes that a passed array spans may be touched.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from dataclasses import dataclass

import numpy as np

from .aliases import Aliases
from .errors import Fault
from .shared import turns

PARAM_WINDOW, LOCAL_WINDOW, SHARED_WINDOW = 1 << 32, 2 << 32, 3 << 32  # generic addresses, 4 GiB
GLOBAL_BASE = 1 << 40
_ALIGNMENT, _GAP = 512, 1 << 16  # a run past the end must not meet the next allocation


@dataclass
class _Buffer:
    base: int  # virtual
    pointer: int  # host
    size: int


@dataclass
class Interval:
    """Bytes [low, high) of one buffer that a launch may touch."""

    low: int
    high: int
    buffer: _Buffer
    writable: bool


_buffers: dict[tuple[int, int], _Buffer] = {}
_published: dict[int, Interval] = {}  # by id of the object that address_of was given
_next_base = GLOBAL_BASE


def _span(array) -> tuple[int, int, int, int, bool]:
    """(buffer pointer, buffer size, first byte, end byte, writable) of an array or CPU tensor."""
    if hasattr(array, "untyped_storage"):
        if array.device.type != "cpu":
            raise TypeError(f"the PTX machine takes CPU tensors, got one on {array.device}")
        storage = array.untyped_storage()
        item, strides = array.element_size(), array.stride()
        first = array.data_ptr()
        extent = sum((n - 1) * s for n, s in zip(array.shape, strides, strict=True)) * item + item
        extent = extent if array.numel() else 0
        return storage.data_ptr(), storage.nbytes(), first, first + extent, True
    if not isinstance(array, np.ndarray):
        raise TypeError(f"expected a NumPy array or a CPU tensor, got {type(array).__name__}")
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    low, high = np.lib.array_utils.byte_bounds(array)
    root_low, root_high = np.lib.array_utils.byte_bounds(root)
    return root_low, root_high - root_low, low, high if array.size else low, array.flags.writeable


def interval(array) -> Interval:
    """The virtual address range of an array; the same array has the same one in every launch."""
    global _next_base
    pointer, size, low, high, writable = _span(array)
    buffer = _buffers.get((pointer, size))
    if buffer is None:
        buffer = _buffers[pointer, size] = _Buffer(_next_base, pointer, size)
        _next_base += -(-(size + _GAP) // _ALIGNMENT) * _ALIGNMENT
    shift = buffer.base - pointer
    return Interval(low + shift, high + shift, buffer, writable)


def address_of(array, publish: bool = True) -> int:
    """The address that `array` has on the machine, for programs that build parameter blocks.

    Args: array, a NumPy array or a CPU tensor of any dtype and strides; publish, whether every
        launch may touch the array as long as the object passed here lives. Without it only a
        launch that is given the array may, as one of its arguments or in a `Struct`.
    Returns: the 64-bit virtual address of its first element.
    Raises: TypeError for anything else.
    Example: struct.pack("<QQi", ptx.address_of(x), ptx.address_of(y), x.size)
    """
    entry = interval(array)
    if not publish:
        return entry.low
    if id(array) not in _published:
        weakref.finalize(array, _published.pop, id(array), None)
    _published[id(array)] = entry
    return entry.low


@dataclass(frozen=True, eq=False)
class Struct:
    """An argument that is a struct: its bytes, and the arrays whose addresses they contain.

    Example: Struct(struct.pack("<Qi", address_of(x, publish=False), x.size), (x,))
    """

    data: bytes
    arrays: tuple


def sparse_array(shape, dtype) -> np.ndarray:
    """An array of zeros that takes memory only where it is touched: more than 2^31 elements fit.

    Args: shape, a tuple of ints; dtype, any NumPy dtype.
    Returns: a writable contiguous array.
    Example: x = ptx.sparse_array((1 << 15, 56, 56, 64), np.float16)
    """
    count = int(np.prod(shape, dtype=np.int64))
    size = max(count * np.dtype(dtype).itemsize, 1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype, count).reshape(shape)


class GlobalMemory:
    """What one launch may touch: its array arguments, published arrays, the module's variables."""

    def __init__(self, arrays, counters, functions=()):
        found = [interval(a) for a in arrays] + list(_published.values())
        found = [i for i in found if i.high > i.low]
        found.sort(key=lambda i: i.low)
        self.intervals: list[Interval] = []
        for item in found:
            last = self.intervals[-1] if self.intervals else None
            if last and item.low < last.high and item.writable == last.writable:
                last.high = max(last.high, item.high)
            else:
                self.intervals.append(Interval(item.low, item.high, item.buffer, item.writable))
        self.low = np.array([i.low for i in self.intervals], np.int64)
        self.high = np.array([i.high for i in self.intervals], np.int64)
        self.counters = counters
        self.aliases = Aliases(functions, lambda size: sparse_array((size,), np.uint8))
        self._views: dict[tuple, np.ndarray] = {}
        self._sectors: dict[tuple[str, int], np.ndarray] = {}
        self._recent = 0

    def _locate(self, address: np.ndarray, size: int, threads, what: str):
        """Interval index of every address, or one int where all lie in the same."""
        if address.size == 0:
            return 0
        low, high = int(address.min()), int(address.max()) + size
        if low % size or (np.bitwise_or.reduce(address) & (size - 1)):
            i = int(np.flatnonzero(address & (size - 1))[0])
            raise Fault(
                f"misaligned {what} of {size} bytes at 0x{int(address[i]):x}", _thread(threads, i)
            )
        if self.intervals:
            recent = self.intervals[self._recent]
            if low >= recent.low and high <= recent.high:
                return self._recent
            where = np.searchsorted(self.low, address, "right") - 1
            bad = (where < 0) | (address + size > self.high[where])
        else:
            where, bad = None, np.ones(address.shape, bool)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise Fault(
                f"out-of-bounds {what} of {size} bytes at 0x{int(address[i]):x}"
                + self._nearest(int(address[i])),
                _thread(threads, i),
            )
        if (where == where[0]).all():
            self._recent = int(where[0])
            return self._recent
        return where

    def _nearest(self, address: int) -> str:
        if not self.intervals:
            return "; the launch was given no array"
        distance = [max(i.low - address, address - i.high + 1) for i in self.intervals]
        near = self.intervals[int(np.argmin(distance))]
        side = (
            f"{near.low - address} bytes before"
            if address < near.low
            else (f"{address - near.high} bytes past the end of")
        )
        return f", {side} the array at 0x{near.low:x} of {near.high - near.low} bytes"

    def view(self, where: int, unit: int, lanes: int) -> tuple[np.ndarray, int]:
        """(typed rows of one buffer, its virtual base): [count, lanes] of unsigned `unit` bytes."""
        buffer = self.intervals[where].buffer
        key = (buffer.base, unit, lanes)
        if key not in self._views:
            count = buffer.size // (unit * lanes)
            raw = (ctypes.c_uint8 * (count * unit * lanes)).from_address(buffer.pointer)
            self._views[key] = np.frombuffer(raw, f"u{unit}").reshape(count, lanes)
        return self._views[key], buffer.base

    def load(
        self, address, threads, unit: int, lanes: int = 1, what="global load", constant=False
    ) -> np.ndarray:
        """Gather [n, lanes] elements; counts bytes, requests, sectors. constant: ld.global.nc."""
        size = unit * lanes
        where = self._locate(address, size, threads, what)
        self.count("load", address, threads, size)
        if constant:
            for buffer, pick, _ in self._by_interval(where, address):
                mine = threads if threads is None else threads[pick]
                self.aliases.load_constant(buffer, address[pick], size, mine)
        if isinstance(where, int):
            view, base = (
                self.view(where, unit, lanes) if address.size else (np.zeros((1, lanes)), 0)
            )
            return view[(address - base) // size]
        out = np.empty((len(address), lanes), f"u{unit}")
        for _, pick, one in self._by_interval(where, address):
            view, base = self.view(one, unit, lanes)
            out[pick] = view[(address[pick] - base) // size]
        return out

    def string(self, address: int, thread: int) -> str:
        """Of at most 4096 bytes, up to a zero; nothing is counted."""
        where = self._locate(np.array([address]), 1, np.array([thread]), "string")
        view, base = self.view(where, 1, 1)
        end = min(address + 4096, self.intervals[where].high) - base
        return view[address - base : end].tobytes().split(b"\0")[0].decode(errors="replace")

    def store(self, address, threads, data: np.ndarray, what="global store") -> None:
        """Scatter data [n, lanes]; of two threads that write one address the later wins."""
        unit, lanes = data.dtype.itemsize, data.shape[1]
        size = unit * lanes
        where = self._locate(address, size, threads, what)
        self.count("store", address, threads, size)
        self.claim(where, address, size, threads, what)
        for _, pick, one in self._by_interval(where, address):
            view, base = self.view(one, unit, lanes)
            view[(address[pick] - base) // size] = data[pick]

    def claim(self, where, address, size: int, threads, what: str) -> None:
        """Raise a fault unless the launch may write here now."""
        for buffer, pick, one in self._by_interval(where, address):
            mine = threads if threads is None else threads[pick]
            if not self.intervals[one].writable:
                raise Fault(f"{what} into a read-only array", _thread(mine, 0))
            self.aliases.store(buffer, address[pick], size, mine, what)

    def _by_interval(self, where, address):
        """(buffer, selection of the addresses, interval index) of every interval they lie in."""
        if isinstance(where, int):
            if address.size:
                yield self.intervals[where].buffer, slice(None), where
            return
        for one in np.unique(where):
            yield self.intervals[one].buffer, where == one, int(one)

    def atomic(self, address, threads, unit: int, lanes: int, returns: bool):
        """(get(pick), put(pick, data), turns) of one atomic instruction; counted once."""
        size = unit * lanes
        where = self._locate(address, size, threads, "global atomic")
        if not isinstance(where, int):
            raise Fault("one atomic on several arrays is not supported", _thread(threads, 0))
        self.claim(where, address, size, threads, "global atomic")
        if returns:
            self.count("load", address, threads, size)
        self.count("store", address, threads, size)
        view, base = self.view(where, unit, lanes)
        index = (address - base) // size

        def put(pick, data):
            view[index[pick]] = data

        return (lambda pick: view[index[pick]]), put, turns(address)

    def count(self, kind: str, address, threads, size: int) -> None:
        """Requests are warps, sectors the distinct 32-byte pieces of each request."""
        if len(address) == 0:
            return
        sector = address >> 5
        warp = (np.arange(len(address)) if threads is None else threads) >> 5
        # Allocations lie below 2^45, sectors below 2^40: the warp fits above them in 63 bits.
        keys = np.unique(sector | (warp << 41))
        requests = np.count_nonzero(np.diff(keys >> 41)) + 1
        self.counters.global_access(kind, len(address) * size, int(requests), len(keys))
        self.mark(kind, keys & ((1 << 41) - 1))

    def mark(self, kind: str, sectors: np.ndarray) -> None:
        """Remember which sectors were touched."""
        while len(sectors):
            at = int(np.searchsorted(self.low, int(sectors[0]) * 32 + 31, "right")) - 1
            buffer = self.intervals[max(at, 0)].buffer
            first, end = buffer.base >> 5, (buffer.base + buffer.size + 31) >> 5
            key = (kind, buffer.base)
            if key not in self._sectors:
                self._sectors[key] = sparse_array((end - first,), np.bool_)
            inside = (sectors >= first) & (sectors < end)
            self._sectors[key][sectors[inside] - first] = True
            sectors = sectors[~inside]

    def finish(self) -> None:
        """Put the number of distinct sectors into the counters."""
        for kind in ("load", "store"):
            marks = [v for (k, _), v in self._sectors.items() if k == kind]
            self.counters.unique_sectors[kind] = sum(int(np.count_nonzero(v)) for v in marks)


def _thread(threads, i: int) -> int:
    return i if threads is None else int(threads[i])
