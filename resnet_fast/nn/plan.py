# SPDX-License-Identifier: Apache-2.0
"""A network as a tuple of steps over a few slots, and which op each step is.

    slot 0   what goes in, and what comes out
    slot 1   what main has made so far
    slot 2   what the shortcut has made so far

    step     slots[writes] = op(slots[reads])     one op over one or two units
             slots[writes] = module(slots[reads]) what stays a module

A block becomes steps by the first of `BLOCKS` that takes it: the one with the largest kernels comes
first. To add a fused block is to add a kind to `units.KINDS` and a function to that list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.nn import reasons
from resnet_fast.nn.parts import Fused, Part, Parts
from resnet_fast.nn.recipes import Fusable
from resnet_fast.nn.units import KINDS, Unit, is_stem, join_refusal, to_channels_last


class Piece(NamedTuple):
    """One link of a network: a residual block, a stem with its pool, or any other module.

    Args:
        module: the block; or the network whose stem this is.
        found: how it fuses; None for a module that is called.
        pool: the module behind a stem, which is run with it; else None.
        is_stem: whether it is the stem of `module` rather than `module` itself.
    """

    module: nn.Module
    found: Fusable | None
    pool: nn.Module | None = None
    is_stem: bool = False

    def call(self, x: Tensor) -> Tensor:
        """Run it without fusing anything of it here."""
        if self.found is None:
            return self.module(x)
        y = self.found.plain(self.module, x)
        return y if self.pool is None else self.pool(y)


class Step(NamedTuple):
    """One step of a plan.

    Args:
        kind: of `units.KINDS`; or "call", a module or function of one tensor; "pool", the stem's
            max-pool; "add", of two, and the module behind it if there is one.
        reads: the slots of x and, where there is one, of the residual or the block's input.
        writes: the slot of the result.
        frees: the slots whose values no later step reads.
        over: whether the result is written over the second tensor that is read.
        units: of an op.
        activation: of an op: "relu" or "none".
        backend: of an op.
        module: what a "call", "pool" or "add" calls.
    """

    kind: str
    reads: tuple[int, ...]
    writes: int
    frees: tuple[int, ...] = ()
    over: bool = False
    units: tuple[Unit, ...] = ()
    activation: str = "none"
    backend: str = "auto"
    module: nn.Module | Callable[[Tensor], Tensor] | None = None

    @property
    def name_of(self) -> object:
        """The module that stands for it: the main convolution of an op."""
        return self.units[0].conv if self.units else self.module

    def call(self, x: Tensor, other: Tensor | None) -> tuple:
        """The arguments of its op."""
        return KINDS[self.kind].call(self.units, self.activation, self.backend, x, other)


def fold(steps: tuple[Step, ...], slots: list, run: Callable) -> object:
    """Follow the steps; `run(step, x, other)` gives each result. Returns what slot 0 ends with.

    `slots` holds tensors, or whatever `run` takes: magnitudes, for one.
    """
    for step in steps:
        reads = step.reads
        other = slots[reads[1]] if len(reads) > 1 else None
        slots[step.writes] = run(step, slots[reads[0]], other)
        for slot in step.frees:
            slots[slot] = None
    return slots[0]


# ---- from parts to steps


def steps_of(piece: Piece, parts: Parts, x: Tensor, owned: bool) -> tuple[Step, ...]:
    """The steps of a piece whose parts were found fit for tensors like x.

    Args:
        x: channels_last but for a stem, which may read it as it lies.
        owned: x may be overwritten.
    """
    backend = piece.found.backend
    choices = STEMS if piece.is_stem else BLOCKS
    for choose in choices:
        steps = choose(piece, parts, x, owned, backend)
        if steps is not None:
            return _free(steps)
    raise AssertionError("the last of them takes all")


def _stem_pool(piece, parts: Parts, x: Tensor, owned, backend: str) -> list[Step] | None:
    """Convolution, norm, ReLU and max-pool as one op, where the device has kernels for it."""
    if piece.pool is None or not pools(x) or backend not in ops.STEM_POOL.backends:
        return None
    if not (parts.is_whole and len(parts.main) == 1 and is_plain_pool(piece.pool)):
        return None
    ((unit, _, activation),) = parts.main
    if activation != "relu" or not is_stem(unit):
        return None
    return [Step("stem_pool", (0,), 0, units=(unit,), activation="relu", backend=backend)]


def _stem(piece, parts: Parts, x: Tensor, owned: bool, backend: str) -> list[Step]:
    steps = _units(piece, parts, x, owned, backend)
    if piece.pool is None:
        return steps
    kind = "pool" if is_plain_pool(piece.pool) else "call"
    return [*steps, Step(kind, (0,), 0, module=piece.pool)]


def _join(piece, parts: Parts, x: Tensor, owned, backend: str) -> list[Step] | None:
    """The block's last convolution, its projection, their sum and ReLU as one op."""
    if not _may_join(parts, x, backend):
        return None
    (*lead, main), (projection,) = parts.main, parts.shortcut
    units = main.unit, projection.unit
    reads = (1 if lead else 0), 0
    end = Step("join", reads, 0, units=units, activation="relu", backend=backend)
    if not reasons.listened_to(x):
        shape = x.shape
        for part in lead:
            shape = part.unit.shape_after(shape)
        h = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        try:
            plan = ops.CONV_BN_JOIN.plan_of(end.call(h, x))
        except ValueError:  # maps that do not fit, or a backend that cannot: each op says it
            return None
        if not plan.is_one_kernel:
            return None
    return [*_chain(lead, 0, 1, backend), end]


def _may_join(parts: Parts, x: Tensor, backend: str) -> bool:
    """Whether the block ends in what the op takes, where device and backend may."""
    if not parts.is_whole or not parts.shortcut:
        return False
    if not ops.CONV_BN_JOIN.may_fuse(x.device.type, backend):
        return False
    main, projection = parts.main[-1], parts.shortcut[0]
    plain = main.activation == "relu" and projection.activation == "none"
    return plain and join_refusal(main.unit, projection.unit) is None


def _units(piece, parts: Parts, x: Tensor, owned: bool, backend: str) -> list[Step]:
    """An op for each unit, the last of which adds the shortcut if it can; modules are called."""
    lead, rest = parts.main[: parts.fork], parts.main[parts.fork :]
    steps = _chain(lead, 0, 1, backend)
    at = 1 if lead else 0
    residual = 0
    if parts.shortcut:
        steps += _chain(parts.shortcut, at, 2, backend, lead)
        residual, owned = 2, isinstance(parts.shortcut[-1], Fused)
        if parts.joins and not owned:
            steps.append(Step("call", (2,), 2, module=to_channels_last))
    steps += _chain(rest, at, 1 if parts.adds else 0, backend, lead)
    if parts.joins:
        x_of_last = steps[-1].reads[0]
        over = owned and x_of_last != residual  # a kernel reads x after it has written y
        steps[-1] = steps[-1]._replace(reads=(x_of_last, residual), writes=0, over=over)
    elif parts.adds:
        return [*steps, Step("add", (1, residual), 0, module=parts.after)]
    if parts.after is not None:
        steps.append(Step("call", (0,), 0, module=parts.after))
    return steps


def _chain(
    parts: list[Part], start: int, slot: int, backend: str, behind: list[Part] = ()
) -> list[Step]:
    """Parts one after the other, from slot `start` into `slot`; `behind` are those before them."""
    steps: list[Step] = []
    before = behind[-1] if behind else None
    for part in parts:
        at = slot if steps else start
        if not isinstance(part, Fused):
            steps.append(Step("call", (at,), slot, module=part))
        else:
            if before is not None and not isinstance(before, Fused):
                steps.append(Step("call", (at,), slot, module=to_channels_last))
                at = slot
            units, activation = (part.unit,), part.activation
            step = Step("conv", (at,), slot, units=units, activation=activation, backend=backend)
            steps.append(step)
        before = part
    return steps


# (piece, parts, x, owned, backend) -> steps, or None where that way is not open
STEMS = (_stem_pool, _stem)
BLOCKS = (_join, _units)


def _free(steps: list[Step]) -> tuple[Step, ...]:
    """The steps, each with the slots that nothing reads any more once it has run."""
    live, found = {0}, []
    for step in reversed(steps):
        frees = set(step.reads) - live - {step.writes}
        live = (live - {step.writes}) | set(step.reads)
        found.append(step._replace(frees=tuple(sorted(frees))) if frees else step)
    return tuple(reversed(found))


def pools(x: Tensor) -> bool:
    """Whether x's device has kernels that pool; a compiler may not ask for the interpreter's."""
    return x.is_cuda or (
        not torch.compiler.is_compiling() and ops.STEM_POOL.may_fuse(x.device.type)
    )


def is_plain_pool(pool: nn.Module) -> bool:
    """Whether the module is the max-pool of ResNet's stem and nothing watches it."""
    if type(pool) is not nn.MaxPool2d or reasons.call_refusal(pool) or pool.return_indices:
        return False
    shape = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    return shape == (3, 2, 1, 1, False)
