# SPDX-License-Identifier: Apache-2.0
"""Modules of which a part runs as ops, while the rest is called; see `parts.py` and `program.py`.

    for each part of the shortcut, then of main:    y = op(y)  or  module(y)
    at the end, if there is a shortcut:             y = act(y + shortcut)

The last op of main adds the shortcut where nothing comes between; else an addition of its own does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter

from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.nn import fusion, program
from resnet_fast.nn.parts import Fused, Parts
from resnet_fast.nn.program import Launch, Program, Step, key_of

# (part, x, residual, whether y may be written over it) -> y
RunFused = Callable[[Fused, Tensor, Tensor | None, bool], Tensor]
Add = Callable[[Tensor, Tensor, nn.Module | None], Tensor]


def run_parts(parts: Parts, x: Tensor, owned: bool, run: RunFused, add: Add) -> Tensor:
    """An owner's result, its fused parts run by `run`, its shortcut added by `add`.

    Args:
        parts: of the owner.
        x: channels_last.
        owned: x may be overwritten.
    """

    def step(part: Fused | nn.Module, y: Tensor, residual: Tensor | None = None, over=False):
        if not isinstance(part, Fused):
            return part(y)
        return run(part, fusion.to_channels_last(y), residual, over)

    shortcut = x
    for part in parts.shortcut:
        shortcut = step(part, shortcut)
        owned = isinstance(part, Fused)
    y = x
    for part in parts.main[:-1]:
        y = step(part, y)
    if parts.joins:
        y = step(parts.main[-1], y, fusion.to_channels_last(shortcut), owned)
    elif parts.main:
        y = step(parts.main[-1], y)
    if parts.adds and not parts.joins:
        return add(y, shortcut, parts.after)
    return y if parts.after is None else parts.after(y)


def call_ops(parts: Parts, x: Tensor, backend: str) -> Tensor:
    """The parts through torch's dispatcher, without writing over anything."""

    def run(part: Fused, y: Tensor, residual: Tensor | None, _over: bool) -> Tensor:
        call = fusion.call_of(part.unit, y, residual, part.activation, backend)
        return ops.conv_bn_act_op(*call)

    return run_parts(parts, x, False, run, _add)


def _add(y: Tensor, shortcut: Tensor, after: nn.Module | None) -> Tensor:
    """after(y + shortcut) by torch: y keeps its dtype under autocast, as where blocks add."""
    y += shortcut
    return y if after is None else after(y)


def _add_relu(y: Tensor, shortcut: Tensor, after: nn.Module | None) -> Tensor:
    """after(y + shortcut), in one pass where it is a ReLU of two equal maps."""
    alike = (y.shape, y.dtype, y.stride()) == (shortcut.shape, shortcut.dtype, shortcut.stride())
    if type(after) is nn.ReLU and alike and fusion.call_refusal(after) is None:
        return ops.add_relu(y, shortcut)
    return _add(y, shortcut, after)


class MixedProgram(Program):
    """The steps of an owner's fused parts, and between them modules that are called.

    Args:
        owner: the block, stem or sequence.
        parts: of it.
        backend: for its ops.
        record: of the owner.
    """

    __slots__ = ("parts", "singles")

    def __init__(self, owner: nn.Module, parts: Parts, backend: str, record: fusion.Record) -> None:
        units = [part for part in (*parts.shortcut, *parts.main) if isinstance(part, Fused)]
        steps = [Step(p.unit, p.norm, p.activation, backend, record) for p in units]
        called = [p for p in (*parts.shortcut, *parts.main) if not isinstance(p, Fused)]
        pools = [module for module in called if type(module) is nn.AvgPool2d]
        super().__init__(owner, steps, None, False, [*parts.bypassed, *pools])
        self.parts = parts
        self.singles = [[step] for step in steps]
        divisors = list(map(_DIVISOR, pools))
        self.facts.append((_DIVISOR, pools, divisors))
        self.calls_modules = len(called) > len(pools) or parts.after is not None
        self.bounded = not self.calls_modules and not any(divisors)
        self.owns = not self.calls_modules and isinstance(parts.main[-1], Fused)

    def run(self, launches: list[Launch], x: Tensor, owned: bool, finite: bool = False) -> Tensor:
        """The owner's result; arguments as `Program.run`'s."""
        rest: Iterator = zip(launches, self.singles, strict=True)

        def run(_part: Fused, y: Tensor, residual: Tensor | None, over: bool) -> Tensor:
            launch, single = next(rest)
            if program.watch is None:
                return launch(y, residual, over, finite)
            watched = program.watch(single, [launch])
            y = next(watched)(y, residual, over, finite)
            next(watched, None)
            return y

        y = run_parts(self.parts, x, owned, run, _add_relu)
        if self.next_key is None and isinstance(y, Tensor):
            self.next_key = key_of(y)
        return y

    def bound(self, launches: list[Launch], magnitude: float) -> tuple[float, float]:
        """As `Program.bound`: average pools, the only other modules here, make nothing larger."""
        growths = iter([launch.growth or program.UNKNOWN for launch in launches])
        shortcut, largest = magnitude, magnitude
        for part in self.parts.shortcut:
            if isinstance(part, Fused):
                gain, offset = next(growths)
                shortcut = gain * shortcut + offset
                largest = largest + shortcut
        y = magnitude
        for part in self.parts.main:
            if isinstance(part, Fused):
                gain, offset = next(growths)
                y = gain * y + offset
                largest = largest + y
        return largest, y + shortcut if self.parts.adds else y


_DIVISOR = attrgetter("divisor_override")
