# SPDX-License-Identifier: Apache-2.0
"""What runs the steps of a kept plan: an op's launch, made anew when a tensor has changed.

Every launch is called with (x, other, over, finite) and returns the step's result: `other` is the
residual or the block's input, `over` says to write over it, and `finite` that no value can be NaN
or infinite. Its `growth` (gain, offset) bounds the result: gain * (largest input) + offset, a
residual apart; None where the backend has no use for bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.nn import reasons
from resnet_fast.nn.plan import Step
from resnet_fast.nn.units import KINDS, to_channels_last

RANGE_CHECK = "range check"  # the look at a tensor's values that lets oneDNN's ReLU be used
POOL = "max-pool"  # without calling the module
UNKNOWN = (math.nan, math.nan)
NO_LARGER = (1.0, 0.0)
_KEEP_THE_LARGEST = (nn.AvgPool2d, nn.MaxPool2d, nn.ReLU, nn.Identity)


class Observer(Protocol):
    """Stands at what kept plans run beside the modules that they call; see `observed`."""

    def begin(self) -> None:
        """The steps of a piece begin to run."""

    def __call__(self, what: OpStep | str, function: Callable, *args) -> object:
        """Return function(*args): the launch of an op; or, by name, RANGE_CHECK or POOL."""


_observers: list[Observer] = []


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """While open, `observer` stands at every launch of a kept plan, in whatever thread."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def observer_now() -> Observer | None:
    """The observer that was put there last, if any."""
    return _observers[-1] if _observers else None


def _watched(what: str, function: Callable, *args) -> object:
    observer = observer_now()
    return function(*args) if observer is None else observer(what, function, *args)


def magnitude(x: Tensor) -> float:
    """The largest absolute value in x; NaN if there is a NaN."""
    return _watched(RANGE_CHECK, ops.magnitude, x)


@dataclass(slots=True)
class Record:
    """How a block or a stem has run so far, for `report`."""

    fused: int = 0
    plain: int = 0
    backends: dict[str, str] = field(default_factory=dict)  # name -> why no fused kernel took it
    reason: str | None = None  # why the last call ran plain, if it did
    left: str = ""  # what a fused call calls as modules, and why
    merged: str = ""  # the op that ran several units as one kernel, if one did

    def count_fused(self) -> None:
        """One more call ran fused: what spoke against it before does no longer."""
        self.fused += 1
        self.reason = None

    def note(self, step: Step, plan) -> None:
        """Remember the backend of an op's plan, and why a better one refused if any did."""
        kind = KINDS[step.kind]
        name = kind.shown.format(plan.backend)
        if name not in self.backends:
            self.backends[name] = plan.why_fallback()
        if len(step.units) > 1 and plan.is_one_kernel:
            self.merged = kind.op.name


class OpStep:
    """A step that runs as an op: once it has been called, its plan and its launch."""

    __slots__ = ("_arguments", "_biased", "_record", "launch", "plan", "step")

    def __init__(self, step: Step, record: Record) -> None:
        self.step, self._record = step, record
        self.plan = self.launch = None
        # Else a later call outside of inference mode could not write to what was made inside.
        with torch.inference_mode(False), torch.no_grad():
            made = [unit.arguments() for unit in step.units]
        self._arguments = [*chain.from_iterable(made), *KINDS[step.kind].more]
        self._biased = [
            (unit, arguments[3])
            for unit, arguments in zip(step.units, made, strict=True)
            if unit.bias is not None
        ]

    def bind(self) -> Callable[..., Tensor]:
        """The launch for what the tensors hold now."""
        plan = self.plan
        if plan is None:
            return self._first_launch
        plan.calls += 1
        for unit, mean in self._biased:  # computed, not one of the modules' own tensors
            mean.copy_(unit.arguments()[3])
        launch = self.launch
        if launch is None or not launch.fresh(self.step.units[0].weight):
            launch = self.launch = plan.bind(*self._arguments)
        return launch

    def _first_launch(self, x: Tensor, other: Tensor | None, over: bool, finite: bool) -> Tensor:
        self.plan = KINDS[self.step.kind].op.plan_of(self.step.call(x, other))
        y = self.bind()(x, other, over, finite)
        self._record.note(self.step, self.plan)  # by now it is known whether its backend can launch
        self._record = None
        return y


class ModuleStep:
    """A step that calls a module or a function; it is its own launch."""

    __slots__ = ("_run", "growth", "step")

    def __init__(self, step: Step, _record: Record) -> None:
        self.step = step
        module = step.module
        self._run = module if step.kind == "call" else _pool if step.kind == "pool" else _add
        known = module in (None, to_channels_last) or type(module) in _KEEP_THE_LARGEST
        divides = getattr(module, "divisor_override", None) is not None
        self.growth = NO_LARGER if known and not divides else UNKNOWN

    def bind(self) -> Callable[..., Tensor]:
        """Itself."""
        return self

    def __call__(self, x: Tensor, other: Tensor | None, over: bool, finite: bool) -> Tensor:
        if self.step.kind == "call":
            return self._run(x)
        return self._run(self.step.module, x, other, finite)


def launched(step: Step, record: Record) -> OpStep | ModuleStep:
    """What runs a step of a plan."""
    return (OpStep if step.kind in KINDS else ModuleStep)(step, record)


def traced(step: Step, x: Tensor, other: Tensor | None) -> Tensor:
    """A step through torch's dispatcher, writing over nothing that is not its own."""
    if step.kind in KINDS:
        return KINDS[step.kind].op.overload(*step.call(x, other))
    if step.kind == "add":
        return plain_add(step.module, x, other)
    return step.module(x)


def _pool(module: nn.Module, x: Tensor, _other: None, finite: bool) -> Tensor:
    # Of a ReLU's results, which are not negative. An empty batch comes back in another layout.
    if finite:
        return _watched(POOL, ops.max_pool_3x3_2, x)
    return to_channels_last(module(x))


def _add(after: nn.Module | None, y: Tensor, shortcut: Tensor, _finite: bool) -> Tensor:
    """after(y + shortcut), in one pass where it is a ReLU of two equal maps."""
    alike = (y.shape, y.dtype, y.stride()) == (shortcut.shape, shortcut.dtype, shortcut.stride())
    if type(after) is nn.ReLU and alike and reasons.call_refusal(after) is None:
        return ops.add_relu(y, shortcut)
    return plain_add(after, y, shortcut)


def plain_add(after: nn.Module | None, y: Tensor, shortcut: Tensor) -> Tensor:
    """after(y + shortcut) by torch: y keeps its dtype under autocast, as where blocks add."""
    y += shortcut
    return y if after is None else after(y)
