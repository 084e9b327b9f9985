# SPDX-License-Identifier: Apache-2.0
"""When each layer of a running model begins and ends.

Two places are watched while a `Timeline` is open: calls of modules that call no others, and the
launches of kept plans, by which our networks run without calling their modules. What runs between
two of them is seen as the time between: an addition in a block's forward, or the host alone.

A `Clock` is read at both ends of a layer (see `measuring.clock`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast.measuring.clock import Clock
from resnet_fast.nn.launches import POOL, RANGE_CHECK, OpStep, observed
from resnet_fast.profiling.calls import Calls, around_calls

__all__ = ["POOL", "RANGE_CHECK", "Edge", "Replay", "Timeline"]


class Edge(NamedTuple):
    """Seconds from one mark to the next."""

    device: float
    host: float


@dataclass(frozen=True, slots=True)
class Replay:
    """One marked run of a model.

    Args:
        names: of the layers that were marked, in the order they ran.
        edges: before the first layer, of it, between it and the second, ..., after the last: one
            more than two for each layer.
    """

    names: tuple[str, ...]
    edges: list[Edge]

    @property
    def whole(self) -> Edge:
        """From the first mark to the last."""
        return Edge(*map(sum, zip(*self.edges, strict=True)))


class Timeline:
    """Marks the layers of a model, run after run.

    Args:
        model, x: run once, to learn which modules call no others. Let it be warm.
        clock: read at both ends of each layer.
    """

    def __init__(self, model: nn.Module, x: Tensor, clock: Clock) -> None:
        self.model, self.x, self.clock = model, x, clock
        self.names = {id(module): name for name, module in model.named_modules()}
        self.steps: dict[str, OpStep] = {}  # by name, those that ran by a plan
        self._thread = threading.get_ident()
        # Of the replay that is under way: the names of what ran in one go, and one mark more.
        self._runs: list[list[str]] = []
        self._marks: list[object] = []
        self._last = -1  # marks there were when the last step of a plan had ended
        self._leaves = self._find_leaves()

    def _find_leaves(self) -> dict[int, str]:
        inner: set[int] = set()  # that called a module, or launched
        called: dict[int, str] = {}
        stack: list[int] = []

        def around(module: nn.Module, call: Callable, args: tuple, kwargs: dict) -> object:
            inner.update(stack[-1:])
            stack.append(id(module))
            called[id(module)] = self._name(module)
            try:
                return call(module, *args, **kwargs)
            finally:
                stack.pop()

        def watch(step: OpStep | str, launch: Callable, *args: object) -> object:
            inner.update(stack[-1:])
            if isinstance(step, OpStep):
                self.steps[self._name(step.step.units[0].conv)] = step
            return launch(*args)

        with self._watching(around, _Observer(watch)), torch.inference_mode():
            self.model(self.x)
        return {key: name for key, name in called.items() if key not in inner}

    def _name(self, module: nn.Module) -> str:
        return self.names.get(id(module)) or type(module).__name__

    @contextmanager
    def open(self, calls: Calls | None = None) -> Iterator[None]:
        """While open, layers are marked; `replay` is to be called inside.

        Args:
            calls: of an `around_calls` that is open already.
        """
        with self._watching(self._around, _Observer(self._watch, self._begin), calls):
            yield

    def replay(self) -> Replay:
        """Run the model once and mark its layers."""
        runs, marks, clock = self._runs, self._marks, self.clock
        runs.clear()
        marks.clear()
        clock.start()
        marks.append(clock.mark())
        self.model(self.x)
        marks.append(clock.mark())
        clock.finish()
        edges = (Edge(clock.device(a, b), clock.host(a, b)) for a, b in pairwise(marks))
        found = []
        for run in runs:
            found += [next(edges), next(edges)]
            for _ in run[1:]:
                found += [Edge(0.0, 0.0), next(edges)]
        return Replay(tuple(chain.from_iterable(runs)), [*found, *edges])

    @contextmanager
    def _watching(
        self, around: Callable, observer: _Observer, calls: Calls | None = None
    ) -> Iterator[None]:
        with observed(observer), nullcontext(calls) if calls else around_calls() as calls:
            calls.around = around
            try:
                yield
            finally:
                calls.around = None

    def _around(self, module: nn.Module, call: Callable, args: tuple, kwargs: dict) -> object:
        name = self._leaves.get(id(module))
        if name is None:
            return call(module, *args, **kwargs)
        return self._marked(name, call, module, *args, **kwargs)

    def _marked(self, name: str, function: Callable, *args, **kwargs) -> object:
        mark, marks = self.clock.mark, self._marks
        marks.append(mark())
        out = function(*args, **kwargs)
        marks.append(mark())
        self._runs.append([name])
        return out

    def _begin(self) -> None:
        self._last = -1

    def _watch(self, step: OpStep | str, launch: Callable, *args: object) -> object:
        """A step of a plan; one mark lies between it and the step before."""
        if threading.get_ident() != self._thread:
            return launch(*args)
        if isinstance(step, str):
            return self._marked(step, launch, *args)
        mark, marks = self.clock.mark, self._marks
        name = self._name(step.step.units[0].conv)
        if self._last == len(marks):
            self._runs[-1].append(name)
        else:
            marks.append(mark())
            self._runs.append([name])
        out = launch(*args)
        marks.append(mark())
        self._last = len(marks)
        return out


class _Observer:
    """Two functions as an `Observer` of kept plans."""

    def __init__(self, watch: Callable, begin: Callable[[], None] = lambda: None) -> None:
        self._watch, self.begin = watch, begin

    def __call__(self, what: OpStep | str, function: Callable, *args: object) -> object:
        return self._watch(what, function, *args)
