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
    stem_binder,
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


def stem_pool(
    x: Tensor,  # [N, 3, H, W]
    weight: Tensor,  # [K, 7, 7, 3]
    scale: Tensor,  # [K]
    shift: Tensor,  # [K]
    mean: Tensor | None,  # [K]
    var: Tensor | None,  # [K]
    eps: float,
    image_mean: Tensor | None,  # [3]
    image_std: Tensor | None,  # [3]
) -> Tensor:  # [N, PP, PQ, K]
    """The op step by step in torch's own functions, at weight's dtype."""
    x = steps.normalize(x, image_mean, image_std, weight.dtype)
    geometry = ((2, 2), (3, 3), (1, 1), 1, "relu")
    y = aten.conv_bn_act(x, weight, scale, shift, None, *geometry, mean, var, eps)
    return F.max_pool2d(y, 3, 2, 1).contiguous(memory_format=torch.channels_last)


def _call(function: Callable[..., Tensor]) -> Callable[..., Binder]:
    return lambda problem, tile=None: binder(function)


def _stem(weight, scale, shift, mean, var, eps, image_mean, image_std, x, *_) -> Tensor:
    return stem_pool(x, weight, scale, shift, mean, var, eps, image_mean, image_std)


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
    _row(StemProblem.op, build=lambda problem, tile=None: stem_binder(_stem)),
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
