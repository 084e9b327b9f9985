# SPDX-License-Identifier: Apache-2.0
"""A ResNet's stem with its pool as a program of one step; see `program.py`."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.nn.fusion import Unit
from resnet_fast.nn.program import Program, Step

WITH_POOL = "{} with maxpool"  # what `report` shows as the backend
_POOL = attrgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def stem_call(unit: Unit, x: Tensor, backend: str) -> ops.StemCall:
    """The op's arguments for a stem's unit."""
    _, weight, scale, shift, mean, var, eps = unit
    return ops.StemCall(x, weight, scale, shift, mean, var, eps, None, None, backend)


class PooledStep(Step):
    """A stem's unit and the pool behind it, run by the plan of `stem_pool`."""

    __slots__ = ()

    def reads(self, x: Tensor) -> bool:
        """Whether the kernel that runs reads x as it lies in memory."""
        return ops.stem_reads(stem_call(self.unit, x, self.backend))

    def _first_launch(
        self, x: Tensor, residual: Tensor | None, inplace: bool, finite: bool
    ) -> Tensor:
        self.plan = ops.stem_plan_of(stem_call(self.unit, x, self.backend))
        y = self.bind()(x, residual, inplace, finite)
        name = WITH_POOL.format(self.plan.backend)
        self.record.backends.setdefault(name, self.plan.why_fallback())
        self.record = None  # it holds the program: no cycle, so that both go with their module
        return y


class PooledProgram(Program):
    """A model's stem and pool; `converts`: x is to be made channels_last before."""

    __slots__ = ("converts",)

    def __init__(
        self, owner: nn.Module, step: PooledStep, bypassed: list[nn.Module], converts: bool
    ) -> None:
        super().__init__(owner, [step], None, False, bypassed)
        self.converts = converts
        pools = [m for m in bypassed if isinstance(m, nn.MaxPool2d)]
        self.facts.append((_POOL, pools, list(map(_POOL, pools))))
