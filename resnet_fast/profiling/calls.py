# SPDX-License-Identifier: Apache-2.0
"""Watch every call of a module, without changing any module.

Hooks would do for most models, but not here: a fused block takes its plain path as soon as one of
its modules has a hook. So for the time of a `with`, and in this thread alone, it is
`nn.Module.__call__` that asks first.

When a function of a class is replaced, Python drops its caches for the class and all subclasses,
and a model runs a few percent slower until they are filled again. So the function is replaced once
for many runs, and only what it calls changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

Around = Callable[[nn.Module, Callable, tuple, dict], object]


class Calls:
    """What is called instead of a module: None for the module itself.

    Args:
        around: called with (module, call, args, kwargs), for `call(module, *args, **kwargs)`.
    """

    __slots__ = ("around",)

    def __init__(self) -> None:
        self.around: Around | None = None


@contextmanager
def around_calls(around: Around | None = None) -> Iterator[Calls]:
    """While open, each call of a module goes through `around`, or what is put in its place."""
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
