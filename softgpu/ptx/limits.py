# SPDX-License-Identifier: Apache-2.0
"""What the hardware refuses to launch, and what this machine refuses of a kernel's directives."""

from __future__ import annotations

import math
import re

from .syntax import Function

MAX_THREADS, MAX_BLOCK, MAX_GRID = 1024, (1024, 1024, 64), ((1 << 31) - 1, 65535, 65535)
# KiB of shared memory that a block may opt in to, by compute capability times ten; the next older
# one speaks for those not listed. CUDA C++ Programming Guide, "Compute Capabilities".
SHARED_KIB = {0: 48, 70: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 120: 99}


def clusters(function: Function) -> str | None:
    """Why the kernel's clusters are not run, or None."""
    extents = _extents(function, ".reqnctapercluster")
    if extents is None or math.prod(extents) == 1:
        return None
    return f"clusters of {extents} blocks are not supported: here every block is its own cluster"


def check_launch(function: Function, target: str, grid, block, shared: int) -> None:
    """Raises ValueError where the driver would refuse the launch: too large, or not as declared.

    shared: static and dynamic bytes of a block.
    """
    threads, wanted = math.prod(block), _extents(function, ".reqntid")
    most = _extents(function, ".maxntid")
    limit = 1024 * shared_kib(target)
    refused = {
        f"requires blocks of {wanted} threads, got {block}": wanted and wanted != block,
        f"takes blocks of at most {most} threads (.maxntid), got {block}": most
        and threads > math.prod(most),
        f"blocks have at most {MAX_THREADS} threads, got {block}, which are {threads}": threads
        > MAX_THREADS,
        f"blocks have at most {MAX_BLOCK} threads along x, y, z, got {block}": _beyond(
            block, MAX_BLOCK
        ),
        f"grids have at most {MAX_GRID} blocks along x, y, z, got {grid}": _beyond(grid, MAX_GRID),
        f"blocks have at most {limit} bytes of shared memory on {target}, got {shared}": shared
        > limit,
    }
    for reason, true in refused.items():
        if true:
            raise ValueError(f"{function.name}: {reason}")


def shared_kib(target: str) -> int:
    """Of `target` such as sm_90a."""
    found = re.search(r"\d+", target)
    capability = int(found[0]) if found else 0
    return SHARED_KIB[max(known for known in SHARED_KIB if known <= capability)]


def _beyond(extents, most) -> bool:
    """Whether an extent is too large, or not at least one."""
    return any(not 1 <= n <= limit for n, limit in zip(extents, most, strict=True))


def _extents(function: Function, directive: str) -> tuple[int, int, int] | None:
    values = [int(n) for n in function.directives.get(directive, "").split(",") if n.strip()]
    return (*values, 1, 1, 1)[:3] if values else None
