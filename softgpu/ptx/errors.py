# SPDX-License-Identifier: Apache-2.0
"""The one exception of the PTX machine."""

from __future__ import annotations


class PtxError(Exception):
    """PTX that the machine does not know, or a fault that a running kernel committed.

    Attributes: line, the line of the PTX text (None where there is none); kernel, block (x, y, z)
    and thread (x, y, z) of a fault, None for text that was never run.
    """

    def __init__(self, message: str, line=None, kernel=None, block=None, thread=None):
        self.reason, self.line, self.kernel = message, line, kernel
        self.block, self.thread = block, thread
        where = [f"kernel {kernel}"] if kernel else []
        where += [f"line {line}"] if line is not None else []
        where += [f"block {block}"] if block is not None else []
        where += [f"thread {thread}"] if thread is not None else []
        super().__init__(f"{', '.join(where)}: {message}" if where else message)


class Fault(Exception):
    """Raised inside an instruction; the executor adds kernel, line, block and thread.

    `thread` indexes the batch: block * threads per block + thread within the block.
    """

    def __init__(self, message: str, thread: int | None = None):
        super().__init__(message)
        self.message, self.thread = message, thread
