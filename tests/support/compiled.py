# SPDX-License-Identifier: Apache-2.0
"""Compile the project's kernels for any architecture without a GPU, read them, and run them.

A `CompiledKernel` is one launch: PTX, machine code, shape and arguments. It comes from the same
`build` that the package calls, but instead of launching the kernel on a GPU, `recorder` compiles it
and keeps the arguments. So a test of it is a test of what runs on a user's GPU.

    source (Triton, CUDA)  ->  CompiledKernel  ->  resources(), main_loop()   what the compiler made
                                               ->  run()                      what it computes

A source is a function that returns `CompiledKernel`s; the code that uses them knows no source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from resnet_fast import _hardware
from resnet_fast.kernels import add_relu, conv_bn_act
from resnet_fast.kernels.launch import Bind, Launch
from resnet_fast.spec import TileConfig
from softgpu import ptx
from tests.support import cases as problems
from tests.support import sass

WARP = 32
MACHINE_ARCHS = (80, 90)  # what the PTX machine runs


@dataclass(frozen=True)
class Resources:
    """What one block of a kernel occupies.

    Args:
        registers: 32-bit registers per thread.
        spill_bytes: bytes of local memory per thread: registers that did not fit.
        shared_bytes: static and dynamic shared memory per block.
        threads: threads per block.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int

    def blocks_per_sm(self, gpu: _hardware.Gpu) -> int:
        """Blocks that one SM of `gpu` holds at a time; zero where one does not fit."""
        if self.shared_bytes > gpu.shared_per_block:
            return 0
        registers = -(-self.registers // 8) * 8 * self.threads  # allocated in eights per thread
        limits = [gpu.max_threads_per_sm // self.threads, _hardware.REGISTERS_PER_SM // registers]
        if self.shared_bytes:
            limits.append(gpu.shared_per_sm // (self.shared_bytes + 1024))  # 1 KiB is the system's
        return min(limits)

    @property
    def occupancy(self) -> dict[str, float]:
        """For each GPU of `_hardware.GPUS`, by name: resident threads over the maximum."""
        return {
            gpu.name: self.blocks_per_sm(gpu) * self.threads / gpu.max_threads_per_sm
            for gpu in _hardware.GPUS.values()
        }


@dataclass(frozen=True, eq=False)
class CompiledKernel:
    """One launch of one kernel, compiled for one architecture.

    Args:
        name: the kernel's function name.
        arch: compute capability times ten.
        ptx, cubin: the compiler's output.
        grid: blocks along the three axes.
        block: threads along the three axes.
        shared_bytes: dynamic shared memory per block.
        args: the arguments that the PTX takes, in order: CPU tensors, ints, floats; empty where the
            launch was compiled without any.
    """

    name: str
    arch: int
    ptx: str
    cubin: bytes
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    args: tuple = ()

    def run(self, blocks=None, text: str | None = None) -> ptx.Run:
        """Run on the PTX machine: tensors among `args` change in place.

        Args:
            blocks: block indices to run instead of the whole grid.
            text: PTX to run instead of the kernel's own: a mutant of it.

        Raises:
            ptx.PtxError: at the first fault. ValueError: the kernel has no arguments.
        """
        if not self.args:
            raise ValueError(f"{self.name}: compiled without arguments, so it cannot be run")
        module = ptx.Module(text or self.ptx, strict=False)  # the launch is strict
        kernel = module.kernel(self.name)
        return kernel.launch(self.grid, self.block, self.args, self.shared_bytes, blocks)

    def resources(self) -> Resources:
        """Registers, spills and shared memory, from the resource section of the cubin."""
        used = sass.resource_usage(self.cubin)
        return Resources(
            registers=used["REG"],
            spill_bytes=used["STACK"] + used["LOCAL"],
            shared_bytes=self.shared_bytes + (used["SHARED"] if self.arch < 90 else 0),
            threads=self.block[0],
        )

    def sass(self) -> str:
        """The disassembled machine code."""
        return sass.disassemble(self.cubin)

    def opcodes(self) -> Counter:
        """How often each SASS opcode occurs in the kernel, modifiers included."""
        return Counter(map(sass.opcode, sass.instructions(self.sass())[0]))

    def main_loop(self) -> sass.MainLoop | None:
        """The innermost loop with tensor-core instructions; None where there is none.

        Raises:
            ValueError: there are several.
        """
        loops = sass.tensor_loops(self.sass())
        if len(loops) > 1:
            raise ValueError(f"{self.name} for sm_{self.arch} has {len(loops)} tensor loops, not 1")
        return loops[0] if loops else None


def compile_launch(launch: Launch, arch: int, leading: tuple = ()) -> CompiledKernel:
    """Compile one `Launch` for compute capability `arch` (90 for 9.0), without a GPU.

    Args:
        leading: the launch's leading arguments; without them the kernel cannot be run.
    """
    compiled = launch.compile(arch)
    signature = launch.source().signature
    values = dict(zip(signature, (*leading, *launch.trailing), strict=True)) if leading else {}
    return CompiledKernel(
        name=compiled.name,
        arch=arch,
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
        grid=launch.grid,
        block=(WARP * compiled.metadata.num_warps, 1, 1),
        shared_bytes=compiled.metadata.shared,
        args=tuple(value for name, value in values.items() if signature[name] != "constexpr"),
    )


def recorder(kernels: list[CompiledKernel]) -> Bind:
    """A stand-in for `Launch.bind`: what is launched is compiled and appended to `kernels`."""

    def bind(launch: Launch, arch: int) -> Callable[..., None]:
        return lambda *leading: kernels.append(compile_launch(launch, arch, leading))

    return bind


def conv_kernels(
    tensors: problems.ConvTensors, tile: TileConfig, arch: int
) -> list[CompiledKernel]:
    """What `conv_bn_act` launches on `tensors`, in order: one kernel, or two with SPLIT_K > 1."""
    kernels: list[CompiledKernel] = []
    t = tensors
    operands = conv_bn_act.operands(
        t.x, t.weight, t.scale, t.shift, t.mean, t.var, t.residual, t.out
    )
    launch = conv_bn_act.build(t.spec, tile, operands, arch=arch, bind=recorder(kernels))
    launch(t.x, t.weight, t.scale, t.shift, t.mean, t.var, t.eps, t.residual, t.out)
    return kernels


def add_relu_kernels(
    x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, arch: int
) -> list[CompiledKernel]:
    """What `add_relu` launches on tensors of one shape and dtype."""
    kernels: list[CompiledKernel] = []
    aligned = add_relu.is_aligned(x, y, out)
    launch = add_relu.build(x.numel(), x.dtype, aligned, arch=arch, bind=recorder(kernels))
    launch(x, y, out)
    return kernels


def cases(
    archs: Iterable[int] = MACHINE_ARCHS, families: Iterable[str] = ()
) -> Iterator[CompiledKernel]:
    """Every op, tile and architecture that the PTX machine runs, at shapes small enough to run.

    Args:
        archs: compute capabilities times ten.
        families: names of `families.FAMILIES`; all of them if empty.

    Raises:
        RuntimeError: a family of the CUDA C++ kernels, where nvcc is missing.

    Example:
        >>> kernels = cases((80,), ("triton conv_bn_act", "cuda conv_bn_act"))
        >>> [kernel.resources().registers for kernel in kernels]
    """
    from tests.support.families import FAMILIES

    for arch in archs:
        for name in families or FAMILIES:
            for work in FAMILIES[name](arch):
                yield from work.compile()
