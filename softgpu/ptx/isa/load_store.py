# SPDX-License-Identifier: Apache-2.0
"""ld, st, prefetch, cvta, isspacep, mapa: memory as a thread sees it."""

from __future__ import annotations

import numpy as np

from ..batch import operand_items
from ..errors import Fault, PtxError
from ..memory import GLOBAL_BASE, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from ..syntax import SIZES, Address, Symbol
from ..values import DTYPES
from .calls import is_argument, load_argument, store_argument
from .registry import at, instruction, put

_SPACES = ("global", "shared", "local", "param", "const")
_IGNORED = {  # caching and ordering: one copy of memory, updated in program order
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "volatile", "relaxed", "acquire", "release"),
    *("weak", "cta", "cluster", "gpu", "sys", "mmio", "L1::evict_normal", "L1::evict_unchanged"),
    *("L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::cache_hint", "L2::64B"),
    *("L2::128B", "L2::256B", "L2::evict_last", "L2::evict_normal", "L2::evict_first", "unified"),
}
WINDOWS = {"param": PARAM_WINDOW, "local": LOCAL_WINDOW, "shared": SHARED_WINDOW}


def parse(ins) -> tuple[str | None, int, str]:
    """(space, lanes, element type) from the modifiers of a load or store."""
    space, lanes, kind = None, 1, None
    for modifier in ins.modifiers:
        base = modifier.split("::")[0]
        if base in _SPACES and modifier not in _IGNORED:
            space = base
        elif modifier in ("v2", "v4", "v8"):
            lanes = int(modifier[1])
        elif modifier in SIZES:
            kind = modifier
        elif modifier not in _IGNORED:
            raise PtxError(f"unknown modifier .{modifier} of {ins.opcode}", ins.line)
    return space, lanes, kind


@instruction("ld", "ldu", kind="load")
def load(batch, ins):
    space, lanes, kind = parse(ins)
    named, address = batch.address(ins.operands[1], ins.line)
    unit = SIZES[kind]
    outs = operand_items(ins.operands[0])
    puts = [batch.extending_write(o, kind, ins.line) for o in outs]
    read = reader(batch, space or (named if named == "const" else None), "nc" in ins.modifiers)
    if is_argument(batch, space, ins.operands[1].base):
        get = load_argument(batch, ins.operands[1], unit, lanes)

        def read(a, m, unit, lanes):
            return get(m)

    element = np.dtype(f"i{unit}" if kind[0] == "s" else f"u{unit}")
    kinds = [(p, element if kind[0] in "sub" else DTYPES[kind]) for p in puts]

    def run(m):
        data = read(address(m), m, unit, lanes)
        for lane, (write, dtype) in enumerate(kinds):
            write(m, np.ascontiguousarray(data[:, lane]).view(dtype))

    return run


@instruction("st", kind="store", writes=())
def store(batch, ins):
    space, _, kind = parse(ins)
    base = ins.operands[0].base
    unit = SIZES[kind]
    items = operand_items(ins.operands[1])
    sources = [batch.read(o, kind, ins.line).view(f"u{unit}") for o in items]
    if is_argument(batch, space, base):
        return store_argument(batch, ins.operands[0], sources)
    _, address = batch.address(ins.operands[0], ins.line)
    write = writer(batch, space)

    def run(m):
        write(address(m), m, np.stack([at(s, m) for s in sources], axis=1))
        batch.progress += 1

    return run


# --- spaces -----------------------------------------------------------------------------------


def reader(batch, space: str | None, constant: bool = False):
    """read(address, m, unit, lanes) -> [n, lanes] for a state space, or for generic addresses."""
    if space in ("global", "const"):
        return lambda a, m, unit, lanes: batch.globals.load(
            a, m, unit, lanes, constant=constant and batch.globals.aliases.watched
        )
    if space == "shared":
        return lambda a, m, unit, lanes: batch.shared.load(a, batch.indices(m), unit, lanes)
    if space == "param":
        return lambda a, m, unit, lanes: _load_param(batch, a, unit, lanes)
    if space == "local":
        return lambda a, m, unit, lanes: _load_local(batch, a, batch.indices(m), unit, lanes)

    def generic(a, m, unit, lanes):
        out = np.zeros((len(a), lanes), f"u{unit}")
        for name, pick in _by_window(a):
            threads = batch.indices(m)[pick]
            base = WINDOWS.get(name, 0)
            out[pick] = reader(batch, name)(a[pick] - base, threads, unit, lanes)
        return out

    return generic


def writer(batch, space: str | None):
    """write(address, m, data [n, lanes]) for a state space, or for generic addresses."""
    if space == "global":
        return lambda a, m, data: batch.globals.store(a, m, data)
    if space == "shared":
        return lambda a, m, data: batch.shared.store(a, batch.indices(m), data)
    if space == "local":
        return lambda a, m, data: _store_local(batch, a, batch.indices(m), data)
    if space is not None:
        raise PtxError(f"a store to .{space} is not supported")

    def generic(a, m, data):
        for name, pick in _by_window(a):
            if name == "param":
                raise Fault("store to the kernel's parameters", int(batch.indices(m)[pick][0]))
            threads = batch.indices(m)[pick]
            writer(batch, name)(a[pick] - WINDOWS.get(name, 0), threads, data[pick])

    return generic


def _by_window(address):
    """(space, mask) of every space that the generic addresses name."""
    window = np.where(address >= GLOBAL_BASE, 0, address >> 32)
    for value in np.unique(window):
        name = {1: "param", 2: "local", 3: "shared"}.get(int(value), "global")
        yield name, window == value


def _check(address, low: int, high: int, size: int, threads, what: str) -> None:
    bad = (address < low) | (address + size > high)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise Fault(
            f"out-of-bounds {what} of {size} bytes at offset {int(address[i])} of {high} bytes",
            None if threads is None else int(threads[i]),
        )
    if (address & (size - 1)).any():
        i = int(np.flatnonzero(address & (size - 1))[0])
        raise Fault(
            f"misaligned {what} of {size} bytes at offset {int(address[i])}",
            None if threads is None else int(threads[i]),
        )


def _load_param(batch, address, unit, lanes):
    size = unit * lanes
    _check(address, 0, len(batch.params), size, None, "parameter load")
    where = address[:, None] + np.arange(size)
    return batch.params[where].view(f"u{unit}")


def _load_local(batch, address, threads, unit, lanes):
    size = unit * lanes
    _check(address, 0, batch.layout.local, size, threads, "local load")
    where = address[:, None] + np.arange(size)
    fresh = ~batch.local_written[threads[:, None], where].all(axis=1)
    if fresh.any():
        raise Fault(
            "local load of bytes that nothing wrote", int(threads[np.flatnonzero(fresh)[0]])
        )
    batch.counters.local_bytes += size * len(address)
    return batch.local[threads[:, None], where].view(f"u{unit}")


def _store_local(batch, address, threads, data):
    size = data.dtype.itemsize * data.shape[1]
    _check(address, 0, batch.layout.local, size, threads, "local store")
    where = address[:, None] + np.arange(size)
    batch.local[threads[:, None], where] = np.ascontiguousarray(data).view(np.uint8)
    batch.local_written[threads[:, None], where] = True
    batch.counters.local_bytes += size * len(address)


# --- addresses --------------------------------------------------------------------------------


@instruction("cvta", kind="integer")
def convert_address(batch, ins):
    """Space addresses and generic addresses differ by the base of the space's window."""
    to_space = "to" in ins.modifiers
    space = next((s.split("::")[0] for s in ins.modifiers if s.split("::")[0] in _SPACES), None)
    shift = WINDOWS.get(space, 0) * (-1 if to_space else 1)
    kind = ins.modifiers[-1]
    out, source = batch.write(ins.operands[0], kind, ins.line), ins.operands[1]
    address = source if isinstance(source, Address | Symbol) else None
    value = batch.read(address or source, kind, ins.line)
    offset = np.array(shift % (1 << 8 * SIZES[kind]), value.dtype)
    return lambda m: put(out, m, at(value, m) + offset)


@instruction("isspacep", kind="integer")
def is_space(batch, ins):
    out, a = batch.write(ins.operands[0], "pred"), batch.read(ins.operands[1], "u64", ins.line)
    space = ins.modifiers[0].split("::")[0]
    window = WINDOWS.get(space, 0) >> 32

    def run(m):
        where = np.where(at(a, m) >= GLOBAL_BASE, 0, at(a, m) >> np.uint64(32))
        put(out, m, where == window)

    return run


@instruction("mapa", kind="integer")
def map_to_cluster(batch, ins):
    """The address in another block of the cluster; clusters have one block here."""
    kind = ins.modifiers[-1]
    out, a = batch.write(ins.operands[0], kind), batch.read(ins.operands[1], kind, ins.line)
    rank = batch.read(ins.operands[2], "u32", ins.line)

    def run(m):
        if at(rank, m).any():
            raise Fault("mapa to a block outside the cluster of one", int(batch.indices(m)[0]))
        put(out, m, at(a, m))

    return run


@instruction("getctarank", kind="integer")
def cluster_rank(batch, ins):
    out = batch.write(ins.operands[0], "u32")
    return lambda m: put(out, m, 0)


@instruction("prefetch", "prefetchu", "applypriority", "discard", kind="prefetch", writes=())
def prefetch(batch, ins):
    """No effect on values; a tensor map's prefetch takes any address."""
    return lambda m: None


@instruction("createpolicy", kind="integer")
def create_policy(batch, ins):
    out = batch.write(ins.operands[0], "b64")
    return lambda m: put(out, m, 0)
