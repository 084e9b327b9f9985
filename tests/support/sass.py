# SPDX-License-Identifier: Apache-2.0
"""Read machine code: what the CUDA binary tools of Triton's wheel print about a cubin."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from triton import knobs


@dataclass(frozen=True)
class MainLoop:
    """SASS statistics of an innermost loop that holds tensor-core instructions.

    Args:
        instructions: SASS instructions of one iteration.
        mma: tensor-core instructions among them.
        loads: instructions among them that read memory: global, shared, asynchronous copies.
        opcodes: how often each opcode occurs, modifiers included.
    """

    instructions: int
    mma: int
    loads: int
    opcodes: dict[str, int]

    @property
    def share(self) -> float:
        """The tensor-core instructions' share of all."""
        return self.mma / self.instructions

    @property
    def per_mma(self) -> float:
        """Instructions issued for each tensor-core instruction, that one included."""
        return self.instructions / self.mma


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL ... of the one kernel in a cubin, from its resource section."""
    text = run_tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)\b", text)}


@functools.lru_cache(maxsize=8)
def disassemble(cubin: bytes) -> str:
    """The machine code as text."""
    return run_tool(knobs.nvidia.nvdisasm.path, "-c", cubin)


def run_tool(tool: str, option: str, cubin: bytes) -> str:
    """Run one of the CUDA binary tools on a cubin and return what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True)
    return done.stdout


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a disassembly in order, and the index of each label."""
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


def is_load(code: str) -> bool:
    """Whether a SASS opcode reads memory (constants aside): LDG, LDS, LDSM, LDGSTS, bulk copies."""
    return re.match(r"LD(G|S|L|SM|GSTS)?\b|UBLKCP|UTMALDG", code) is not None


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
        # ptxas sets `@!PT LDS RZ, [RZ]` beside asynchronous copies: it is never executed
        executed = (code for code in found[start : end + 1] if not code.startswith("@!PT"))
        loads = sum(is_load(opcode(code)) for code in executed)
        loops.append(MainLoop(end + 1 - start, mma, loads, dict(codes)))
    return loops
