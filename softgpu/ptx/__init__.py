# SPDX-License-Identifier: Apache-2.0
"""Runs compiled PTX on the CPU, finds its faults and counts what it does: see README.md here.

module = ptx.Module(text)
run = module.kernel("conv").launch(grid, block, args, shared_bytes)
run.counters
"""

from .counters import Counters
from .errors import PtxError
from .launch import Kernel, Module, Run
from .memory import Struct, address_of, sparse_array
from .tensor_map import TensorMap

__all__ = [
    "Counters",
    "Kernel",
    "Module",
    "PtxError",
    "Run",
    "Struct",
    "TensorMap",
    "address_of",
    "sparse_array",
]
