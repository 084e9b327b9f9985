# SPDX-License-Identifier: Apache-2.0
"""The instructions, one file per family; importing this package registers them all."""

from . import (  # noqa: F401
    async_copy,
    atomics,
    barriers,
    bits,
    bulk_copy,
    calls,
    control,
    convert,
    floating,
    integer,
    load_store,
    logic,
    matrix,
    mbarrier,
    tensor_copy,
    wgmma,
)
from . import warp as warp
from .registry import Spec, compile_instruction, find

__all__ = ["Spec", "compile_instruction", "find"]
