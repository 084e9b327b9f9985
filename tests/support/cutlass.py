# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's CUTLASS convolutions, compiled here: they calibrate the PTX machine.

A source holds one kernel and a host program that prints how CUTLASS launches it, so that not a
byte of its parameters is ours. Nothing of torch or resnet_fast is needed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from tests.support import nvcc

SOURCE = Path(__file__).with_name("cutlass_conv.cu")


def missing() -> str | None:
    """Why CUTLASS cannot be compiled here, or None."""
    if importlib.util.find_spec("cutlass_library") is None:
        return "CUTLASS's headers are not installed: pip install --no-deps nvidia-cutlass"
    return nvcc.missing()


@dataclass(frozen=True)
class Launch:
    """How CUTLASS launches its kernel, and what else its host program printed, line by line."""

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    params: bytes
    lines: list[str]


@dataclass(frozen=True)
class Program:
    """A compiled source: the kernel's PTX, and the host program."""

    ptx: str
    host: Path

    def launch(self, *arguments: int) -> Launch:
        """Ask the host program, given the sizes and addresses that it takes."""
        *lines, launch, params = nvcc.run(str(self.host), *map(str, arguments)).splitlines()
        *grid, threads, shared = map(int, launch.split())
        return Launch(tuple(grid), threads, shared, bytes.fromhex(params), lines)


def compile_program(source: Path, arch: str, folder: Path, **macros: int) -> Program:
    """Compile a source for `arch`, such as "80" or "90a", into a folder that the caller keeps.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    library = importlib.util.find_spec("cutlass_library").submodule_search_locations[0]
    root = Path(library) / "source"
    nvcc.run(
        *("nvcc", "-std=c++17", "-w", "--expt-relaxed-constexpr"),
        *("-I", str(root / "include"), "-I", str(root / "tools" / "util" / "include")),
        *("-gencode", f"arch=compute_{arch},code=compute_{arch}"),
        *(f"-D{name}={value}" for name, value in macros.items()),
        *("--keep", "--keep-dir", str(folder), str(source), "-o", str(folder / "host")),
    )
    return Program((folder / f"{source.stem}.ptx").read_text(), folder / "host")
