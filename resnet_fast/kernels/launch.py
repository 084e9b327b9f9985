# SPDX-License-Identifier: Apache-2.0
"""One kernel launch as a value: everything but the pointers, decided once and then kept.

A `Launch` names the Triton function, its grid, the type of every argument and the value of every
argument that does not change from call to call. The same value is compiled for the GPU at hand
(`bind`), compiled for a GPU that is not there (`tests.support.compiled`), or interpreted on the CPU
(`TRITON_INTERPRET=1`): what is tested is what is launched.

Triton's own `kernel[grid](...)` inspects the type and the alignment of every argument on every
call, to find the variant that it compiled. A `Launch` states them instead, so a bound launch goes
straight to the compiled kernel; code that keeps one must key it by everything it was built from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.interpreter import InterpretedFunction

# Triton's names of the element types, by torch's names.
TRITON_TYPE = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Launch:
    """One kernel launch, complete but for its leading arguments.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: programs along the three axes.
        leading: Triton type of each argument that is passed anew at every call, by name and in
            order, such as `"*fp16"` or `"fp32"`; None for a pointer that this launch lacks.
        sizes: the integers that follow: sizes and strides, as 32-bit or `wide` 64-bit arguments.
        constants: the compile-time arguments, by name.
        divisors: by name, a number that divides an argument (a pointer: in bytes); this lets the
            compiler form 16-byte accesses. Other names are ignored.
        wide: the names in `sizes` that are passed as 64-bit integers.
        num_warps, num_stages: warps per program, and steps in flight in its pipelined loop.
    """

    kernel: Any
    grid: tuple[int, int, int]
    leading: dict[str, str | None]
    sizes: dict[str, int] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    divisors: dict[str, int] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        names = [*self.leading, *self.sizes, *self.constants]
        if names != self.kernel.arg_names:
            raise ValueError(f"{self.kernel} takes {self.kernel.arg_names}, the launch has {names}")

    @property
    def trailing(self) -> tuple:
        """The values that follow the leading arguments, in the order of the kernel's signature."""
        return (*self.sizes.values(), *self.constants.values())

    def source(self) -> ASTSource:
        """What Triton's compiler takes: the function, its argument types, constants, attributes."""
        absent = {name: None for name, kind in self.leading.items() if kind is None}
        constants = {**absent, **self.constants}
        signature = {name: kind or "constexpr" for name, kind in self.leading.items()}
        signature |= {name: "i64" if name in self.wide else "i32" for name in self.sizes}
        signature |= dict.fromkeys(self.constants, "constexpr")
        attributes = {
            (i,): [["tt.divisibility", self.divisors[name]]]
            for i, name in enumerate(self.kernel.arg_names)
            if self.divisors.get(name, 1) > 1 and signature[name] != "constexpr"
        }
        return ASTSource(self.kernel, signature, constants, attributes)

    def compile(self, arch: int) -> CompiledKernel:
        """Compile for compute capability `arch` (90 for 9.0); no GPU is needed or touched."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(self.source(), target=GPUTarget("cuda", arch, 32), options=options)

    def bind(self, arch: int) -> Callable[..., None]:
        """A function of the leading arguments that launches on torch's current stream.

        The kernel is compiled and loaded on the current device at the first call, or taken from
        Triton's cache on disk; the function is valid only for that device.
        """
        trailing = self.trailing
        if isinstance(self.kernel, InterpretedFunction):
            interpreted = self.kernel[self.grid]
            return lambda *leading: interpreted(*leading, *trailing)
        runner = None

        def run(*leading) -> None:
            nonlocal runner
            if runner is None:
                runner = self._kept(arch)[self.grid]
            runner(*leading, *trailing)

        return run

    def _kept(self, arch: int) -> CompiledKernel:
        """The compiled kernel for the current device, the same for all launches that need it."""
        options = (self.num_warps, self.num_stages, arch, torch.cuda.current_device())
        key = (self.source().hash(), *options)
        kernel = _kernels.get(key)
        return kernel or _kernels.setdefault(key, self.compile(arch))


# By source, options and device, for the life of the process. A compiled kernel unloads its module
# when it is garbage-collected, which happens whenever its launch is dropped; but a recorded CUDA
# graph may still launch the kernel, and unloading breaks a recording in progress.
_kernels: dict[tuple, CompiledKernel] = {}


@functools.cache
def driver_fault() -> str | None:
    """Why Triton cannot launch anything on this machine, or None; asked once, of its driver.

    Triton compiles part of its driver on first use, with the C compiler that it finds.
    """
    try:
        _ = triton.runtime.driver.active
    except Exception as error:
        text = " ".join(str(error).split())
        return f"Triton's driver cannot be loaded: {type(error).__name__}: {text}"
    return None


# (launch, arch) -> a function of the leading arguments: `Launch.bind`, or a test's stand-in.
Bind = Callable[[Launch, int], Callable[..., None]]
