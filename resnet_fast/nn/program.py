# SPDX-License-Identifier: Apache-2.0
"""What a block can keep between two calls, and the check that it still holds.

Walking through the guard list and choosing plans takes longer than a small convolution. So what
the first call on an input size found is kept as a `Program`: the plans of the block's units, and
the facts they rest on. A later call looks at the facts again and launches; if one differs, the
guards are asked anew. Nothing here decides what may be fused: that is `fusion.py` alone.

A fact is a function, the things it is applied to, and what it gave: types, attributes, identities
and addresses. They are compared a list at a time, in C, and for all blocks of a model before the
first of them is launched: between two convolutions the caches forget the interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import itemgetter

import torch
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.nn import fusion
from resnet_fast.nn.fusion import Record, Unit

# Read from a module's __dict__, where these live: a third of what attribute access costs.
# No gradient is needed where programs apply, so backward hooks cannot fire.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_CONV = itemgetter("stride", "padding", "dilation", "groups", "padding_mode", *_HOOKS)
_NORM = itemgetter("training", "eps", *_HOOKS)
_OTHER = itemgetter("training", *_HOOKS)

MAX_PROGRAMS = 64  # input sizes remembered per block: a detector's images have dozens

Launch = Callable[..., Tensor]  # see dispatch/backends.py
Bound = tuple["Program", list[Launch]]  # of its steps, projection first

# While a profile runs, it gives out the launches: from when it is asked for one until it is asked
# for the next, that one runs.
watch: Callable[[Sequence[Step | JoinStep], Sequence[Launch]], Iterator[Launch]] | None = None


def key_of(x: Tensor) -> tuple:
    """What a program depends on beside its modules; x is channels_last."""
    key = (x.shape, x.dtype, x.device)
    return (*key, x.data_ptr() % 16, ops.precision()) if x.is_cuda else key


def may_keep(x: Tensor) -> bool:
    """Whether programs apply to this call: nothing listens, and no gradient could be needed."""
    if torch.is_grad_enabled() or fusion.listened_to(x):
        return False
    return x.is_cuda or torch._C._get_mkldnn_enabled()  # whose absence another plan would serve


def recall(record: Record | None, key: tuple | None, owner: nn.Module) -> Bound | None:
    """The program kept for this key and its launches, or None.

    If its facts hold no more, all of the owner's programs are dropped: they would keep alive the
    tensors that were replaced.
    """
    program = record and record.programs.get(key)
    if not program:
        return None
    if not program.holds(owner):
        record.programs.clear()
        return None
    record.count_fused()
    return program, [step.bind() for step in program.sequence]


def remember(record: Record, key: tuple, program: Program) -> None:
    """Keep a program for later calls with this key."""
    if len(record.programs) >= MAX_PROGRAMS:
        record.programs.clear()
    record.programs[key] = program


class Step:
    """One unit of a program: how it is called, and once it has been, its plan and its launch."""

    __slots__ = ("activation", "arguments", "backend", "launch", "norm", "plan", "record", "unit")

    def __init__(
        self, unit: Unit, norm: nn.Module, activation: str, backend: str, record: Record
    ) -> None:
        self.unit, self.norm, self.record = unit, norm, record
        self.activation, self.backend = activation, backend
        self.plan = self.launch = None
        # Else a later call outside of inference mode could not write to what was made inside.
        with torch.inference_mode(False), torch.no_grad():
            self.arguments = unit.arguments()

    def bind(self) -> Launch:
        """The launch for what the tensors hold now."""
        if self.plan is None:
            return self._first_launch
        self.plan.calls += 1
        self.renew()
        if self.launch is None or not self.launch.fresh(self.unit.weight):
            self.launch = self.plan.bind(*self.arguments)
        return self.launch

    def renew(self) -> None:
        """Compute anew what of the op's arguments is not one of the modules' tensors."""
        if self.unit.bias is not None:
            self.arguments[3].copy_(self.unit.arguments()[3])

    def _first_launch(
        self, x: Tensor, residual: Tensor | None, inplace: bool, finite: bool
    ) -> Tensor:
        call = fusion.call_of(self.unit, x, residual, self.activation, self.backend)
        self.plan = ops.plan_of(call)
        y = self.bind()(x, residual, inplace, finite)
        self.record.note(self.plan)  # by now it is known whether its backend can launch
        self.record = None  # it holds the program: no cycle, so that both go with their module
        return y


class JoinStep:
    """The last unit and the projection of a program as one op, `ops.conv_bn_join`."""

    __slots__ = ("launch", "main", "plan", "projection", "record")

    def __init__(self, main: Step, projection: Step, plan, record: Record) -> None:
        self.main, self.projection, self.plan, self.record = main, projection, plan, record
        self.launch = None

    def bind(self) -> Launch:
        """The launch, of (h, x), for what the tensors hold now."""
        self.plan.calls += 1
        self.main.renew()
        self.projection.renew()
        if self.launch is None or not self.launch.fresh(self.main.unit.weight):
            self.launch = self.plan.bind(*self.main.arguments, *self.projection.arguments)
        return self.launch if self.record is None else self._first_launch

    def _first_launch(self, h: Tensor, x: Tensor) -> Tensor:
        y = self.launch(h, x)
        self.record.note(self.plan)  # by now it is known whether its backend can launch
        if self.plan.is_one_kernel:
            self.record.merged = "conv_bn_join"
        self.record = None  # see `Step`
        return y


class Program:
    """A block's (or stem's) steps for one input size.

    A program is kept in its owner's `Record`, and must not keep its owner alive from there.

    Args:
        owner: the block, or the model whose stem this is.
        steps: the units in order; the last adds the shortcut if `joins`.
        projection: the shortcut's unit, or None for the identity.
        joins: whether the last step adds a shortcut.
        bypassed: all modules under the owner that the program runs without calling.
        join: runs the last step and the projection as one, or None.

    Beside these it says whether how large its result can get may be known (`bounded`), whether it
    calls modules, which may do anything (`calls_modules`), whether nobody else holds its result
    (`owns`), and how many elements pass a ReLU for each of x (`rectified`).
    """

    __slots__ = (
        "bounded",
        "calls_modules",
        "facts",
        "hooks",
        "join",
        "joins",
        "next_key",
        "owner_facts",
        "owns",
        "projection",
        "rectified",
        "sequence",
        "steps",
        "storage",
        "stored",
    )

    def __init__(
        self,
        owner: nn.Module,
        steps: list[Step],
        projection: Step | None,
        joins: bool,
        bypassed: list[nn.Module],
        join: JoinStep | None = None,
    ) -> None:
        self.steps, self.projection, self.joins, self.join = steps, projection, joins, join
        units = steps if projection is None else [projection, *steps]
        self.sequence = units if join is None else [*steps[:-1], join]
        self.next_key: tuple | None = None
        convs = [step.unit.conv for step in units]
        norms = [step.norm for step in units if "eps" in vars(step.norm)]
        tensors = [t for step in units for t in step.unit.tensors]
        others = [m for m in bypassed if m not in convs and m not in norms]
        looks = (
            (type, bypassed),
            (len, list(map(vars, bypassed))),  # a forward of its own, a compiled call, ...
            (_CONV, list(map(vars, convs))),
            (_NORM, list(map(vars, norms))),
            (_OTHER, list(map(vars, others))),
            (Tensor.data_ptr, tensors),
        )
        self.facts = [(look, things, list(map(look, things))) for look, things in looks]
        self.bounded, self.calls_modules, self.owns = True, False, True
        self.rectified = _rectified(steps)
        self.owner_facts = _owner_facts(owner)
        modules = [owner, *bypassed]
        # Equal facts mean the same hook dictionaries; they must be empty as well.
        self.hooks = [getattr(m, name) for m in modules for name in _HOOKS]
        # Children, parameters and buffers by identity: a tensor's == is another thing.
        self.storage = [d for m in modules for d in (m._modules, m._parameters, m._buffers) if d]
        self.stored = self._identities()

    def _identities(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(dict.values, self.storage))))

    def holds(self, owner: nn.Module) -> bool:
        """Whether every fact is still as it was."""
        if any(self.hooks) or self._identities() != self.stored:
            return False
        if _owner_facts(owner) != self.owner_facts:
            return False
        if "forward" in owner.__dict__:
            return False
        for look, things, before in self.facts:  # noqa: SIM110 (a generator costs a third more)
            if list(map(look, things)) != before:
                return False
        return True

    def run(self, launches: list[Launch], x: Tensor, owned: bool, finite: bool = False) -> Tensor:
        """The block's result.

        Args:
            launches: of `bind`.
            x: channels_last.
            owned: x may be overwritten.
            finite: `bound` has shown that all values are finite.
        """
        steps = iter(launches) if watch is None else watch(self.sequence, launches)
        if self.join is not None:
            return self._run_join(steps, x, finite)
        shortcut = x if self.joins else None
        if self.projection is not None:
            shortcut, owned = next(steps)(x, None, False, finite), True
        y = x
        for _ in self.steps[1:]:
            y = next(steps)(y, None, False, finite)
        y = next(steps)(y, shortcut, owned and self.joins, finite)
        next(steps, None)
        if self.next_key is None:
            self.next_key = key_of(y)
        return y

    def _run_join(self, steps: Iterator[Launch], x: Tensor, finite: bool) -> Tensor:
        h = x
        for _ in self.steps[:-1]:
            h = next(steps)(h, None, False, finite)
        y = next(steps)(h, x)
        next(steps, None)
        if self.next_key is None:
            self.next_key = key_of(y)
        return y

    def bound(self, launches: list[Launch], magnitude: float) -> tuple[float, float]:
        """How large the block's values can get if x is at most `magnitude`: (any, the result).

        By the growth that each launch states; NaN where one does not know.
        """
        if self.join is not None:
            return UNKNOWN
        steps = iter(launches)
        shortcut = magnitude if self.joins else 0.0
        if self.projection is not None:
            gain, offset = next(steps).growth or UNKNOWN
            shortcut = gain * magnitude + offset
        largest, y = shortcut, magnitude
        for launch in steps:
            gain, offset = launch.growth or UNKNOWN
            y = gain * y + offset
            largest = largest + y  # more than the largest of them, and NaN if one is
        return largest, y + shortcut


def _rectified(steps: list[Step]) -> float:
    """How many elements pass a ReLU for each element of the input, paddings aside."""
    found, area = 0.0, 1.0
    for step in steps:
        area /= math.prod(step.unit.conv.stride)
        if step.activation == "relu":
            found += area * step.unit.weight.shape[0] / steps[0].unit.channels
    return found


UNKNOWN = (math.nan, math.nan)
# Far enough below the largest number that rounding cannot matter.
_LIMITS = {torch.float32: 1e38, torch.bfloat16: 1e38, torch.float16: 3e4}


def follow(
    program: Program, launches: list[Launch], x: Tensor, magnitude: float | None
) -> tuple[bool, float | None]:
    """Whether all values of a program's run on x are finite, and how large its result can be.

    Bounds are followed from program to program, and x is measured only where there is none or where
    it has grown too loose: two or three times in a ResNet-50.

    Args:
        magnitude: of x, where it is known; else None.

    Returns:
        (False, None) where nothing can be shown, or where the backend has no use for it.
    """
    if launches[0].growth is None:
        return False, None
    if not program.bounded:
        return False, None
    limit = _LIMITS.get(x.dtype, 0.0)
    largest = math.nan
    if magnitude is not None:
        largest, result = program.bound(launches, magnitude)
    if not largest < limit:
        if program.rectified < 1:  # to measure x costs more than the ReLUs, each in its own pass
            return False, None
        largest, result = program.bound(launches, ops.magnitude(x))
    return (True, result) if largest < limit else (False, None)


def _owner_facts(owner: nn.Module) -> tuple:
    attributes = owner.__dict__
    # A missing part is a plain attribute, None, which may become anything callable.
    missing = list(attributes.values()).count(None)
    return type(owner), len(attributes), _OTHER(attributes), missing
