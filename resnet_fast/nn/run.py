# SPDX-License-Identifier: Apache-2.0
"""Running networks, stages and blocks: by the plan that is kept, or by making one.

    context and key -> kept plan -> its guard holds -> bind every launch -> follow the steps
                       no plan   -> per piece: parts -> steps -> run, and keep all of it

Two ways lead to the kernels. Where something listens in torch's dispatcher (compilation, export,
autocast, profilers, modes), steps are called as ops. Otherwise they are launched past it, which
saves 8 to 14 microseconds a step, by a plan that is kept for the shape, dtype and device of the
input and for as long as its `Guard` holds.

A plan covers pieces (blocks, stems) up to the end, or up to a piece that calls modules of a user's:
they may change what comes after, so a new plan with a guard of its own begins there.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.nn import reasons
from resnet_fast.nn.guard import Guard
from resnet_fast.nn.launches import (
    UNKNOWN,
    ModuleStep,
    OpStep,
    Record,
    launched,
    observer_now,
    traced,
)
from resnet_fast.nn.launches import magnitude as magnitude_of
from resnet_fast.nn.parts import Fused, Parts, parts_of
from resnet_fast.nn.plan import Piece, Step, fold, steps_of
from resnet_fast.nn.units import to_channels_last

MAX_PLANS = 64  # inputs remembered per root: a detector's images have dozens of sizes
# Far enough below the largest number that rounding cannot matter.
_LIMITS = {torch.float32: 1e38, torch.bfloat16: 1e38, torch.float16: 3e4}

# gain and offset: a value is at most gain * (largest of x) + offset
Growth = tuple[float, float]

_records: weakref.WeakKeyDictionary[nn.Module, Record] = weakref.WeakKeyDictionary()
_plans: weakref.WeakKeyDictionary[nn.Module, dict[tuple, Plan]] = weakref.WeakKeyDictionary()


def record_of(module: nn.Module) -> Record:
    """How a block, or a network's stem, has run so far; a new record if it has not."""
    record = _records.get(module)
    return _records.setdefault(module, Record()) if record is None else record


def plans_of(root: nn.Module) -> list[Plan]:
    """The plans that are kept for a module."""
    return list(_plans.get(root, {}).values())


def forget_plans(model: nn.Module) -> None:
    """Drop the plans of a model and of all modules in it."""
    for module in model.modules():
        if module in _plans:
            _plans[module].clear()


class Chain(NamedTuple):
    """Pieces that run one after the other, and the sequences that hold them."""

    pieces: list[Piece]
    holders: list[nn.Module]


def run(root: nn.Module, role: Hashable, chain: Callable[[], Chain], x: Tensor) -> Tensor:
    """Run a chain; its plans are kept for `root` under its `role`."""
    at, known = 0, None
    while at is not None:
        refusal = reasons.context_refusal(x)
        keeps = refusal is None and _may_keep(x)
        key = (role, at, *_key_of(x)) if keeps else None
        plan = _recall(root, key)
        if plan is not None:
            x, at = plan.run(x), plan.next
            continue
        known = known or chain()
        if at == len(known.pieces):
            return x
        if keeps:
            x, at = _plan(root, known, at, x, key)
        else:
            x = _run_once(known.pieces[at], x, refusal)
            at += 1
    return x


def _may_keep(x: Tensor) -> bool:
    """Whether plans apply to this call: nothing listens, and no gradient could be needed."""
    if torch.is_grad_enabled() or reasons.listened_to(x):
        return False
    return x.is_cuda or torch._C._get_mkldnn_enabled()  # whose absence another plan would serve


def _key_of(x: Tensor) -> tuple:
    """What a plan depends on beside its modules."""
    key = (x.shape, x.stride(), x.dtype, x.device)
    return (*key, x.data_ptr() % 16, ops.precision()) if x.is_cuda else key


def _recall(root: nn.Module, key: tuple | None) -> Plan | None:
    """The plan kept for this key, if its guard holds.

    If not, all of the root's plans are dropped: they would keep alive what was replaced.
    """
    plans = _plans.get(root) if key else None
    plan = plans.get(key) if plans else None
    if plan is None or plan.guard.holds(root):
        return plan
    plans.clear()
    return None


def _run_once(piece: Piece, x: Tensor, refusal: str | None) -> Tensor:
    """Run one piece and keep nothing."""
    parts = refusal or _parts_of(piece, x)
    if parts is None or isinstance(parts, str):
        _note_plain(piece, parts)
        return piece.call(x)
    steps = steps_of(piece, parts, x, not _is_channels_last(x))
    _note_fused(piece, parts)
    if not reasons.listened_to(x):
        return PlannedPiece(piece, parts, steps).run_first([_given(steps, x), None, None])
    return fold(steps, [to_channels_last(x), None, None], traced)


def _plan(
    root: nn.Module, chain: Chain, at: int, x: Tensor, key: tuple
) -> tuple[Tensor, int | None]:
    """Run pieces from number `at` on and keep a plan of them: the result, and where it ends."""
    plan, slots = None, [x, None, None]
    for number in range(at, len(chain.pieces)):
        piece, x = chain.pieces[number], slots[0]
        parts = _parts_of(piece, x)
        if parts is None or isinstance(parts, str):
            if plan is not None:  # it runs what comes before
                break
            _note_plain(piece, parts)
            return piece.call(x), number + 1
        owned = plan is not None or not _is_channels_last(x)
        steps = steps_of(piece, parts, x, owned)
        if plan is None:
            slots[0] = _given(steps, x)
            plan = Plan(root, chain.holders, converts=slots[0] is not x)
        elif plan.ends_in_a_call:
            steps = (Step("call", (0,), 0, module=to_channels_last), *steps)
        del x  # slots hold what is still needed
        planned = PlannedPiece(piece, parts, steps)
        plan.add(root, piece, parts, planned)
        _note_fused(piece, parts)
        planned.run_first(slots)
        number += 1
        if planned.calls_users:
            break
    # Only now that each step has a plan of its op: another thread might meet it before.
    plan.next = number if number < len(chain.pieces) else None
    _remember(root, key, plan)
    return slots[0], plan.next


def _remember(root: nn.Module, key: tuple, plan: Plan) -> None:
    plans = _plans.setdefault(root, {})
    if len(plans) >= MAX_PLANS:
        plans.clear()
    plans[key] = plan


def _parts_of(piece: Piece, x: Tensor) -> Parts | str | None:
    """The parts of a piece, or why it runs plain; None if it is only ever called."""
    return piece.found and parts_of(piece.module, piece.found.recipe, x)


def _given(steps: tuple[Step, ...], x: Tensor) -> Tensor:
    """x as the first step takes it: some kernels of stems read any layout."""
    as_it_lies = steps[0].kind == "stem_pool" and ops.STEM_POOL.reads(steps[0].call(x, None))
    return x if as_it_lies else to_channels_last(x)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


class PlannedPiece:
    """One piece of a plan: its steps and what runs them.

    `bounded` says whether how large its values can get may be known; `calls_users`, whether it
    calls modules that may do anything.
    """

    __slots__ = (
        "_growth",
        "bounded",
        "calls_users",
        "record",
        "rectified",
        "runs",
        "steps",
    )

    def __init__(self, piece: Piece, parts: Parts, steps: tuple[Step, ...]) -> None:
        self.steps = steps
        self.record = record_of(piece.module)
        self.record.merged = ""
        self.runs: list[OpStep | ModuleStep] = [launched(step, self.record) for step in steps]
        called = [run for run in self.runs if isinstance(run, ModuleStep)]
        self.calls_users = not all(reasons.is_torchs_own(run.step.module) for run in called)
        self.bounded = not any(math.isnan(run.growth[0]) for run in called)
        self.rectified = _rectified(parts)
        self._growth: tuple[list[Callable], tuple[float, float, float]] = [], (math.nan,) * 3

    def run_first(self, slots: list) -> Tensor:
        """Run it for the first time: slot 0 becomes its result."""
        return self.follow([run.bind() for run in self.runs], slots, False)

    def follow(self, launches: list[Callable], slots: list, finite: bool) -> Tensor:
        """Follow the steps; `finite` where `bound` has shown it."""
        ready, observer = iter(zip(self.runs, launches, strict=True)), observer_now()
        if observer is not None:
            observer.begin()

        def launch(step: Step, x: Tensor, other: Tensor | None) -> Tensor:
            run, launch = next(ready)
            if observer is None or isinstance(run, ModuleStep):  # whose modules are called
                return launch(x, other, step.over, finite)
            return observer(run, launch, x, other, step.over, finite)

        return fold(self.steps, slots, launch)

    def bound(
        self, launches: list[Callable], x: Tensor, magnitude: float | None
    ) -> tuple[bool, float | None]:
        """Whether all values of a run on x are finite, and how large its result can be.

        Bounds are followed from piece to piece, and x is measured only where there is none or where
        it has grown too loose: two or three times in a ResNet-50.

        Args:
            launches: of this run.
            x: the input.
            magnitude: the bound on x, where it is known; else None.

        Returns:
            (False, None) where nothing can be shown, or where the backend has no use for it.
        """
        if not self.bounded:
            return False, None
        known, growth = self._growth
        if launches != known:  # some are new, and grow otherwise
            growth = self._grow(launches, x.dtype)
            self._growth = launches, growth
        most, gain, offset = growth
        if magnitude is None or not magnitude < most:
            if self.rectified < 1 or not most > 0:
                # To measure x costs more than the ReLUs, each in its own pass; or is of no use.
                return False, None
            magnitude = magnitude_of(x)
        return (True, gain * magnitude + offset) if magnitude < most else (False, None)

    def _grow(self, launches: list[Callable], dtype: torch.dtype) -> tuple[float, float, float]:
        """How large x may be, and gain and offset that bound the result; NaN if there is no bound.

        Every value on the way is at most gain * (largest of x) + offset, by the growth that its
        launch states and those of what it reads.
        """
        ready, most = iter(launches), math.inf
        limit = _LIMITS.get(dtype, 0.0)

        def grow(_step: Step, x: Growth, other: Growth | None) -> Growth:
            nonlocal most
            gain, offset = next(ready).growth or UNKNOWN
            gain, offset = gain * x[0], gain * x[1] + offset
            if other is not None:
                gain, offset = gain + other[0], offset + other[1]
            reach = (limit - offset) / gain if gain else math.inf if offset < limit else 0.0
            if not (reach >= most or math.isnan(most)):  # NaN, where nothing is known, stays
                most = reach
            return gain, offset

        gain, offset = fold(self.steps, [(1.0, 0.0), None, None], grow)
        return most, gain, offset


class Plan:
    """What is kept for one input of a root: planned pieces, and the guard of all they rest on.

    Args:
        root: the module that it is kept for, and that it must not keep alive.
        holders: the sequences that hold the pieces.
        converts: whether the input is to be made channels_last.

    `next` is the number of the piece that follows the plan's last, or None at the end.
    """

    __slots__ = ("converts", "guard", "next", "pieces")

    def __init__(self, root: nn.Module, holders: list[nn.Module], converts: bool) -> None:
        self.guard, self.converts = Guard(root), converts
        self.guard.watch(holders, [])
        self.pieces: list[PlannedPiece] = []
        self.next: int | None = None

    def add(self, root: nn.Module, piece: Piece, parts: Parts, planned: PlannedPiece) -> None:
        """Add a piece that is about to run, and watch all that it rests on."""
        if piece.module is not root:
            self.guard.watch_owner(piece.module)
        units = [p.unit for p in (*parts.main, *parts.shortcut) if isinstance(p, Fused)]
        called = [run.step.module for run in planned.runs if isinstance(run, ModuleStep)]
        modules = [*parts.bypassed, *filter(None, [piece.pool])]
        modules += [m for m in called if isinstance(m, nn.Module) and reasons.is_torchs_own(m)]
        self.guard.watch(dict.fromkeys(modules), [t for unit in units for t in unit.tensors])
        self.pieces.append(planned)

    @property
    def ends_in_a_call(self) -> bool:
        """Whether a module gives the result, in whatever memory format."""
        return self.pieces[-1].steps[-1].kind in ("call", "add")

    @property
    def steps(self) -> list[Step]:
        """The steps of all pieces."""
        return [step for piece in self.pieces for step in piece.steps]

    @property
    def bounded(self) -> bool:
        """Whether how large its values can get may be known in every piece."""
        return all(piece.bounded for piece in self.pieces)

    def run(self, x: Tensor) -> Tensor:
        """The result of its pieces on x; the guard holds."""
        # All tensors are looked at before the first launch.
        bound = [[run.bind() for run in piece.runs] for piece in self.pieces]
        slots, magnitude = [to_channels_last(x) if self.converts else x, None, None], None
        for piece, launches in zip(self.pieces, bound, strict=True):
            piece.record.count_fused()
            finite, magnitude = piece.bound(launches, slots[0], magnitude)
            piece.follow(launches, slots, finite)
        return slots[0]


def _rectified(parts: Parts) -> float:
    """How many elements pass a ReLU for each element of the input, paddings aside."""
    found, area, channels = 0.0, 1.0, 0
    for part in parts.main:
        if isinstance(part, Fused):
            area /= math.prod(part.unit.conv.stride)
            channels = channels or part.unit.channels
            if part.activation == "relu":
                found += area * part.unit.weight.shape[0] / channels
    return found


def _note_plain(piece: Piece, reason: str | None) -> None:
    if piece.found is not None and not torch.compiler.is_compiling():
        record = record_of(piece.module)
        record.plain += 1
        record.reason, record.left = reason, ""


def _note_fused(piece: Piece, parts: Parts) -> None:
    if not torch.compiler.is_compiling():
        record = record_of(piece.module)
        record.left = parts.left
        record.count_fused()
