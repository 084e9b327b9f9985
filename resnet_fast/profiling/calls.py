# SPDX-License-Identifier: Apache-2.0
"""Stand at every call of a module, without leaving a trace on any module.

Hooks would do for most models, but not here: a fused block takes its plain path as soon as one of
its modules has a hook. So for the time of a `with`, and in this thread alone, it is
`nn.Module.__call__` that asks first.

Python forgets what it has learnt of a class and all below it when one of its functions is
replaced, and a model runs a few percent slower until that is learnt anew. So the function is
replaced once for many runs, and what it asks is what comes and goes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

Around = Callable[[nn.Module, Callable, tuple, dict], object]


class Calls:
    """Who is asked at each call of a module: None, or one that returns what the call gives.

    Args:
        around: called with (module, call, args, kwargs), for `call(module, *args, **kwargs)`.
    """

    __slots__ = ("around",)

    def __init__(self) -> None:
        self.around: Around | None = None


@contextmanager
def around_calls(around: Around | None = None) -> Iterator[Calls]:
    """While open, `around`, or who is put in its place, is asked at each call of a module."""
    call, thread, calls = nn.Module.__call__, threading.get_ident(), Calls()
    calls.around = around

    def asked(module, *args, **kwargs):
        around = calls.around
        if around is None or threading.get_ident() != thread:
            return call(module, *args, **kwargs)
        return around(module, call, args, kwargs)

    nn.Module.__call__ = asked
    try:
        yield calls
    finally:
        nn.Module.__call__ = call
