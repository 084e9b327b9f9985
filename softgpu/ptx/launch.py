# SPDX-License-Identifier: Apache-2.0
"""Module, Kernel, Run: from PTX text to a finished launch."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, field

import numpy as np

from . import limits
from .batch import Batch
from .counters import Counters
from .errors import PtxError
from .executor import Executor
from .isa import compile_instruction, find
from .isa.load_store import parse as parse_access
from .memory import GlobalMemory, Struct, interval
from .parser import Parser, resolve_labels
from .shared import BASE
from .syntax import SIZES, Address, Function, Symbol, Vector
from .tensor_map import TensorMap

BATCH_THREADS = 1024  # NumPy is at its best with rows of about this length
MAX_STEPS = 50_000_000
# Batches run one after the other; one that runs long, as where it waits for a later block, goes on
# in turns with at most this many others, this many instructions each.
TURN, RESIDENT = 50_000, 64


@dataclass
class Layout:
    """Where a kernel's own variables lie: symbol -> (space, address), and sizes in bytes."""

    symbols: dict[str, tuple[str, int]] = field(default_factory=dict)
    shared: int = 0
    local: int = 0
    dynamic: int = 0


@dataclass(frozen=True)
class Run:
    """A finished launch. `lines`: PTX line -> warp instructions issued there, where not 0."""

    counters: Counters
    blocks: int
    lines: dict[int, int]


class Module:
    """Parsed PTX.

    Args:
        text: the PTX of one compilation.
        strict: look for unknown instructions in every kernel now, not when one is launched.
    Raises: PtxError naming an unknown directive or instruction and its line.
    Example: ptx.Module(text).kernel("conv").launch((7, 1, 1), (128, 1, 1), [x, y], 65536)
    """

    def __init__(self, text: str, strict: bool = True):
        parser = Parser(text)
        self.text, self.target = text, parser.target
        self.functions, self.variables = parser.functions, parser.variables
        self._storage = {
            v.name: np.frombuffer(bytearray((v.initial or b"").ljust(v.size, b"\0")), np.uint8)
            for v in self.variables.values()
            if v.space in ("global", "const") and v.size
        }
        if strict:
            for _, error in self.problems():
                raise error

    @property
    def kernels(self) -> dict[str, Function]:
        return {f.name: f for f in self.functions.values() if f.entry and f.defined}

    def problems(self):
        """(instruction or None, PtxError) of everything in the kernels that is not supported."""
        for function in self.kernels.values():
            if reason := limits.clusters(function):
                yield None, PtxError(reason, function.line)
            known = [ins for ins in function.body if find(ins.opcode)]
            for ins in function.body:
                if not find(ins.opcode):
                    yield ins, PtxError(f"unknown instruction {ins.opcode}", ins.line)
            yield from Kernel(self, function).try_build(known)

    def kernel(self, name: str) -> Kernel:
        """The kernel of this name, or the only one whose name contains it."""
        names = list(self.kernels)
        found = [name] if name in names else [n for n in names if name in n]
        if len(found) != 1:
            raise PtxError(
                f"kernel {name!r} is {'not' if not found else 'not the only one'} in {names}"
            )
        return Kernel(self, self.functions[found[0]])


class Kernel:
    """One kernel of a module, from `Module.kernel`; `params` is its (offset, size, type) list."""

    def __init__(self, module: Module, function: Function):
        self.module, self.function, self.name = module, function, function.name
        self.params = self._param_layout()

    def _param_layout(self) -> list[tuple[int, int, str]]:
        """(offset, size, type) of every parameter."""
        offset, out = 0, []
        for p in self.function.params:
            offset = -(-offset // p.align) * p.align
            out.append((offset, p.size, p.type))
            offset += p.size
        return out

    def _layout(self, shared_bytes: int) -> Layout:
        layout = Layout(dynamic=shared_bytes)
        used = {s for ins in self.function.body for s in _symbols(ins.operands)}
        variables = [v for v in self.module.variables.values() if v.name in used]
        variables += list(self.function.variables.values())
        for v in variables:
            if v.space == "shared" and not v.extern and v.size:
                layout.shared = -(-layout.shared // v.align) * v.align
                layout.symbols[v.name] = ("shared", BASE + layout.shared)
                layout.shared += v.size
            elif v.space == "param":  # of a call
                layout.symbols[v.name] = ("param", 0)
            elif v.space == "local":
                layout.local = -(-layout.local // v.align) * v.align
                layout.symbols[v.name] = ("local", layout.local)
                layout.local += v.size
            elif v.space in ("global", "const") and v.size:
                address = interval(self.module._storage[v.name]).low
                layout.symbols[v.name] = (v.space, address)
        dynamic = [v for v in variables if v.space == "shared" and (v.extern or not v.size)]
        if dynamic:
            align = max(16, *(v.align for v in dynamic))
            layout.shared = -(-layout.shared // align) * align
        for v in dynamic:
            layout.symbols[v.name] = ("shared", BASE + layout.shared)
        layout.shared += shared_bytes
        for (offset, _, _), p in zip(self.params, self.function.params, strict=True):
            layout.symbols[p.name] = ("param", offset)
        return layout

    def _granule(self) -> int:
        """The smallest shared access, up to 4 bytes: the granularity of race detection."""
        smallest = 4
        for ins in self.function.body:
            if ins.name in ("ld", "st", "atom", "red") and ins.modifiers[-1] in SIZES:
                space = parse_access(ins)[0] if ins.name in ("ld", "st") else None
                if space in ("shared", None):
                    smallest = min(smallest, SIZES[ins.modifiers[-1]])
        return smallest

    def try_build(self, body):
        """(instruction, PtxError) of what cannot be bound; nothing is run."""
        layout = self._layout(0)
        size = max((o + s for o, s, _ in self.params), default=0)
        batch = self._batch(
            np.zeros((1, 3), int),
            (128, 1, 1),
            (1, 1, 1),
            np.zeros(size, np.uint8),
            layout,
            GlobalMemory([], Counters()),
            Counters(),
        )
        batch.labels, batch.executor = resolve_labels(self.function), None
        for i, ins in enumerate(body):
            batch.building = i
            try:
                compile_instruction(batch, ins, i)
            except PtxError as error:
                yield ins, error

    def _batch(self, blocks, block, grid, params, layout, memory, counters) -> Batch:
        return Batch(
            self.function,
            blocks,
            block,
            grid,
            params,
            (layout.shared, self._granule()),
            memory,
            counters,
            layout,
            layout.symbols,
        )

    def launch(
        self, grid, block, args, shared_bytes: int = 0, blocks=None, max_steps: int = MAX_STEPS
    ) -> Run:
        """Run the kernel to its end.

        Args:
            grid, block: extents (x, y, z), or an int.
            args: one for each parameter: NumPy arrays and CPU tensors (passed by address, changed
                in place), ints, floats, None (a null pointer), TensorMap, bytes for a struct, or
                Struct where it holds addresses.
                Trailing 8-byte parameters may be left out and are null: Triton's scratch pointers.
            shared_bytes: dynamic shared memory of a block.
            blocks: block indices (x, y, z), or x, to run instead of the whole grid.
            max_steps: instructions of one batch of blocks after which it is taken for endless.
        Returns: Run, with exact counters.
        Raises: PtxError at the first fault, with kernel, line, block and thread; ValueError for
            arguments that do not fit the parameters, and where a GPU would refuse the launch.
        """
        grid, block = _extents(grid), _extents(block)
        layout = self._layout(shared_bytes)
        limits.check_launch(self.function, self.module.target, grid, block, layout.shared)
        if reason := limits.clusters(self.function):
            raise PtxError(reason, self.function.line, self.name)
        arrays = [a for a in args if _is_array(a)]
        arrays += [a.array for a in args if isinstance(a, TensorMap)]
        arrays += [array for a in args if isinstance(a, Struct) for array in a.arrays]
        used = {s for ins in self.function.body for s in _symbols(ins.operands)}
        arrays += [a for name, a in self.module._storage.items() if name in used]
        counters = Counters()
        memory = GlobalMemory(arrays, counters, [self.function])
        params = np.frombuffer(self._pack(args), np.uint8)
        todo = _block_list(grid, blocks)
        threads = -(-int(np.prod(block)) // 32) * 32
        step = max(1, BATCH_THREADS // threads)
        chunks = iter([todo[i : i + step] for i in range(0, len(todo), step)])
        issued = np.zeros(len(self.function.body), np.int64)
        resident: list[Executor] = []
        while True:
            if len(resident) < RESIDENT and (chunk := next(chunks, None)) is not None:
                batch = self._batch(chunk, block, grid, params, layout, memory, counters)
                resident.append(Executor(batch, max_steps))
            if not resident:
                break
            for executor in [e for e in resident if e.run(TURN)]:
                issued += executor.issued
                memory.aliases.forget(executor.batch)
                resident.remove(executor)
        memory.finish()
        self._classify(issued, counters)
        lines: dict[int, int] = {}
        for ins, n in zip(self.function.body, issued, strict=True):
            if n:
                lines[ins.line] = lines.get(ins.line, 0) + int(n)
        return Run(counters, len(todo), lines)

    def _classify(self, issued, counters) -> None:
        for ins, count in zip(self.function.body, issued, strict=True):
            kind = find(ins.opcode).kind
            kind = kind(ins) if callable(kind) else kind
            if kind in ("load", "store", "atomic"):
                spaces = ("global", "shared", "local", "param", "const")
                base = [x.split("::")[0] for x in ins.modifiers]
                kind += " " + next((s for s in spaces if s in base), "generic")
            if count:
                counters.instructions[kind] = counters.instructions.get(kind, 0) + int(count)

    def _pack(self, args) -> bytes:
        missing = len(self.params) - len(args)
        spare = self.params[len(args) :]
        if missing < 0 or any(size != 8 for _, size, _ in spare):
            raise ValueError(
                f"{self.name}: {len(args)} arguments for {len(self.params)} parameters "
                f"{[f'{t}[{s}]' for _, s, t in self.params]}"
            )
        data = bytearray(max((o + s for o, s, _ in self.params), default=0))
        for i, ((offset, size, kind), arg) in enumerate(zip(self.params, args, strict=False)):
            data[offset : offset + size] = self._argument(i, arg, size, kind)
        return bytes(data)

    def _argument(self, i: int, arg, size: int, kind: str) -> bytes:
        if arg is None:
            return bytes(size)
        if isinstance(arg, TensorMap):
            raw = arg.encode()
        elif isinstance(arg, Struct):
            raw = arg.data
        elif isinstance(arg, bytes | bytearray):
            raw = bytes(arg)
        elif _is_array(arg):
            raw = struct.pack("<Q", interval(arg).low)
        elif isinstance(arg, float | np.floating) or kind in ("f32", "f64"):
            raw = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], float(arg))
        elif isinstance(arg, int | np.integer | np.bool_):
            raw = (int(arg) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        else:
            raise TypeError(f"{self.name}: argument {i} is a {type(arg).__name__}")
        if len(raw) != size:
            raise ValueError(f"{self.name}: argument {i} has {len(raw)} bytes, parameter {size}")
        return raw


def _is_array(arg) -> bool:
    return isinstance(arg, np.ndarray) or hasattr(arg, "untyped_storage")


def _extents(value) -> tuple[int, int, int]:
    values = (value,) if isinstance(value, int | np.integer) else tuple(value)
    return tuple(int(v) for v in (*values, 1, 1, 1)[:3])


def _block_list(grid, blocks) -> np.ndarray:
    if blocks is None:
        return np.array(
            [(x, y, z) for z, y, x in itertools.product(*(range(n) for n in reversed(grid)))]
        ).reshape(-1, 3)
    listed = np.array([(*b, 0, 0)[:3] if not isinstance(b, int) else (b, 0, 0) for b in blocks])
    if (listed >= np.array(grid)).any() or (listed < 0).any():
        raise ValueError(f"blocks {listed.tolist()} are not all in the grid {grid}")
    return listed.reshape(-1, 3)


def _symbols(operands):
    for o in operands:
        if isinstance(o, Symbol):
            yield o.name
        elif isinstance(o, Address):
            yield from _symbols((o.base, *o.coordinates))
        elif isinstance(o, Vector):
            yield from _symbols(o.items)
