# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA C++ kernels alone, without torch and without a GPU; the mirror of their structs.

A translation unit is written here: it includes device headers, instantiates one kernel, and asserts
that the structs lie in memory as their mirrors below do. What the extension launches is the same
template with the same struct.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # enum class Dtype
CPP_TYPE = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}

# Where the processes of one test run share compiled kernels; None: nowhere.
cache_folder: Path | None = None


class Divisor(ctypes.Structure):
    """Mirror of struct Divisor."""

    _fields_ = (
        ("divisor", ctypes.c_uint32),
        ("multiplier", ctypes.c_uint32),
        ("shift", ctypes.c_uint32),
    )

    @classmethod
    def of(cls, divisor: int) -> Divisor:
        shift = (divisor - 1).bit_length()
        return cls(divisor, -(-(1 << (31 + shift)) // divisor), shift)


class Walk(ctypes.Structure):
    """Mirror of struct Walk."""

    _fields_ = tuple(
        (name, ctypes.c_int32) for name in ("c", "s", "r", "offset", "carry_c", "carry_s")
    )


class ChannelVector(ctypes.Structure):
    """Mirror of struct ChannelVector."""

    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int32))


class Norm(ctypes.Structure):
    """Mirror of struct Norm."""

    _fields_ = (
        *((name, ChannelVector) for name in ("scale", "shift", "mean", "var")),
        ("eps", ctypes.c_float),
    )


class ConvProblem(ctypes.Structure):
    """Mirror of struct ConvProblem."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "residual", "y", "workspace")),
        ("norm", Norm),
        *((name, ctypes.c_int64) for name in ("stride_n", "stride_h", "stride_w")),
        *((name, ctypes.c_int32) for name in ("h", "w", "c", "k", "r", "s", "m")),
        *((name, Divisor) for name in ("pixels", "q", "c_of", "s_of")),
        ("walk", Walk),
        ("tiles_n", Divisor),
        *(
            (name, ctypes.c_int32)
            for name in (
                "conv_stride_h", "conv_stride_w", "padding_h", "padding_w",
                "dilation_h", "dilation_w", "split_k", "steps_per_split", "relu",
            )
        ),
    )  # fmt: skip


class JoinProblem(ctypes.Structure):
    """Mirror of struct JoinProblem."""

    _fields_ = (("main", ConvProblem), ("projection", ConvProblem))


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if shutil.which("nvcc") else "nvcc is not installed"


def layout_asserts(mirror: type[ctypes.Structure]) -> str:
    """C++ that fails to compile unless the struct of the mirror's name lies as the mirror does."""
    name = f"resnet_fast::{mirror.__name__}"
    lines = [f"static_assert(sizeof({name}) == {ctypes.sizeof(mirror)});"]
    for field, _ in mirror._fields_:
        offset = getattr(mirror, field).offset
        lines.append(f"static_assert(offsetof({name}, {field}) == {offset});")
    return "\n".join(lines)


@functools.cache
def compile_unit(text: str, arch: int) -> tuple[str, bytes]:
    """(PTX, cubin) of a translation unit for compute capability `arch` (90 for 9.0).

    The cubin is made from that very PTX. Compiled once per process, or once per `cache_folder`.

    Raises:
        RuntimeError: with the compiler's messages, or nvcc is missing.
    """
    if reason := missing():
        raise RuntimeError(f"a CUDA C++ kernel cannot be compiled: {reason}")
    key = hashlib.sha256(f"sm_{arch}\n{text}".encode()).hexdigest()
    kept = cache_folder and cache_folder / key
    if kept and kept.exists():
        return (kept / "kernel.ptx").read_text(), (kept / "kernel.cubin").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "kernel.cu"), Path(folder, "kernel.ptx")
        source.write_text(text)
        flags = ("-std=c++17", "-O3", "-I", str(CSRC), "--expt-relaxed-constexpr")
        run("nvcc", *flags, f"-arch=sm_{arch}", "-ptx", str(source), "-o", str(out))
        ptx = out.read_text()
    cubin = assemble(ptx, arch)
    if kept:
        unfinished = kept.with_suffix(f".{os.getpid()}")
        unfinished.mkdir(parents=True)
        (unfinished / "kernel.ptx").write_text(ptx)
        (unfinished / "kernel.cubin").write_bytes(cubin)
        with contextlib.suppress(OSError):  # another process was first
            unfinished.rename(kept)
    return ptx, cubin


@functools.lru_cache(maxsize=32)
def assemble(ptx: str, arch: int) -> bytes:
    """The cubin of PTX: what the driver would make of it."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        run("nvcc", f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(cubin))
        return cubin.read_bytes()


def run(*command: str) -> str:
    """Run a tool; what it prints."""
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def unit(header: str, instance: str, *mirrors: type[ctypes.Structure]) -> str:
    """A translation unit that instantiates one kernel of a header.

    Args:
        header: its path under csrc, such as "cuda/device/conv_implicit_gemm.cuh".
        instance: what follows `template __global__ void resnet_fast::`, such as
            "conv_bn_act<__half, Tile<128, 128, 64, 3, 2, 2>, false>(ConvProblem)".
    """
    asserts = "\n".join(map(layout_asserts, mirrors))
    return (
        f'#include <cstddef>\n#include "{header}"\n{asserts}\n'
        f"namespace resnet_fast {{ template __global__ void {instance}; }}\n"
    )


def entry_name(ptx: str) -> str:
    """The name of the one kernel in PTX."""
    names = re.findall(r"\.entry (\w+)", ptx)
    if len(names) != 1:
        raise ValueError(f"one kernel expected, PTX has {names}")
    return names[0]
