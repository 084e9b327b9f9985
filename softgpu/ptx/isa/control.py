# SPDX-License-Identifier: Apache-2.0
"""Branches, exit, trap, and hints that change no value here."""

from __future__ import annotations

import numpy as np

from ..batch import EXITED
from ..errors import Fault
from .registry import SPLIT, instruction


@instruction("bra", kind="branch", writes=(), control=True)
def branch(batch, ins):
    """The guard's wrapper sends the threads that do not jump to the next instruction."""
    target = batch.labels[ins.operands[0].name]
    return lambda m: target


@instruction("ret", "exit", kind="branch", writes=(), control=True)
def leave(batch, ins):
    def run(m):
        threads = batch.indices(m)
        batch.state[threads] = EXITED
        for callback in batch.at_exit:
            callback(threads)
        batch.wake_collectives(threads)
        batch.valid[:, threads] = np.maximum(batch.valid[:, threads], 1)
        batch.progress += 1
        return SPLIT

    return run


@instruction("trap", "brkpt", kind="branch", writes=(), control=True)
def trap(batch, ins):
    def run(m):
        raise Fault("the kernel trapped", int(batch.indices(m)[0]))

    return run


@instruction("griddepcontrol", kind="branch", writes=())
def grid_dependency(batch, ins):
    """Launches run one after the other: every earlier grid is complete and visible."""
    return lambda m: None


@instruction("setmaxnreg", kind="branch", writes=(), together="warp")
def set_max_registers(batch, ins):
    """Registers are not allocated here; the count must be one that the ISA allows."""
    count = int(ins.operands[0].text)

    def run(m):
        batch.whole_warps(m, ins.opcode)
        if not (24 <= count <= 256 and count % 8 == 0):
            raise Fault(f"{count} registers: a multiple of 8 from 24 to 256 is needed")

    return run


@instruction("nanosleep", "pmevent", kind="branch", writes=())
def sleep(batch, ins):
    return lambda m: None
