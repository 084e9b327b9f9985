# SPDX-License-Identifier: Apache-2.0
"""Run code in processes that interpret Triton's kernels on the CPU.

Triton decides at import, by TRITON_INTERPRET, whether a kernel is compiled or interpreted, so one
process cannot do both. `pool` starts processes that interpret; the caller still compiles.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace


def pool(processes: int = 1) -> ProcessPoolExecutor:
    """An executor whose processes interpret Triton kernels; it takes picklable functions.

    A function that runs there uses the kernels that its own process imported: interpreted ones. So
    its module must not import Triton kernels at its top.
    """
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=spawn, initializer=interpret_here)


def interpret_here() -> None:
    """Make this process interpret kernels; it must not have imported any yet."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiles are too small to share among threads
    import numpy as np
    import torch
    import triton.language as tl
    from triton._C.libtriton import ir as _ir
    from triton.runtime import interpreter

    from tests.support.tolerance import round_to_tf32

    torch.set_num_threads(1)

    # Correct what Triton 3.8 interprets differently from a GPU. It keeps a bfloat16 as its bits in
    # a uint16: tl.dot would multiply those bits, and conversions would truncate. Its TF32 products
    # use all bits of fp32, while tensor cores ignore the low 13.
    convert_float = interpreter._convert_float
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot
    tf32 = _ir.INPUT_PRECISION.TF32

    def convert(data, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert_float(data, source, target, rounding_mode)

    def truncate(t):
        bits = np.ascontiguousarray(t.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(t, tl.float32) for t in (a, b))
        elif a.dtype.scalar == tl.float32 and input_precision == tf32:
            a, b = truncate(a), truncate(b)
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def create_inline_asm(self, asm, constraints, args, dtypes, is_pure, pack):
        if asm != "cvt.rna.tf32.f32 $0, $1;":
            raise NotImplementedError(f"the interpreter does not know the instruction {asm!r}")
        rounded = round_to_tf32(torch.from_numpy(np.ascontiguousarray(args[0].data)))
        handle = interpreter.TensorHandle(rounded.numpy(), tl.float32)
        return SimpleNamespace(get_result=lambda _: handle)

    interpreter._convert_float = convert
    builder.create_dot = create_dot
    builder.create_inline_asm = create_inline_asm
