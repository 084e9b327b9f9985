# SPDX-License-Identifier: Apache-2.0
"""What `resnet-fast build` shows: the finished build, with each kernel's registers and spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from resnet_fast import build

_ONE_KERNEL = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)\w*'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture."""

    source: str
    kernel: str
    arch: int
    registers: int
    spill_bytes: int


def usage_of(report: build.Report) -> list[Usage]:
    """What ptxas reported while the sources were compiled."""
    found = [
        Usage(source, name, int(arch), int(registers), max(map(int, spills)))
        for source, log in report.logs.items()
        for name, arch, *spills, registers in _ONE_KERNEL.findall(log)
    ]
    names = _demangled([usage.kernel for usage in found], report.toolchain)
    return [replace(usage, kernel=name) for usage, name in zip(found, names, strict=True)]


def describe(
    report: build.Report, usage: Sequence[Usage], every_kernel: bool = False
) -> Iterable[str]:
    """The build as lines: kernels that spill are always listed, the others on demand."""
    names = ", ".join(str(arch / 10) for arch in report.architectures)
    cuda = ".".join(map(str, report.toolchain.cuda))
    target = ".".join(map(str, build.TORCH_TARGET))
    size = report.path.stat().st_size / 1e6
    yield f"built {report.path} ({size:.1f} MB) in {report.seconds:.0f} s"
    yield f"  GPUs     {names}; newer ones by PTX of {report.architectures[0] / 10}"
    versions = f"nvcc {cuda}, torch {report.toolchain.torch_version}"
    yield f"  with     {versions}; loads with torch {target} and newer"
    if report.left_out:
        left = ", ".join(str(arch / 10) for arch in report.left_out)
        yield f"  without  {left}, which nvcc {cuda} does not know"
    for source in report.logs:
        kernels: dict[str, list[Usage]] = {}
        for one in usage:
            if one.source == source:
                kernels.setdefault(one.kernel, []).append(one)
        registers = [one.registers for kernel in kernels.values() for one in kernel]
        spilled = [k for k, on_archs in kernels.items() if any(one.spill_bytes for one in on_archs)]
        if not kernels:
            continue
        yield (
            f"  kernels  {source}: {len(kernels)}, {min(registers)} to {max(registers)} registers, "
            f"{len(spilled) or 'none'} with spills"
        )
        for kernel in kernels if every_kernel else spilled:
            per_arch = ", ".join(f"{one.arch / 10}: {one.registers}" for one in kernels[kernel])
            spills = ", ".join(
                f"{one.spill_bytes} bytes on {one.arch / 10}"
                for one in kernels[kernel]
                if one.spill_bytes
            )
            tail = f"; spills {spills}" if spills else ""
            yield f"             {kernel}: registers {per_arch}{tail}"


def _demangled(names: list[str], toolchain: build.Toolchain) -> list[str]:
    """C++ names without namespaces and parameters; unchanged if no tool here can read them."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    tool = tool or shutil.which("cu++filt", path=build.toolkit(toolchain) / "bin")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return [_plain(line) for line in lines] if len(lines) == len(names) else names


def _plain(signature: str) -> str:
    """`void resnet_fast::f<__half, resnet_fast::Tile<(int)64> >(P)` -> `f<float16, Tile<64> >`."""
    text = re.sub(r"\((?:int|bool)\)", "", signature).replace("resnet_fast::", "")
    text = re.sub(r"^void ", "", text.rpartition("(")[0] or text)
    return text.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16").strip()
