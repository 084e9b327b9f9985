# SPDX-License-Identifier: Apache-2.0
"""Replays a test's kernel on a real GPU: the same PTX, the same data, through the CUDA driver."""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from softgpu import ptx


@functools.cache
def _driver():
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # makes the primary context current
    return ctypes.CDLL("libcuda.so.1")


def available() -> bool:
    return _driver() is not None


def _call(name: str, *args) -> None:
    error = getattr(_driver(), name)(*args)
    if error:
        raise RuntimeError(f"{name}: CUDA error {error}")


def launch(kernel: ptx.Kernel, grid, block, args, shared_bytes: int = 0, **_) -> None:
    """Stands in for Kernel.launch: pointer arguments are copied to the GPU and back."""
    import torch

    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), kernel.module.text.encode() + b"\0")
    _call("cuModuleGetFunction", ctypes.byref(function), module, kernel.name.encode())
    copies, values = [], []
    for arg in args:
        if isinstance(arg, np.ndarray):
            copies.append((arg, torch.from_numpy(arg.view(np.uint8).reshape(-1).copy()).cuda()))
            values.append(ctypes.c_uint64(copies[-1][1].data_ptr()))
        else:
            values.append(ctypes.c_uint32(arg))
    pointers = (ctypes.c_void_p * len(values))(
        *(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values)
    )
    extents = [(*np.atleast_1d(e), 1, 1)[:3] for e in (grid, block)]
    numbers = [ctypes.c_uint(int(n)) for e in extents for n in e]
    _call("cuLaunchKernel", function, *numbers, shared_bytes, None, pointers, None)
    torch.cuda.synchronize()
    for array, copy in copies:
        array.view(np.uint8).reshape(-1)[:] = copy.cpu().numpy()
    _call("cuModuleUnload", module)
