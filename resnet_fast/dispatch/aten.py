# SPDX-License-Identifier: Apache-2.0
"""The backend `aten`, torch's own functions, and `cudnn`: what torch offers of its fused ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.dispatch import steps
from resnet_fast.dispatch.problem import (
    Binder,
    ConvProblem,
    JoinProblem,
    MaskProblem,
    StemProblem,
    SumProblem,
    binder,
    layout_refusal,
)
from resnet_fast.dispatch.row import Row
from resnet_fast.kernels import aten


def conv_build(
    problem: ConvProblem, tile: None = None, function: Callable[..., Tensor] = aten.conv_bn_act
) -> Binder:
    spec = problem.spec
    geometry = (spec.stride, spec.padding, spec.dilation, spec.groups, spec.activation)

    def launch(
        weight, scale, shift, mean, var, eps, x, residual, inplace=False, finite=False
    ) -> Tensor:
        y = function(x, weight.to(x.dtype), scale, shift, residual, *geometry, mean, var, eps)
        return residual.copy_(y) if inplace else y

    return binder(launch)


def _build_pool(problem: StemProblem) -> Callable[[Tensor], Tensor]:
    return lambda y: F.max_pool2d(y, 3, 2, 1).contiguous(memory_format=torch.channels_last)


def _call(function: Callable[..., Tensor]) -> Callable[..., Binder]:
    return lambda problem, tile=None: binder(function)


# ---- cuDNN's


def cudnn_missing(arch: int) -> str | None:
    return None if torch.backends.cudnn.is_available() else "torch has no cuDNN here"


def cudnn_refusal(problem: ConvProblem) -> str | None:
    if problem.x == "channels_inner":
        return "x is a slice, which torch would copy before cuDNN"
    return layout_refusal(problem) or aten.cudnn_refusal(problem.spec)


_row = functools.partial(Row, backend="aten")
ROWS = (
    _row(ConvProblem.op, build=conv_build),
    _row(JoinProblem.op, build=steps.join(conv_build)),
    _row(StemProblem.op, build=steps.stem(conv_build, _build_pool)),
    _row(SumProblem.op, build=_call(aten.add_relu)),
    _row(MaskProblem.op, build=_call(aten.add_relu_backward)),
    Row(
        ConvProblem.op,
        "cudnn",
        functools.partial(conv_build, function=aten.cudnn_conv_bn_act),
        device="cuda",
        missing=cudnn_missing,
        refusal=cudnn_refusal,
        by_name=aten.CUDNN_BY_NAME,
    ),
)
