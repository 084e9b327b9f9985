# SPDX-License-Identifier: Apache-2.0
"""Compile the project's kernels for any architecture without a GPU, and read what came out.

A `CompiledKernel` holds the PTX and the machine code (cubin) of one launch, made from the very
`Launch` that the package would run, so a test of it is a test of what a user's GPU gets.
The disassembler and the resource dump are those that Triton's wheel carries.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

from resnet_fast import _hardware
from resnet_fast.kernels.launch import Launch

WARP = 32


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


@dataclass(frozen=True)
class MainLoop:
    """SASS statistics of the innermost loop that holds tensor-core instructions.

    Args:
        instructions: SASS instructions of one iteration.
        mma: tensor-core instructions among them.
        opcodes: how often each opcode occurs, modifiers included.
    """

    instructions: int
    mma: int
    opcodes: dict[str, int]

    @property
    def per_mma(self) -> float:
        """Instructions issued for each tensor-core instruction, that one included."""
        return self.instructions / self.mma


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel, compiled for one architecture, with the shape of its launch.

    Args:
        name: the kernel's function name.
        arch: compute capability times ten.
        ptx, cubin: the compiler's output.
        grid: blocks along the three axes.
        block: threads along the three axes.
        shared_bytes: dynamic shared memory per block.
    """

    name: str
    arch: int
    ptx: str
    cubin: bytes
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int

    def resources(self) -> Resources:
        """Registers, spills and shared memory, from the resource section of the cubin."""
        text = run_tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", self.cubin)
        used = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)\b", text)}
        return Resources(
            registers=used["REG"],
            spill_bytes=used["STACK"] + used["LOCAL"],
            shared_bytes=self.shared_bytes + (used["SHARED"] if self.arch < 90 else 0),
            threads=self.block[0],
        )

    def sass(self) -> str:
        """The disassembled machine code."""
        return run_tool(knobs.nvidia.nvdisasm.path, "-c", self.cubin)

    def opcodes(self) -> Counter:
        """How often each SASS opcode occurs in the kernel, modifiers included."""
        return Counter(map(opcode, instructions(self.sass())[0]))

    def main_loops(self) -> list[MainLoop]:
        """Every innermost loop with tensor-core instructions, in program order."""
        return tensor_loops(self.sass())


def compile_launch(launch: Launch, arch: int) -> CompiledKernel:
    """Compile one `Launch` for compute capability `arch` (90 for 9.0), without a GPU."""
    compiled = launch.compile(arch)
    return CompiledKernel(
        name=compiled.name,
        arch=arch,
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
        grid=launch.grid,
        block=(WARP * compiled.metadata.num_warps, 1, 1),
        shared_bytes=compiled.metadata.shared,
    )


def run_tool(tool: str, option: str, cubin: bytes) -> str:
    """Run one of the CUDA binary tools on a cubin and return what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True)
    return done.stdout


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a disassembly in order, and the index that each label stands for."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            found.append(instruction[1])
    return found, labels


def opcode(instruction: str) -> str:
    """`@!P0 LDGSTS.E.128 [R1], ...` -> `LDGSTS.E.128`."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def is_mma(code: str) -> bool:
    """Whether a SASS opcode is a tensor-core multiply-add, wgmma and tcgen05 included."""
    return re.match(r"(H|I|Q|O|D)?(UTC)?(H|I|Q|O|D)?G?MMA\b", code) is not None


def tensor_loops(sass: str) -> list[MainLoop]:
    """Innermost loops (a branch back to an earlier label) with tensor-core instructions.

    Only up to the kernel's exit: behind it lie the slow paths of waits, which branch back as well.
    """
    found, labels = instructions(sass)
    found = found[: next(i for i, code in enumerate(found) if code.startswith("EXIT"))]
    spans = []
    for end, instruction in enumerate(found):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        start = labels.get(target[1], end + 1) if target else end + 1
        if start <= end and any(is_mma(opcode(i)) for i in found[start : end + 1]):
            spans.append((start, end))
    innermost = [
        (start, end)
        for start, end in spans
        if not any(a >= start and b <= end and (a, b) != (start, end) for a, b in spans)
    ]
    loops = []
    for start, end in innermost:
        codes = Counter(map(opcode, found[start : end + 1]))
        mma = sum(count for code, count in codes.items() if is_mma(code))
        loops.append(MainLoop(end + 1 - start, mma, dict(codes)))
    return loops
