# SPDX-License-Identifier: Apache-2.0
"""Run code where Triton's kernels are interpreted on the CPU, beside code where they compile.

Triton decides at import, by TRITON_INTERPRET, whether a kernel is compiled or interpreted, so one
process cannot do both. `pool` starts processes that interpret; the caller's is left alone.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


def pool(processes: int = 1) -> ProcessPoolExecutor:
    """An executor whose processes interpret Triton kernels; it takes picklable functions.

    A function that is sent there must not have Triton kernels imported by its own module's import
    in a process that compiles; the kernels it uses are its process's own, and interpreted.
    """
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=spawn, initializer=interpret_here)


def interpret_here() -> None:
    """Make this process interpret; it must not have imported Triton kernels yet."""
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    torch.set_num_threads(1)

    # The interpreter keeps a bfloat16 as its bits in a uint16. Triton 3.8 multiplies those bits in
    # tl.dot, and truncates where the GPU rounds: give it the values, and torch's rounding.
    convert_float = interpreter._convert_float
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def convert(data, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert_float(data, source, target, rounding_mode)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(t, tl.float32) for t in (a, b))
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    interpreter._convert_float = convert
    builder.create_dot = create_dot
