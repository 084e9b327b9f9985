# SPDX-License-Identifier: Apache-2.0
"""A convolution with its BatchNorm as one unit, and the ops that units run as.

`KINDS` holds one entry per kind of step: which op it is, and how its arguments are made of units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.spec import conv_output_size


class Unit(NamedTuple):
    """A convolution and the BatchNorm that follows it, found fit to run as one op."""

    conv: nn.Conv2d
    weight: Tensor  # [K, R, S, C / groups]
    scale: Tensor  # [K]
    shift: Tensor  # [K]
    mean: Tensor  # [K]
    var: Tensor  # [K]
    eps: float
    bias: Tensor | None = None  # [K], the convolution's own

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return self.weight.shape[1] * self.conv.groups

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the unit's result depends on."""
        tensors = self[1:6]
        return tensors if self.bias is None else (*tensors, self.bias)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """weight, scale, shift, mean, var, eps as the ops take them.

        The ops have no bias: conv(x) + bias - mean is conv(x) - (mean - bias).
        """
        _, weight, scale, shift, mean, var, eps, bias = self
        if bias is not None:
            wide = torch.promote_types(mean.dtype, torch.float32)
            mean = mean.to(wide) - bias.to(wide)
        return weight, scale, shift, mean, var, eps

    def shape_after(self, shape: torch.Size) -> torch.Size:
        """The shape of the result for an input of `shape`; sizes are 0 where nothing is left."""
        conv, (n, _, *sizes) = self.conv, shape
        each = zip(
            *(sizes, self.weight.shape[2:], conv.stride, conv.padding, conv.dilation), strict=True
        )
        sizes = (max(conv_output_size(*of), 0) for of in each)
        return torch.Size((n, self.weight.shape[0], *sizes))


Units = tuple[Unit, ...]
# (units, activation, backend, x, other) -> the op's arguments; x is channels_last
Arguments = Callable[[Units, str, str, Tensor, Tensor | None], tuple]


class Kind(NamedTuple):
    """One kind of step that runs as an op.

    Args:
        op: which.
        call: makes its arguments.
        more: what its plan is bound to behind the units' own arguments.
        shown: how `report` shows the backend that ran it.
    """

    op: ops.Op
    call: Arguments
    more: tuple = ()
    shown: str = "{}"


def _conv_call(units: Units, activation: str, backend: str, x, residual) -> ops.Call:
    (unit,) = units
    weight, scale, shift, mean, var, eps = unit.arguments()
    conv = unit.conv
    return ops.Call(
        x, weight, scale, shift, residual, conv.stride, conv.padding, conv.dilation, conv.groups,
        activation, mean, var, eps, backend,
    )  # fmt: skip


def _join_call(units: Units, activation: str, backend: str, h, x) -> ops.JoinCall:
    main, projection = units
    weight, scale, shift, mean, var, eps = main.arguments()
    proj_weight, proj_scale, proj_shift, proj_mean, proj_var, proj_eps = projection.arguments()
    return ops.JoinCall(
        h, weight, scale, shift, x, proj_weight, proj_scale, proj_shift, projection.conv.stride,
        mean, var, eps, proj_mean, proj_var, proj_eps, backend,
    )  # fmt: skip


def _stem_call(units: Units, activation: str, backend: str, x, _other) -> ops.StemCall:
    (unit,) = units
    weight, scale, shift, mean, var, eps = unit.arguments()
    return ops.StemCall(x, weight, scale, shift, mean, var, eps, None, None, backend)


KINDS = {
    "conv": Kind(ops.CONV_BN_ACT, _conv_call),
    "join": Kind(ops.CONV_BN_JOIN, _join_call),
    "stem_pool": Kind(ops.STEM_POOL, _stem_call, (None, None), "{} with maxpool"),
}


def join_refusal(main: Unit, projection: Unit) -> str | None:
    """Why the two convolutions cannot end a block as one op, or None."""
    for name, conv in (("convolution", main.conv), ("projection", projection.conv)):
        if conv.groups != 1 or conv.dilation != (1, 1):
            return f"the {name} has groups or a dilation"
    height, width = main.weight.shape[2:]
    if not height % 2 == width % 2 == 1 or main.conv.padding != (height // 2, width // 2):
        return "the convolution changes the map's size"
    if main.conv.stride != (1, 1):
        return "the convolution has a stride"
    if projection.weight.shape[2:] != (1, 1) or projection.conv.padding != (0, 0):
        return "the projection is not pointwise"
    return None


def is_stem(unit: Unit) -> bool:
    """Whether it is the 7x7/2 convolution of three channels that a ResNet begins with."""
    conv = unit.conv
    shape = (*unit.weight.shape[1:], conv.stride, conv.padding, conv.dilation, conv.groups)
    return shape == (3, 7, 7, (2, 2), (3, 3), (1, 1), 1)


def to_channels_last(x: Tensor) -> Tensor:
    """x in the layout that the kernels take; x itself where it has it."""
    return x.contiguous(memory_format=torch.channels_last)
