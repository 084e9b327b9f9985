# SPDX-License-Identifier: Apache-2.0
"""When each layer of a running model begins and ends.

Three places are watched while a `Timeline` is open: calls of modules that call no others; the
launches of kept programs, by which our blocks run without calling their modules; and the few
functions that our models call beside them. What runs between two of them is seen as the time
between: an addition in a block's forward, or the host alone.

A `Clock` is read at both ends of a layer (see `measuring.clock`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.measuring.clock import Clock
from resnet_fast.nn import program
from resnet_fast.profiling.calls import Calls, around_calls

RANGE_CHECK = "range check"  # the look at a tensor's values that lets oneDNN's ReLU be used
POOL = "max-pool"  # whose layer has the name of the module that is not called
FUNCTIONS = {"magnitude": RANGE_CHECK, "max_pool_3x3_2": POOL}  # of `ops`, for CPUs

Steps = program.Step | program.JoinStep


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
        self.steps: dict[str, Steps] = {}  # by name, those that ran by a program
        self._thread = threading.get_ident()
        # Of the replay that is under way: the names of what ran in one go, and one mark more.
        self._runs: list[tuple[str, ...]] = []
        self._marks: list[object] = []
        self._steps_names: dict[int, tuple[Sequence[Steps], tuple[str, ...]]] = {}
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

        def watch(steps: Sequence[Steps], launches: Sequence[Callable]) -> Iterator:
            inner.update(stack[-1:])
            self.steps.update({self._name_of(step): step for step in steps})
            return iter(launches)

        with self._watching(around, watch), torch.inference_mode():
            self.model(self.x)
        return {key: name for key, name in called.items() if key not in inner}

    def _name_of(self, step: Steps) -> str:
        """The convolution's; of a join, that of the main one of the two."""
        return self._name(getattr(step, "main", step).unit.conv)

    def _name(self, module: nn.Module) -> str:
        return self.names.get(id(module)) or type(module).__name__

    @contextmanager
    def open(self, calls: Calls | None = None) -> Iterator[None]:
        """While open, layers are marked; `replay` is to be called inside.

        Args:
            calls: of an `around_calls` that is open already.
        """
        with self._watching(self._around, self._watch, calls):
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
        self, around: Callable, watch: Callable, calls: Calls | None = None
    ) -> Iterator[None]:
        plain = {name: getattr(ops, name) for name in FUNCTIONS}
        program.watch = watch
        for name, function in plain.items():
            setattr(ops, name, self._marked(function, FUNCTIONS[name]))
        try:
            with nullcontext(calls) if calls else around_calls() as calls:
                calls.around = around
                yield
        finally:
            if calls:
                calls.around = None
            program.watch = None
            for name, function in plain.items():
                setattr(ops, name, function)

    def _marked(self, function: Callable, name: str) -> Callable:
        def marked(*args) -> object:
            if threading.get_ident() != self._thread:
                return function(*args)
            mark, marks = self.clock.mark, self._marks
            marks.append(mark())
            out = function(*args)
            marks.append(mark())
            self._runs.append((name,))
            return out

        return marked

    def _around(self, module: nn.Module, call: Callable, args: tuple, kwargs: dict) -> object:
        name = self._leaves.get(id(module))
        if name is None:
            return call(module, *args, **kwargs)
        mark, marks = self.clock.mark, self._marks
        marks.append(mark())
        out = call(module, *args, **kwargs)
        marks.append(mark())
        self._runs.append((name,))
        return out

    def _watch(self, steps: Sequence[Steps], launches: Sequence[Callable]) -> Iterator[Callable]:
        if threading.get_ident() != self._thread:
            return iter(launches)
        known = self._steps_names.get(id(steps))
        if known is None:
            names = tuple(map(self._name_of, steps))
            known = self._steps_names[id(steps)] = steps, names  # kept, so that the id is its own
        self._runs.append(known[1])
        return self._give_out(launches)

    def _give_out(self, launches: Sequence[Callable]) -> Iterator[Callable]:
        """The launches, each from one mark to the next."""
        mark, add = self.clock.mark, self._marks.append
        add(mark())
        for launch in launches:
            yield launch
            add(mark())
